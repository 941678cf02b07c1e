"""No prompt, answer or key is in any log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.support import scripted_server
from tests.support.network import ALICE, BOB, CARLA, PROMPT, WRONG, ask, chat, written
from tests.support.proxy import Proxy


def test_no_prompt_or_answer_is_in_any_log(proxy: Proxy, script: Callable[..., None]) -> None:
    said = {"role": "user", "content": PROMPT}
    for fields in (
        {},
        {"stream": True},
        {"temperature": PROMPT},
        {"stop": [PROMPT]},
        {"messages": [said, {"role": PROMPT, "content": PROMPT}]},
        {"tools": [{"type": "function", "function": {"name": PROMPT, "description": PROMPT}}]},
        {"chat_template_kwargs": {PROMPT: PROMPT}},
        {"model": PROMPT},
    ):
        assert chat(proxy, **{"messages": [said], **fields}).content
    script(error=f"the template does not take {PROMPT}")
    assert not chat(proxy, messages=[said]).ok
    script(error=None, drop_after=2)
    assert not chat(proxy, messages=[said]).ok
    script(drop_after=None)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models/load"):
        answer = ask(proxy, "POST", path, data=f'{{"prompt": "{PROMPT}"')
        assert answer.status_code == 400
        assert PROMPT not in answer.text
    assert ask(proxy, "POST", "/v1/completions", json={"prompt": PROMPT}).ok
    everything = written(proxy)
    assert PROMPT not in everything
    assert "alpha0" not in everything, "the answers' first word"


def test_a_key_is_never_logged_nor_given_to_the_backend(proxy: Proxy, program: Path) -> None:
    ask(proxy, "GET", f"/v1/models?api_key={ALICE}")
    ask(proxy, "GET", "/v1/models", None, headers={"x-api-key": WRONG})
    assert chat(proxy, CARLA).ok
    assert chat(proxy, "", headers={"x-api-key": BOB, "Authorization": ""}).ok
    events = proxy.get("/v1/events?follow=false", headers={"Authorization": f"Bearer {ALICE}"})
    everything = {
        "the logs": written(proxy),
        "the snapshot": events.text,
        "the backend's command line, environment and requests": json.dumps(
            scripted_server.record(program)
        ),
        "the files of the instance folder": "".join(
            file.read_text(errors="replace") for file in proxy.instance.rglob("*") if file.is_file()
        ),
    }
    assert '"environment"' in everything["the backend's command line, environment and requests"]
    for place, text in everything.items():
        for key in (ALICE, BOB, CARLA, WRONG):
            assert key not in text, place
