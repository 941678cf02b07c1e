"""A second port, for Ollama's clients that cannot be told an address of their own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from tests.support import scripted_server
from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.waiting import until


@pytest.fixture
def serve(tmp_path: Path, models: Path, start: Callable[..., Proxy]) -> Callable[..., Proxy]:
    def starter(**settings: object) -> Proxy:
        program = scripted_server.install(tmp_path / "standin")
        settings.setdefault("OLLAMA_PORT", free_port())
        return start(models, MLX_SERVER_BIN=program, **settings)

    return starter


def at_ollamas(proxy: Proxy) -> str:
    return f"http://127.0.0.1:{proxy.environment['MLXPROXY_OLLAMA_PORT']}"


def test_ollamas_own_address_answers_as_ollama_does(serve: Callable[..., Proxy]) -> None:
    proxy = serve()
    url = at_ollamas(proxy)
    assert requests.get(url, timeout=5).text == "Ollama is running"
    assert requests.head(url, timeout=5).ok
    assert "mlxproxy is running" in proxy.get("/").text
    announced = f"Ollama's clients find it on port {url.rpartition(':')[2]}"
    until(lambda: announced in proxy.said(), 5, "the port in the announcement")
    names = [model["name"] for model in requests.get(url + "/api/tags", timeout=5).json()["models"]]
    assert names == ["tiny/alpha", "tiny/beta"]
    body = {"model": names[0], "messages": [{"role": "user", "content": "Hello!"}], "stream": False}
    assert requests.post(url + "/api/chat", json=body, timeout=30).json()["done"] is True
    chat = {**body, "max_tokens": 3}  # VS Code finds the models as Ollama's, and chats like this
    assert requests.post(url + "/v1/chat/completions", json=chat, timeout=30).ok


def test_the_second_port_has_the_same_keys_and_hosts(serve: Callable[..., Proxy]) -> None:
    url = at_ollamas(serve(API_KEY="secret"))
    assert requests.get(url + "/api/tags", timeout=5).status_code == 401
    key = {"Authorization": "Bearer secret"}
    assert requests.get(url + "/api/tags", headers=key, timeout=5).ok
    foreign = {**key, "Host": "evil.example"}
    assert requests.get(url + "/api/tags", headers=foreign, timeout=5).status_code == 403


def test_a_stop_closes_both_ports_and_ends_the_answers_of_both(serve: Callable[..., Proxy]) -> None:
    proxy = serve(DRAIN_TIMEOUT=0.1)
    url = at_ollamas(proxy)
    answered: list[str] = []
    body = {"model": "tiny/alpha", "messages": [{"role": "user", "content": "Hello!"}]}
    with requests.post(url + "/api/chat", json=body, stream=True, timeout=30) as answer:
        reader = threading.Thread(target=lambda: answered.append(answer.text))
        reader.start()
        assert proxy.stop() == 0
        reader.join(10)
    assert answered[0].endswith("\n"), "the last line is whole"
    for port in (proxy.port, int(url.rpartition(":")[2])):
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0


def test_without_the_setting_there_is_one_port(models: Path, start: Callable[..., Proxy]) -> None:
    proxy = start(models)
    assert proxy.process is not None
    connections = psutil.Process(proxy.process.pid).net_connections("tcp")
    listening = [each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN]
    assert listening == [proxy.port]
