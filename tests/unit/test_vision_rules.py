"""What a request may say to `mlx_vlm.server`, and what of it is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlxproxy.engines.mlx_vlm.rules import RULES
from mlxproxy.engines.mlx_vlm.wire import MlxVlmWire
from mlxproxy.errors import InvalidRequest
from mlxproxy.guard.check import check
from mlxproxy.guard.shapes import Limits
from tests.support import tiny_vision

KWARGS = frozenset({"enable_thinking", "reasoning_effort", "thinking_budget"})
LIMITS = Limits(KWARGS, vocab_size=1000, max_context=4096, images=True)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def checked(**fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return check(body, RULES["chat"], LIMITS)


def sent(**fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(
        MlxVlmWire("key").encode(checked(**fields), "/models/eye", True)
    )
    return body


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": "x"}, "stop"),
        ({"n": 2}, "n"),
        ({"chat_template_kwargs": {"thinking_budget": 5}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"unheard_of": 5}}, "chat_template_kwargs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
            "tool_choice",
        ),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
    ],
)
def test_what_it_would_ignore_or_not_survive_is_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked(**fields)
    assert refused.value.param == param
    assert param in refused.value.message


def test_what_it_spells_in_another_way_is_sent_in_that_way() -> None:
    assert sent(max_completion_tokens=7, max_tokens=9)["max_tokens"] == 7
    assert sent(chat_template_kwargs={"enable_thinking": True})["enable_thinking"] is True
    assert sent(reasoning_effort="none")["enable_thinking"] is False
    assert sent(reasoning_effort="high")["enable_thinking"] is True
    assert sent(response_format={"type": "text"}, n=1, tool_choice="none").keys() == sent().keys()
    assert sent(tools=[TOOL], tool_choice="auto")["tools"] == [TOOL]


@pytest.mark.parametrize(
    "field",
    [
        "adapter_path", "draft_kind", "resize_shape", "video_url", "output_path", "images",
        "audio_path", "kv_bits", "processor_kwargs", "previous_response_id", "model_dir",
    ],
)  # fmt: skip
def test_no_field_without_a_rule_is_sent(field: str) -> None:
    assert field not in sent(**{field: "/etc/passwd"})


def test_the_conversation_is_not_made_shorter_by_an_extra_generation() -> None:
    given = [{"type": "compaction", "compact_threshold": 1}]
    assert sent(context_management=given)["context_management"] == []


URL = tiny_vision.image()
ELSEWHERE = [
    "http://127.0.0.1:9/a.png",
    "https://x.local/a.png",
    "/etc/passwd",
    "file:///etc/passwd",
    "a.png",
    "ftp://x/a",
    "data:image/png,abc",
    "data:text/plain;base64,QUJD",
]


@pytest.mark.parametrize("url", ELSEWHERE)
@pytest.mark.parametrize(
    "part",
    [
        lambda url: {"type": "image_url", "image_url": {"url": url}},
        lambda url: {"type": "image_url", "image_url": url},
        lambda url: {"type": "input_image", "image_url": url},
        lambda url: {"type": "image", "image": url},
        lambda url: {"type": "image", "url": url},
        lambda url: {"type": "video_url", "video_url": {"url": url}},
        lambda url: {"type": "video", "video": url},
        lambda url: {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        lambda url: {"type": "file", "file": {"file_data": url}},
    ],
)
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_nothing_but_images_that_the_request_brings_is_named_to_it(
    url: str, part: Any, role: str
) -> None:
    content = [{"type": "text", "text": "Hi"}, part(url)]
    with pytest.raises(InvalidRequest):
        checked(messages=[{"role": role, "content": content, "tool_call_id": "1"}])


def test_of_an_image_and_a_message_only_what_is_known_is_sent() -> None:
    image = {"type": "image_url", "image_url": {"url": URL, "path": "/etc/passwd"}, "image": "/x"}
    message = {"role": "user", "content": [image], "images": ["/etc/passwd"], "audio": {"id": "x"}}
    (said,) = sent(messages=[message])["messages"]
    plain = {"type": "image_url", "image_url": {"url": URL}}
    assert said == {"role": "user", "content": [plain]}
