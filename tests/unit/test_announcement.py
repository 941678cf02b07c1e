"""The start says who can reach what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlxproxy import main
from mlxproxy.blueprints.auth import Access
from tests.support.model_folders import catalog_of


@pytest.mark.parametrize(
    ("host", "keys", "told"),
    [
        ("0.0.0.0", (), True),
        ("192.168.1.5", (), True),
        ("::", (), True),
        ("127.0.0.1", (), False),
        ("::1", (), False),
        ("0.0.0.0", ("k",), False),
    ],
)
def test_the_startup_message_warns_of_an_open_port_without_a_key(
    host: str, keys: tuple[str, ...], told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    parts: Any = SimpleNamespace(catalog=catalog_of(()), roots=(), access=Access(keys=keys))
    main._announce(parts, (host, 8080))
    said = capsys.readouterr().out
    assert ("anyone on your network" in said) is told
    assert ("API_KEY" in said) is told
    assert "k" not in keys or "Bearer $KEY" in said
