"""The other dialects over a scripted stand-in: answers, errors, loads, and clients that leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from tests.support import scripted_server, strict_readers
from tests.support.chat_wire import events
from tests.support.proxy import Proxy
from tests.support.waiting import until

Json = dict[str, Any]
USER = [{"role": "user", "content": "Hello!"}]


class Dialect(NamedTuple):
    """How one dialect asks, and how its answers are read."""

    path: str
    body: Json
    read: Callable[[bytes], Json]  # a stream to its end, as its strictest client does
    said: Callable[[Json], str]  # the text of a whole answer
    problem: Callable[[Json], str]  # the message of an error
    failed: Callable[[bytes], str]  # the message that a stream ends with
    waits: bytes  # what a stream has in it while a model is being loaded


def last_line(data: bytes) -> Json:
    line: Json = json.loads(data.strip().rpartition(b"\n")[2].removeprefix(b"data: "))
    return line


def chat_completion(data: bytes) -> Json:
    """The answer of a stream of chunks, with its statistics at the end."""
    assert data.endswith(b"data: [DONE]\n\n")
    lines = [line for line in data.split(b"\n") if line.startswith(b"data: {")]
    chunks = [json.loads(line[6:]) for line in lines]
    assert chunks[-1]["stats"]["stop_reason"] == "eosFound"
    assert chunks[-1]["model_info"]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    return {"choices": [{"message": {"content": said}}]}


def failure_of_v1(data: bytes) -> str:
    """The message of the event before the last, which is the end of what there is."""
    *_, error, end = events(data)
    assert end["type"] == "chat.end"
    return str(error["error"]["message"])


DIALECTS = {
    "anthropic": Dialect(
        "/v1/messages",
        {"messages": USER, "max_tokens": 1000},
        strict_readers.anthropic_message,
        lambda whole: "".join(block.get("text", "") for block in whole["content"]),
        lambda body: str(body["error"]["message"]) if body["type"] == "error" else "",
        lambda data: str(last_line(data)["error"]["message"]),
        b": loading ",
    ),
    "responses": Dialect(
        "/v1/responses",
        {"input": "Hello!"},
        strict_readers.response,
        lambda whole: "".join(
            part["text"]
            for item in whole["output"]
            if item["type"] == "message"
            for part in item["content"]
        ),
        lambda body: str(body["error"]["message"]),
        lambda data: str(last_line(data)["response"]["error"]["message"]),
        b"event: ",
    ),
    "ollama": Dialect(
        "/api/chat",
        {"messages": USER},
        strict_readers.ollama_answer,
        lambda whole: str(whole["message"]["content"]),
        lambda body: str(body["error"]),
        lambda data: str(last_line(data)["error"]),
        b'"content":""',
    ),
    "lmstudio-v0": Dialect(
        "/api/v0/chat/completions",
        {"messages": USER},
        chat_completion,
        lambda whole: str(whole["choices"][0]["message"]["content"]),
        lambda body: str(body["error"]["message"]),
        lambda data: str(last_line(data)["error"]["message"]),
        b": loading ",
    ),
    "lmstudio-v1": Dialect(
        "/api/v1/chat",
        {"input": "Hello!"},
        strict_readers.lmstudio_result,
        lambda whole: "".join(
            part["content"] for part in whole["output"] if part["type"] == "message"
        ),
        lambda body: str(body["error"]["message"]),
        failure_of_v1,
        b"event: model_load.start",
    ),
}


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return DIALECTS[request.param]


@pytest.fixture
def scripted(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> Callable[..., tuple[Proxy, Path]]:
    """Starts a proxy that loads what requests name, over a stand-in with that script."""

    def starter(**script: Any) -> tuple[Proxy, Path]:
        program = scripted_server.install(tmp_path / "standin", **script)
        settings = {"MLX_SERVER_BIN": program, "MODEL_SELECTION": "requested"}
        return start(models, **settings), program

    return starter


def post(proxy: Proxy, dialect: Dialect, **fields: Any) -> requests.Response:
    body = {"model": "tiny/alpha", "stream": False, **dialect.body, **fields}
    streams = body["stream"]
    return requests.post(proxy.url + dialect.path, json=body, stream=streams, timeout=30)


def test_a_whole_answer(dialect: Dialect, scripted: Any) -> None:
    proxy, _ = scripted(events=3)
    answer = post(proxy, dialect)
    assert answer.status_code == 200, answer.text
    assert dialect.said(answer.json()) == "alpha0 alpha1 alpha2 "
    assert "tiny/alpha" in answer.text


def test_a_stream_and_a_load_while_it_waits(dialect: Dialect, scripted: Any) -> None:
    proxy, _ = scripted(events=3, thoughts=1, load_seconds=3.0)
    data = post(proxy, dialect, stream=True).content
    assert dialect.waits in data
    assert dialect.said(dialect.read(data)) == "alpha1 alpha2 "


def test_an_error_before_a_stream_has_the_dialects_shape(dialect: Dialect, scripted: Any) -> None:
    proxy, _ = scripted(load_failure="the weights are broken")
    answer = post(proxy, dialect, stream=True)
    assert answer.status_code == 500, answer.text
    assert "the weights are broken" in dialect.problem(answer.json())
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_errors_of_the_hooks_have_the_dialects_shape(
    dialect: Dialect, scripted: Any, method: str
) -> None:
    proxy, _ = scripted()
    for path, status in (
        (dialect.path, 405 if method == "PUT" else 400),
        (dialect.path + "/compact", 404),
    ):
        answer = requests.request(method, proxy.url + path, data=b"{", timeout=30)
        assert answer.status_code == status, path
        assert dialect.problem(answer.json())


def test_an_error_inside_a_stream_is_its_last_word(dialect: Dialect, scripted: Any) -> None:
    proxy, _ = scripted(events=8, drop_after=2, interval=0.1)
    data = post(proxy, dialect, stream=True).content
    assert b"alpha1" in data
    assert "closed the connection" in dialect.failed(data)


def test_a_client_that_leaves_ends_the_generation(dialect: Dialect, scripted: Any) -> None:
    proxy, program = scripted(events=10_000, interval=0.05)
    with post(proxy, dialect, stream=True) as answer:
        next(answer.iter_content(1))

    def ended() -> list[Json]:
        finished = scripted_server.record(program, "finished")
        return [event for event in finished if event["how"] != "done"]

    assert until(ended, what="the generation's end")[0]["events"] < 1000


def test_a_field_that_cannot_be_is_refused_by_the_clients_name_of_it(scripted: Any) -> None:
    proxy, _ = scripted()
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    answer = post(proxy, DIALECTS["anthropic"], output_config={"format": schema})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("output_config.format ")
    assert answer.headers["request-id"] == answer.headers["X-Request-Id"]


SCHEMAS: dict[str, Json] = {
    "anthropic": {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
    "responses": {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
    "ollama": {"format": {"type": "object"}},
    "lmstudio-v0": {"response_format": {"type": "json_object"}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_that_this_backend_cannot_keep_to_is_never_ignored(
    scripted: Any, name: str, stream: bool
) -> None:
    proxy, program = scripted()
    answer = post(proxy, DIALECTS[name], stream=stream, **SCHEMAS[name])
    assert "cannot be enforced by this backend; `mlxproxy doctor` says what" in answer.text
    assert stream or answer.status_code == 400
    asked = scripted_server.record(program, "request")
    assert not any("Hello!" in json.dumps(request["body"]) for request in asked)


def test_effort_is_given_up_where_a_model_cannot_think(scripted: Any) -> None:
    proxy, _ = scripted(events=1)
    answer = post(proxy, DIALECTS["anthropic"], thinking={"type": "enabled", "budget_tokens": 1024})
    assert answer.status_code == 200
    assert "X-Mlxproxy-Warning" not in answer.headers


def test_tokens_are_counted(scripted: Any) -> None:
    proxy, _ = scripted()
    counted = {"model": "x", "messages": [{"role": "user", "content": "x" * 400}]}
    answer = requests.post(f"{proxy.url}/v1/messages/count_tokens", json=counted, timeout=30)
    assert 90 < answer.json()["input_tokens"] < 120


def test_an_answer_of_responses_is_kept_gone_on_from_and_forgotten(scripted: Any) -> None:
    proxy, program = scripted(events=2)
    responses = DIALECTS["responses"]
    first = post(proxy, responses).json()
    path = f"/v1/responses/{first['id']}"
    assert proxy.get(path).json()["output"] == first["output"]
    (item,) = proxy.get(f"{path}/input_items").json()["data"]
    assert "Hello!" in json.dumps(item)
    assert post(proxy, responses, previous_response_id=first["id"]).status_code == 200
    sent = scripted_server.record(program, "request")[-1]["body"]
    sent = json.loads(sent) if isinstance(sent, str) else sent
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert requests.delete(proxy.url + path, timeout=30).json()["deleted"] is True
    assert proxy.get(path).status_code == 404
    gone = post(proxy, responses, previous_response_id=first["id"])
    assert gone.json()["error"]["code"] == "previous_response_not_found"


def test_a_chat_of_lm_studio_goes_on_from_its_id(scripted: Any) -> None:
    proxy, _ = scripted(events=2)
    first = post(proxy, DIALECTS["lmstudio-v1"]).json()
    again = post(proxy, DIALECTS["lmstudio-v1"], previous_response_id=first["response_id"])
    assert again.status_code == 200
    assert proxy.get(f"/v1/responses/{first['response_id']}").status_code == 404


def test_ollamas_keep_alive_loads_and_unloads(scripted: Any) -> None:
    proxy, _ = scripted()
    loaded = proxy.post("/api/generate", {"model": "tiny/alpha:latest", "keep_alive": "90s"})
    assert (loaded.json()["done_reason"], loaded.json()["model"]) == ("load", "tiny/alpha")
    (running,) = proxy.get("/api/ps").json()["models"]
    assert running["name"] == "tiny/alpha"
    assert proxy.loaded()["options"]["ttl"] == 90
    unloaded = proxy.post("/api/chat", {"model": "tiny/alpha", "messages": [], "keep_alive": 0})
    assert unloaded.json()["done_reason"] == "unload"
    assert proxy.get("/api/ps").json() == {"models": []}


@pytest.mark.parametrize(
    ("path", "body", "waits", "ends"),
    [
        ("/api/generate", {}, '"response":"","done":false', '"done_reason":"load"'),
        ("/api/chat", {"messages": []}, '"content":""},"done":false', '"done_reason":"load"'),
        ("/v1/responses", {"input": ""}, '"response.in_progress"', '"response.completed"'),
    ],
)
def test_a_stream_that_only_loads_tells_that_it_goes_on(
    path: str, body: Json, waits: str, ends: str, scripted: Any
) -> None:
    proxy, _ = scripted(load_seconds=3.0)
    answer = proxy.post(path, {"model": "tiny/alpha", "stream": True, **body})
    lines = [line for line in answer.text.splitlines() if "{" in line]
    assert any(waits in line for line in lines[:-1])
    assert ends in lines[-1]
    assert "tiny/alpha" in lines[-1]
    assert proxy.health()["backend"] == "ok"
    assert proxy.loaded()["in_flight"] == 0
    again = proxy.post(path, {"model": "tiny/alpha", "stream": True, **body}).text
    assert ends in again


def test_a_stream_that_only_loads_ends_with_the_reason_why_it_failed(scripted: Any) -> None:
    proxy, _ = scripted(load_seconds=3.0, load_failure="the weights are broken")
    answer = proxy.post("/api/generate", {"model": "tiny/alpha", "stream": True})
    assert answer.status_code == 200
    assert "the weights are broken" in json.loads(answer.text.splitlines()[-1])["error"]


def test_a_client_that_leaves_a_load_withdraws_it(scripted: Any) -> None:
    proxy, _ = scripted(load_seconds=60.0)
    body = {"model": "tiny/alpha", "stream": True}
    with requests.post(proxy.url + "/api/generate", json=body, stream=True, timeout=30) as answer:
        next(answer.iter_content(1))
    until(lambda: proxy.loaded()["waiting"] == 0, what="the end of the wait")


def test_an_answer_states_the_load_that_it_waited_for(scripted: Any) -> None:
    proxy, _ = scripted(events=1, load_seconds=0.5)

    def durations() -> tuple[int, int]:
        told = post(proxy, DIALECTS["ollama"]).json()
        return told["load_duration"], told["total_duration"]

    loaded, total = durations()
    assert 500_000_000 <= loaded <= total
    assert durations()[0] == 1, "nothing was loaded, and clients divide"
    proxy.unload()
    first, second = (post(proxy, DIALECTS["lmstudio-v1"]).json()["stats"] for _ in range(2))
    assert first["model_load_time_seconds"] >= 0.5
    assert "model_load_time_seconds" not in second
    proxy.unload()
    data = post(proxy, DIALECTS["ollama"], stream=True).content
    assert json.loads(data.splitlines()[-1])["load_duration"] >= 500_000_000


def test_ollama_lists_what_there_is(scripted: Any) -> None:
    proxy, _ = scripted()
    names = [model["name"] for model in proxy.get("/api/tags").json()["models"]]
    assert names == [model["id"] for model in proxy.get("/v1/models").json()["data"]]
    assert proxy.post("/api/show", {"model": names[0]}).json()["details"]["family"]
    assert proxy.post("/api/pull", {"name": names[0] + ":latest"}).json() == {"status": "success"}
    assert proxy.post("/api/pull", {"name": "no/such"}).status_code == 404
    refused = proxy.post("/api/embed", {"model": names[0], "input": "Hi"})
    assert "does not answer /v1/embeddings" in refused.json()["error"]
    assert proxy.get("/api/version").json()["version"]
    assert requests.head(proxy.url + "/api/tags", timeout=30).status_code == 200


def test_lm_studio_lists_loads_and_unloads(scripted: Any) -> None:
    proxy, _ = scripted()
    loaded = proxy.post("/api/v1/models/load", {"model": "tiny/alpha", "echo_load_config": True})
    assert loaded.json()["status"] == "loaded"
    assert proxy.get("/api/v0/models/tiny/alpha").json()["state"] == "loaded"
    told = {model["key"]: model for model in proxy.get("/api/v1/models").json()["models"]}
    assert told["tiny/alpha"]["loaded_instances"]
    unloaded = proxy.post("/api/v1/models/unload", {"instance_id": "tiny/alpha"})
    assert unloaded.json() == {"instance_id": "tiny/alpha"}
    states = {model["state"] for model in proxy.get("/api/v0/models").json()["data"]}
    assert states == {"not-loaded"}


def test_both_sdks_read_the_list_of_models(scripted: Any) -> None:
    proxy, _ = scripted()
    listing = proxy.get("/v1/models").json()
    entries = listing["data"]
    assert listing["has_more"] is False
    assert (listing["first_id"], listing["last_id"]) == (entries[0]["id"], entries[-1]["id"])
    assert entries[0]["display_name"] == entries[0]["id"].rpartition("/")[2]
    assert entries[0]["created_at"].endswith("+00:00")


def test_chat_takes_what_clients_get_wrong_and_tells_its_reasoning_in_both_spellings(
    scripted: Any,
) -> None:
    proxy, program = scripted(events=3, thoughts=2)
    call = {"id": "call_1", "type": "function", "function": {"name": "ls", "arguments": "{bro"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        *USER,
        {"role": "assistant", "content": None, "thinking": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a"},
        {"role": "system", "content": "Late."},
    ]
    answer = proxy.post("/v1/chat/completions", {"model": "tiny/alpha", "messages": messages})
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "thought0 thought1 "
    sent = scripted_server.record(program, "request")[-1]["body"]
    sent = json.loads(sent) if isinstance(sent, str) else sent
    roles = [message["role"] for message in sent["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    assert sent["messages"][2]["reasoning_content"] == "Hm."
    assert "bro" not in json.dumps(sent)


def test_each_event_of_a_chat_carries_its_reasoning_in_both_spellings(scripted: Any) -> None:
    proxy, _ = scripted(events=3, thoughts=2)
    body = {"model": "tiny/alpha", "messages": USER, "stream": True}
    answer = proxy.post("/v1/chat/completions", body)
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    thoughts = [delta["reasoning"] for delta in deltas if "reasoning" in delta]
    assert "".join(thoughts) == "thought0 thought1 "
    assert [delta.get("reasoning_content") for delta in deltas] == [
        delta.get("reasoning") for delta in deltas
    ]


def test_a_body_nested_too_deeply_is_refused_and_not_a_fault(
    dialect: Dialect, scripted: Any
) -> None:
    proxy, _ = scripted()
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    answer = post(proxy, dialect, metadata={"deep": deep})
    assert answer.status_code == 400
    assert "nested" in dialect.problem(answer.json())
