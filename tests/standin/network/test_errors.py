"""Errors tell the truth, and no secrets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.network import PLACE, PROMPT, ask, chat
from tests.support.proxy import Proxy
from tests.support.raw_http import shape


@pytest.mark.parametrize(
    ("status", "text", "expected", "code"),
    [
        (404, "Conversation roles must alternate user/assistant", 400, "invalid_request"),
        (404, "No user query found in messages.", 400, "invalid_request"),
        (404, "'dict object' has no attribute 'x' in the chat template", 400, "invalid_request"),
        (404, "Only 'text' content type is supported.", 400, "invalid_request"),
        (404, "text input must be of type `str`", 500, "internal_error"),
        (404, f"[Errno 2] No such file or directory: '{PLACE}'", 500, "internal_error"),
        (404, "[metal] the toolkit sent the message: out of memory", 500, "internal_error"),
        (404, "", 500, "internal_error"),
        (400, "max_tokens must be a positive integer", 400, "invalid_request"),
        (411, "Content-Length header is required", 502, "backend_failed"),
        (500, f"broken at {PLACE}", 502, "backend_failed"),
        (500, "no message could be read", 502, "backend_failed"),
        (503, "the tool thread is gone", 502, "backend_failed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_backends_errors_get_the_correct_status(
    proxy: Proxy,
    script: Callable[..., None],
    status: int,
    text: str,
    expected: int,
    code: str,
    stream: bool,
) -> None:
    script(error=text, error_status=status)
    answer = chat(proxy, stream=stream)
    assert (answer.status_code, shape(answer.json())["code"]) == (expected, code)
    assert PLACE not in answer.text


@pytest.mark.parametrize(
    "text",
    [
        f"cannot open {PLACE}",
        f"'{PLACE}'",
        f"(at {PLACE}:3)",
        f"file://{PLACE}",
        f"cannot open {PLACE} x/My Disk/opt/private/y",
        "cannot open /Volumes/My Private Disk/opt/private/y",
        f'Traceback (most recent call last):\n  File "{PLACE}.py", line 3, in f\nKeyError: 5',
        f"unusual token near {PROMPT!r}",
    ],
)
def test_the_backends_errors_are_passed_on_without_paths_traceback_or_prompt(
    proxy: Proxy, script: Callable[..., None], text: str
) -> None:
    for status in (404, 400, 500):
        script(error=text, error_status=status)
        messages = [{"role": "user", "content": f"Say {PROMPT} twice"}]
        for stream in (False, True):
            answer = chat(proxy, messages=messages, stream=stream)
            assert not answer.ok
            for secret in ("opt", "private", "Private Disk", "Traceback", "line 3", PROMPT):
                assert secret not in answer.text, answer.text


def test_a_backend_that_violates_the_protocol_gives_502(
    proxy: Proxy, script: Callable[..., None]
) -> None:
    for fault in ("garbled_after", "drop_after"):
        script(**{"events": 3, "garbled_after": None, fault: 1})
        answer = chat(proxy)
        assert (answer.status_code, shape(answer.json())["code"]) == (502, "backend_failed"), fault


@pytest.mark.parametrize("path", [f"'{PLACE}/a b.metallib'", "/Volumes/My Disk/opt/private/x"])
@pytest.mark.parametrize("fault", ["program", "load", "death"])
def test_no_path_is_in_an_error_about_the_backend_itself(
    proxy: Proxy, program: Path, script: Callable[..., None], models: Path, fault: str, path: str
) -> None:
    reason = f"[Errno 5] cannot read {path}"
    told = []
    try:
        if fault == "death":
            script(events=3, interval=0.2, generation_dies_after=1, generation_dies_of=reason)
            # The events before it carry the model's path, as the backend itself sends it.
            told.append(chat(proxy, stream=True).text.rpartition("data: ")[2])
            script(generation_dies_after=None)
        else:
            if fault == "program":
                program.chmod(0o644)
            else:
                script(load_failure=reason)
            told.append(ask(proxy, "POST", "/v1/models/load", json={"model_id": "tiny/beta"}).text)
            told.append(chat(proxy).text)
    finally:
        program.chmod(0o755)
    assert all("error" in text for text in told)
    for secret in (PLACE, "/opt", " Disk", str(models), str(program.parent)):
        assert secret not in "".join(told)


def test_an_error_does_not_refer_to_a_log_that_says_nothing_about_it(
    proxy: Proxy, script: Callable[..., None]
) -> None:
    """`mlx_lm.server` logs nothing of what it answers with 404."""
    script(error="[broadcast_shapes] Shapes (1,2) and (3,4) cannot be broadcast.")
    message = shape(chat(proxy).json())["message"]
    assert "log" not in message.lower() or "LOG_LEVEL=DEBUG" in message
