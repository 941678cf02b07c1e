"""The commands' HTTP client: requests, server-sent events, and errors as one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any, NamedTuple

import click
import requests

from mlxproxy import settings
from mlxproxy.text import harmless

CONNECT = 5.0  # seconds
READ = 30.0
# The server's advice is meant for HTTP clients; these are the equivalent commands.
AS_COMMANDS = {
    "GET /v1/models": "`mlxproxy ls`",
    "POST /v1/models/load": "`mlxproxy load`",
    "POST /v1/models/unload": "`mlxproxy unload`",
    '"force": true': "`--force`",
    'with "pin": false': "without `--pin`",
}
SILENCE = 60.0  # seconds without data in a stream; a comment arrives at least every 15 s


class ClientError(click.ClickException):
    """The reason why a command cannot do its work, as a sentence; the exit status is 1."""

    def __init__(self, message: str) -> None:
        super().__init__(harmless(message))


class Unreachable(ClientError):
    """No server answers."""


class Refused(ClientError):
    """An error response from the server.

    Attributes:
        code: the error's code in the contract, such as ``model_not_found``.
    """

    def __init__(self, error: dict[str, Any]) -> None:
        self.code = error.get("code")
        message = str(error.get("message") or "The server gave no reason.")
        for call, command in AS_COMMANDS.items():
            message = message.replace(call, command)
        if self.code == "invalid_api_key":
            message += " Give the key with --key or MLXPROXY_API_KEY."
        super().__init__(message)


class Event(NamedTuple):
    """A server-sent event; comments have the kind ``comment``."""

    kind: str
    data: str

    def json(self) -> dict[str, Any]:
        """Return the data as an object, or an empty object if it isn't one."""
        try:
            value = json.loads(self.data)
        except ValueError:
            value = None
        return value if isinstance(value, dict) else {}


class Client:
    """The client of one server.

    Args:
        url: without a trailing slash.
        key: the API key, if the server needs one.
        is_own: whether this is the server that this machine's settings describe.
    """

    def __init__(self, url: str, key: str | None = None, is_own: bool = False) -> None:
        self.url = url
        self.key = key
        self.is_own = is_own
        self._session = requests.Session()
        # Proxy variables and .netrc are meant for the web, not for a machine at home.
        self._session.trust_env = False
        if key:
            # As bytes: `requests` would send Latin-1, and the server compares UTF-8.
            self._session.headers["Authorization"] = f"Bearer {key}".encode()

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path.

        Raises:
            ClientError: there is no server, or it rejects the request.
        """
        return self._object(self._send("GET", path, None, READ, stream=False))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the response to a JSON body, however long it takes.

        Raises:
            ClientError: there is no server, or it rejects the request.
        """
        return self._object(self._send("POST", path, body, None, stream=False))

    def text(self, path: str) -> str:
        """Return the text at a path.

        Raises:
            ClientError: there is no server, or it rejects the request.
        """
        return self._send("GET", path, None, READ, stream=False).content.decode("utf-8", "replace")

    def events(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Generator[Event, None, None]:
        """Yield the events of a stream as they arrive.

        Raises:
            ClientError: there is no server, it rejects the request, or the connection breaks.
        """
        with self._send(method, path, body, SILENCE, stream=True) as response:
            kind = "message"
            data: list[str] = []
            try:
                for raw in response.iter_lines():
                    line = raw.decode("utf-8", "replace")
                    name, _, value = line.partition(":")
                    value = value.removeprefix(" ")
                    if not line:
                        if data:
                            yield Event(kind, "\n".join(data))
                        kind, data = "message", []
                    elif not name:
                        yield Event("comment", value)
                    elif name == "event":
                        kind = value
                    elif name == "data":
                        data.append(value)
            except requests.RequestException:
                raise ClientError(f"The connection to {self.url} was lost.") from None

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None, wait: float | None, stream: bool
    ) -> requests.Response:
        try:
            response = self._session.request(
                method, self.url + path, json=body, stream=stream, timeout=(CONNECT, wait)
            )
        except requests.exceptions.ReadTimeout:
            raise ClientError(f"{self.url} did not answer within {wait:g} s.") from None
        except requests.exceptions.SSLError as error:
            raise ClientError(
                f"A secure connection to {self.url} could not be established: {error}."
            ) from None
        except (requests.ConnectionError, requests.Timeout):
            raise Unreachable(
                f"mlxproxy is not running at {self.url}. Start it there with `make run` or "
                "`mlxproxy serve`, or choose another server with --host."
            ) from None
        except (requests.RequestException, UnicodeError):
            raise ClientError(f"{self.url} is not a valid server address.") from None
        if not response.ok:
            raise self._refusal(response)
        return response

    def _refusal(self, response: requests.Response) -> ClientError:
        try:
            error = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            error = None
        return Refused(error) if isinstance(error, dict) else self._stranger()

    def _object(self, response: requests.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._stranger()
        return answer

    def _stranger(self) -> ClientError:
        return ClientError(
            f"The server at {self.url} is not mlxproxy. Choose the right server with --host."
        )


def connect(host: str | None, key: str | None) -> Client:
    """Return a client for the requested server, without sending anything yet.

    Args:
        host: a name or address, one with a port, or a URL; None: this machine's server, at the
            address in its settings.
        key: its API key, or several separated by commas, of which the first is used; None: for
            this machine's server, the key in its settings.

    Raises:
        ClientError: the settings are wrong; they are read only for what is not given.
    """
    key = key.split(",")[0].strip() if key else None
    if host is not None and "://" in host:
        return Client(host.rstrip("/").removesuffix("/v1"), key)
    try:
        own = settings.load()
        if host is None and key is None:
            key = next(iter(own.keys), None)
    except settings.SettingError as error:
        raise ClientError(str(error)) from None
    if host is None:
        return Client(own.local_url, key, is_own=True)
    host = host.rstrip("/")
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"  # IPv6
    if not re.search(r":\d+$", host):
        host = f"{host}:{own.proxy_port}"
    return Client(f"http://{host}", key)
