"""Who may call: the rules for keys, Host and Origin as tables.

The tests of standin/network ask over HTTP.
"""

from __future__ import annotations

import hmac
import socket
from typing import Any

import pytest

from mlxproxy.blueprints.auth import Access, own_names
from mlxproxy.errors import HostNotAllowed, InvalidApiKey, OriginNotAllowed, ProxyError

OURS = Access(
    origins=frozenset({"https://chat.example", "chrome-extension://abcdef"}),
    hosts=frozenset({"llm.example"}),
    names=frozenset({"mac", "mac.home"}),
)


def refusal(call: Any, *args: Any) -> ProxyError | None:
    """The error a check ends with, None if it passes."""
    try:
        call(*args)
    except ProxyError as error:
        return error
    return None


# -- Host


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8080",
        "LocalHost:8080",
        "localhost.",
        "localhost.:8080",
        "proxy.localhost:8080",
        "127.0.0.1:8080",
        "192.168.1.5",
        "192.168.1.5:8080",
        "0.0.0.0:8080",
        "[::1]",
        "[::1]:8080",
        "[FE80::1%en0]:8080",
        "[fe80::1%25en0]",
        "mac",
        "MAC:8080",
        "mac.home:8080",
        "mac.local",
        "Living-Room.LOCAL.:8080",
        "host.docker.internal:8080",
        "host.containers.internal",
        "llm.example",
        "LLM.example:443",
        "llm.example.:443",
    ],
)
def test_addresses_and_names_of_this_machine_are_accepted_as_host(host: str) -> None:
    assert refusal(OURS.check_host, host) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "mac.evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "evil.example@127.0.0.1",
        "evilllm.example",
        "sub.llm.example",
        "local",
        "notlocal",
        "evillocal",
        "docker.internal",
        "2130706433",
        "0x7f.1",
        "[evil.example]",
        "127.0.0.1:8080:evil.example",
        ":8080",
        ".",
        " ",
        ".local",
        "..local",
        "a..local",
        ".localhost",
        "localhost..",
        "localhost\xa0",
        "a" * 64 + ".local",
        ("a" * 60 + ".") * 5 + "local",
    ],
)
def test_foreign_host_names_are_rejected(host: str) -> None:
    error = refusal(OURS.check_host, host)
    assert isinstance(error, HostNotAllowed)
    assert "TRUSTED_HOSTS" in error.message


@pytest.mark.parametrize(
    "host",
    ["evil.example, mac.local", "evil.example#.local", "evil.example/.local", "[::1].evil.example"],
)
def test_malformed_hosts_are_rejected(host: str) -> None:
    """Two Host headers arrive as one with a comma; the rest no browser sends."""
    assert isinstance(refusal(OURS.check_host, host), HostNotAllowed)


def test_a_star_in_trusted_hosts_accepts_every_host() -> None:
    assert refusal(Access(hosts=frozenset({"*"})).check_host, "evil.example") is None


def test_the_machines_own_names_include_its_domain_and_its_bonjour_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Mac.Home.Example")
    assert own_names() == {"mac.home.example", "mac", "mac.local"}
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    assert own_names() == frozenset()


# -- Origin


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:3000", "192.168.1.5:8080"),
        ("https://localhost", "localhost:8080"),
        ("http://LOCALHOST:3000", "localhost:8080"),
        ("http://app.localhost:3000", "localhost:8080"),
        ("http://127.0.0.1:5173", "localhost:8080"),
        ("http://127.8.9.1", "localhost:8080"),
        ("http://[::1]:3000", "localhost:8080"),
        ("http://mac:3000", "192.168.1.5:8080"),
        ("http://mac.home", "192.168.1.5:8080"),
        ("http://192.168.1.5:8080", "192.168.1.5:8080"),  # a page of the proxy itself
        ("http://other.local:8080", "other.local:8080"),
        ("https://llm.example", "llm.example"),  # behind a TLS proxy
        ("https://chat.example", "localhost:8080"),
        ("https://CHAT.example", "localhost:8080"),
        ("chrome-extension://abcdef", "localhost:8080"),
    ],
)
def test_pages_of_this_machine_and_of_allowed_origins_are_accepted(origin: str, host: str) -> None:
    assert refusal(OURS.check_origin, origin, host) is None


@pytest.mark.parametrize(
    "origin",
    [
        "tauri://localhost",
        "app://obsidian.md",
        "capacitor://localhost",
        "ionic://localhost",
        "vscode-webview://0f4c7a1e-1b2c",
        "vscode-file://vscode-app",
    ],
)
def test_apps_that_are_made_of_pages_may_call(origin: str) -> None:
    """Under a scheme that no browser opens: no page of the web has such an origin."""
    assert refusal(OURS.check_origin, origin, "192.168.1.5:8080") is None
    assert OURS.allows(origin, "192.168.1.5:8080")


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://chat.example",  # the scheme is part of an origin
        "https://chat.example:8443",  # and the port
        "https://chat.example.evil.example",
        "https://evilchat.example",
        "https://sub.chat.example",
        "null",  # a sandboxed frame, a file
        "",
        "file://",
        "http://",
        "localhost",
        "//localhost",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://localhost@evil.example",
        "http://evil.example, http://localhost",
        "http://192.168.1.5",  # another port of the machine is another origin
        "http://192.168.1.5:3000",
        "http://192.168.1.6:8080",
        "http://other.local:8080",
        "http://0.0.0.0:8080",
        "ftp://localhost",
        "file://localhost",
        "file:///tmp/page.html",
        "data://localhost",
        "blob:http://localhost",
        "moz-extension://0f4c7a1e",
        "web+app://localhost",
        "app://",
        "app:",
        "app://obsidian.md/",
        "app://obsidian.md@evil.example",
        "tauri://localhost https://evil.example",
        "isolated-app://abcdefgh",  # which a browser does open
        "chrome-extension://abcdeg",
        "http://[",
        "http://[::1",
        "http://\u212aocalhost",
        "http://evil\\@localhost",
        "http://localhost\\@evil.example",
        "http://evil.example#@localhost",
        "http://evil.example?@localhost",
        "http://evil.example/@localhost",
        "http://user@localhost",
        "http://localhost/",
        "http://localhost/path",
        "http://localhost:3000x",
        "http://localhost:",
        "http://[::1].evil",
        "http://[::1]evil:80",
        "http://[::1%evil.example]",
        "http://::1",
        "http://localhost\t",
        "http://local\nhost",
        " http://localhost",
        "http:localhost",
        "http:/localhost",
        "http:///localhost",
        "javascript://localhost",
        "http://127.1",
        "http://2130706433",
        "http://0x7f.0.0.1",
        "http://localhost http://evil.example",
    ],
)
def test_pages_of_other_origins_are_rejected(origin: str) -> None:
    error = refusal(OURS.check_origin, origin, "192.168.1.5:8080")
    assert isinstance(error, OriginNotAllowed)
    assert "ALLOWED_ORIGINS" in error.message


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:8080", "mac:8080"])
def test_other_ports_of_this_machine_are_accepted_as_the_same_site(host: str) -> None:
    assert refusal(OURS.check_site, "same-site", host, False) is None
    assert isinstance(refusal(OURS.check_site, "cross-site", host, False), OriginNotAllowed)


@pytest.mark.parametrize("host", ["llm.example", "192.168.1.5:8080", "other.local"])
def test_same_site_requests_to_another_host_are_rejected(host: str) -> None:
    assert isinstance(refusal(OURS.check_site, "same-site", host, False), OriginNotAllowed)
    assert refusal(OURS.check_site, "same-origin", host, False) is None
    assert refusal(Access(origins=frozenset("*")).check_site, "cross-site", host, False) is None


def test_a_request_without_origin_is_accepted() -> None:
    assert refusal(OURS.check_origin, None, "192.168.1.5:8080") is None


def test_a_star_in_allowed_origins_accepts_every_page() -> None:
    access = Access(origins=frozenset({"*"}))
    for origin in ("https://evil.example", "null", "file://"):
        assert refusal(access.check_origin, origin, "localhost:8080") is None


@pytest.mark.parametrize("long", ["a" * 60_000, "\x00\x1b[2J" * 1000])
def test_an_error_quotes_little_of_a_long_host_or_origin(long: str) -> None:
    for error in (
        refusal(OURS.check_host, long),
        refusal(OURS.check_origin, f"http://{long}", "mac"),
    ):
        assert error is not None
        assert len(error.message) < 700
        assert error.message.isprintable()


# -- keys

KEYS = Access(keys=("first-key", "second-key", "schlüssel"))


def as_sent(text: str) -> str:
    """A header as WSGI hands it on: its bytes, read as latin-1."""
    return text.encode().decode("latin-1")


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        ("Bearer first-key", None),
        ("Bearer second-key", None),
        ("bearer first-key", None),
        ("BEARER  first-key ", None),
        (None, "first-key"),
        (None, "second-key"),
        ("", "first-key"),
        ("Basic dXNlcjpwYXNz", "first-key"),  # for a proxy on the way
        (as_sent("Bearer schlüssel"), None),
    ],
)
def test_valid_keys_are_accepted_in_either_header(
    authorization: str | None, x_api_key: str | None
) -> None:
    assert refusal(KEYS.check_key, authorization, x_api_key) is None


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        (None, None),
        ("", ""),
        ("Bearer", None),
        ("Bearer ", None),
        ("first-key", None),
        ("Basic first-key", None),
        ("Bearerfirst-key", None),
        ("Bearer first-ke", None),
        ("Bearer first-keyy", None),
        ("Bearer FIRST-KEY", None),
        ("Bearer first-key,second-key", None),
        ("Bearer first-key, Bearer first-key", None),
        ("Bearer first-key second-key", None),
        (as_sent("Bearer schlussel"), None),
        (None, "first-ke"),
        (None, "Bearer first-key"),
        ("Bearer wrong", "first-key"),  # the wrong one was meant
        ("Bearer \xff\xfe", None),
    ],
)
def test_invalid_keys_are_rejected(authorization: str | None, x_api_key: str | None) -> None:
    error = refusal(KEYS.check_key, authorization, x_api_key)
    assert isinstance(error, InvalidApiKey)
    assert "wrong" not in error.message
    assert "first" not in error.message


def test_without_a_key_set_every_request_is_accepted() -> None:
    assert refusal(Access().check_key, None, None) is None
    assert refusal(Access().check_key, "Bearer whatever", None) is None


@pytest.mark.parametrize("given", ["first-key", "second-key", "no-key"])
def test_every_key_is_compared_in_constant_time(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key is compared, whichever fits, and by the function that is made for it."""
    compared: list[bytes] = []
    original = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return original(left, right)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    refusal(KEYS.check_key, f"Bearer {given}", None)
    assert compared == [key.encode() for key in KEYS.keys]
