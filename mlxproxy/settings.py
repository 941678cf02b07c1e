"""Every setting, defined once: its name, type, default and meaning.

Sources, in order of increasing precedence: the defaults below, ``config.py`` in the instance
folder, the environment (``MLXPROXY_<NAME>``), the flags of the command line. The README's table,
``serve --help`` and ``instance/config.example.py`` are generated from or checked against this file.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from mlxproxy.files import MB, Missing, Unreadable, read_text
from mlxproxy.instance import Instance

T = TypeVar("T")
P = TypeVar("P")
MOST_LOADED = 8  # models; each has a port, and the choice of what to evict examines every group
Table = tuple[tuple[str, Mapping[str, Any]], ...]  # a name or a pattern, and its options
ENV_PREFIX = "MLXPROXY_"
HTTP_PORT = 80
CLIENT_VARIABLES = {"MLXPROXY_URL"}  # read by the commands that talk to a server, not by the server


class SettingError(ValueError):
    """A setting has a value that is not allowed; the message is the sentence for the user."""


@dataclass(frozen=True)
class Peer:
    """Another machine with an mlxproxy of its own.

    Attributes:
        name: what follows the @ in the names of its models.
        key: the API key that it asks for; None: none.
    """

    name: str
    host: str
    port: int
    key: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def authorization(self) -> str:
        """The value of that header for it: its own key, never ours or a client's; or nothing."""
        return "" if self.key is None else f"Bearer {self.key}"


@dataclass(frozen=True)
class Parser(Generic[T]):
    """How a value is read, from text or from a Python value.

    Attributes:
        read: returns the value, or raises ValueError with a phrase that says what is allowed.
        metavar: the placeholder for the value in a flag's help.
    """

    read: Callable[[Any], T]
    metavar: str

    def __call__(self, value: Any) -> T:
        return self.read(value)


def _shown_as(metavar: str) -> Callable[[Callable[[Any], T]], Parser[T]]:
    return lambda read: Parser(read, metavar)


def _setting(default: T, parse: Parser[T], meaning: str, **extra: Any) -> T:
    """Return a field of Settings."""
    metadata = {"parse": parse, "meaning": meaning, **extra}
    return field(default=default, metadata=metadata)


# -- parsers


@_shown_as("PORT")
def _port(value: Any) -> int:
    return _whole(1, 65535, "a port number from 1 to 65535")(value)


@_shown_as("PORT")
def _optional_port(value: Any) -> int | None:
    text = "" if value is None else str(value).strip().lower()
    return None if text in ("", "none") else _port(value)


def _whole(low: int, high: int, allowed: str) -> Parser[int]:
    @_shown_as("INTEGER")
    def parse(value: Any) -> int:
        try:
            number = int(str(value).strip())
        except ValueError:
            raise ValueError(allowed) from None
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError(allowed)
        return number

    return parse


def _whole_or_auto(low: int, high: int, allowed: str) -> Parser[int]:
    """Return a parser for a whole number, or 0 for `auto`."""
    whole = _whole(low, high, allowed)

    @_shown_as("INTEGER|auto")
    def parse(value: Any) -> int:
        return 0 if str(value).strip().lower() == "auto" else whole(value)

    return parse


_LONGEST_DURATION = 50  # characters


def _duration(low: float = 0.0) -> Parser[float]:
    allowed = f"seconds ({low:g} or more), or a duration such as 90s, 30m, 2h"

    @_shown_as("DURATION")
    def parse(value: Any) -> float:
        try:
            return seconds(value, low)
        except ValueError:
            raise ValueError(allowed) from None

    return parse


def seconds(value: Any, low: float = 0.0) -> float:
    """Return seconds from a number or from a text such as ``90``, ``90s``, ``30m``, ``2h``, ``1d``.

    Raises:
        ValueError: not a finite duration of at least `low` seconds.
    """
    text = str(value)
    if len(text) > _LONGEST_DURATION:  # clients send durations too, and the pattern backtracks
        raise ValueError("not a duration")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text.lower())
    if isinstance(value, bool) or not match:
        raise ValueError("not a duration")
    result = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    if not low <= result <= 10 * 365 * 86400:
        raise ValueError("out of range")
    return result


def context_length(value: Any) -> int:
    """Return a number of tokens that a model may be limited to, prompt and answer together.

    Raises:
        ValueError: the value is not allowed; the message says what is.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 128 <= value <= 1 << 24:
        raise ValueError(f"a whole number from 128 to {1 << 24}")
    return value


@_shown_as("SIZE")
def byte_size(value: Any) -> int:
    """Return bytes from a number or from a text such as ``512K``, ``32M``, ``24GB``.

    Raises:
        ValueError: the value is not a size; the message says what is allowed.
    """
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]?)(?:I?B)?\s*", str(value).upper())
    if isinstance(value, bool) or not match or not int(match[1]):
        raise ValueError("a size in bytes, or with a unit such as 512K, 32M, 1G")
    return int(match[1]) * units[match[2]]


@_shown_as("SIZE|PERCENT")
def _budget(value: Any) -> int | float | None:
    """Return bytes (an int), or a fraction of the machine's memory (a float)."""
    if value is None:
        return None
    percent = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,3})?)\s*%\s*", str(value))
    try:
        if percent is None:
            return byte_size(value)
        if 0 < float(percent[1]) <= 100:
            return float(percent[1]) / 100
    except ValueError:
        pass
    raise ValueError("a size such as 24GB, or a percentage of the memory such as 60%")


@_shown_as("SIZE|PERCENT|0")
def _disk_budget(value: Any) -> int | float | None:
    """Return bytes (an int; 0: none), or a fraction of the free disk (a float)."""
    if str(value).strip() == "0":
        return 0
    try:
        return _budget(value)
    except ValueError:
        raise ValueError("a size such as 50GB, a percentage such as 20%, or 0") from None


@_shown_as("true|false")
def _boolean(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    try:
        return words[str(value).strip().lower()]
    except KeyError:
        raise ValueError("true or false") from None


def _choice(*names: str) -> Parser[str]:
    @_shown_as("|".join(names))
    def parse(value: Any) -> str:
        for name in names:
            if str(value).strip().lower() == name.lower():
                return name
        raise ValueError(" or ".join(names))

    return parse


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text that is not empty")
    return value.strip()


@_shown_as("TEXT")
def _optional_text(value: Any) -> str | None:
    return None if value is None or str(value).strip() in ("", "none", "None") else _text(value)


@_shown_as("ADDRESS")
def _host(value: Any) -> str:
    text = _text(value)
    try:
        if not re.fullmatch(r"[\w.:%-]+", text):
            raise OSError
        socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)
    except OSError:
        raise ValueError("an address of this machine, such as 127.0.0.1 or 0.0.0.0") from None
    return text


@_shown_as("PATH")
def _path(value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError("a path")
    try:
        path = Path(os.fspath(value)).expanduser()
    except RuntimeError:
        raise ValueError("a path (its home folder is unknown)") from None
    return Path(os.path.abspath(path))


@_shown_as("PATH")
def _optional_path(value: Any) -> Path | None:
    return None if value is None else _path(value)


def _items(value: Any, separator: str, allowed: str) -> Iterator[Any]:
    if value is None:
        return
    if isinstance(value, str):
        yield from (part.strip() for part in value.split(separator) if part.strip())
    elif isinstance(value, (list, tuple, set)):
        yield from value
    else:
        raise ValueError(allowed)


@_shown_as("PATH[:PATH]")
def _paths(value: Any) -> tuple[Path, ...]:
    allowed = "a folder or several (a list, or separated by ':')"
    if isinstance(value, os.PathLike):
        value = [value]
    return tuple(_path(item) for item in _items(value, ":", allowed))


@_shown_as("TEXT[,TEXT]")
def _texts(value: Any) -> tuple[str, ...]:
    allowed = "one value or several (a list, or separated by ',')"
    items = tuple(_items(value, ",", allowed))
    if not all(isinstance(item, str) and item and item.isprintable() for item in items):
        raise ValueError(allowed)
    return items


@_shown_as("TABLE")
def _table(value: Any) -> Table:
    allowed = 'a dictionary of dictionaries, such as {"qwen3*": {"temperature": 0.6}}'
    if not isinstance(value, Mapping):
        raise ValueError(allowed)
    for name, options in value.items():
        if not _is_name(name) or not isinstance(options, Mapping):
            raise ValueError(allowed)
    return tuple((name, dict(options)) for name, options in value.items())


@_shown_as("TABLE")
def _names(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping) or not all(
        _is_name(text) for pair in value.items() for text in pair
    ):
        raise ValueError('a dictionary of names, such as {"gpt-*": "loaded"}')
    return tuple(value.items())


@_shown_as("TABLE")
def _peers(value: Any) -> tuple[Peer, ...]:
    allowed = (
        'a dictionary of machines, such as {"studio": {"url": "http://studio.local:8080", "key": '
        '"..."}}: each name of lower-case letters, digits and hyphens, each url http://HOST:PORT '
        "(an IPv4 address or a name that has one)"
    )
    if not isinstance(value, Mapping):
        raise ValueError(allowed)
    peers = []
    for name, options in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name):
            raise ValueError(allowed)
        if not isinstance(options, Mapping) or not {"url"} <= options.keys() <= {"url", "key"}:
            raise ValueError(allowed)
        url, key = options["url"], options.get("key")
        match = re.fullmatch(r"http://([\w.-]+)(?::(\d{1,5}))?/?", str(url), re.ASCII)
        if match is None or not 1 <= int(match[2] or HTTP_PORT) <= 65535:
            raise ValueError(allowed)
        if key is not None and not (isinstance(key, str) and key and _is_sendable(key)):
            raise ValueError("a key that can be sent in an HTTP header, for each peer that has one")
        peers.append(Peer(name, match[1], int(match[2] or HTTP_PORT), key))
    return tuple(peers)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _default_instance() -> Path:
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "setup.cfg").is_file() and (checkout / "instance").is_dir():
        return checkout / "instance"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlxproxy"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "mlxproxy"


@dataclass(frozen=True)
class Settings:
    """The settings of one running proxy; ``NAME`` in the documentation is ``name`` here."""

    models_root: tuple[Path, ...] = _setting(
        (),
        _paths,
        "Models folder, or several separated by ':' (in config.py: a list)",
        shown="LM Studio's own models folder",
    )
    mlx_server_bin: Path | None = _setting(
        None,
        _optional_path,
        "The mlx_lm.server program",
        shown="the one next to the running Python, else the one on PATH",
    )
    vlm_server_bin: Path | None = _setting(
        None,
        _optional_path,
        "The mlx_vlm.server program, for models that see, embed or rank (`make install-vision`)",
        shown="the one next to the running Python, else the one on PATH, if there is one",
    )
    mlx_backend_port: int = _setting(
        18080, _port, "Port of the backend (mlx_lm.server) on 127.0.0.1"
    )
    proxy_host: str = _setting(
        "0.0.0.0", _host, "Address to listen on; 127.0.0.1 for this machine only"
    )
    proxy_port: int = _setting(8080, _port, "Port to listen on")
    ollama_port: int | None = _setting(
        None,
        _optional_port,
        "A second port to listen on, such as 11434, for Ollama's clients that cannot be told "
        "another one: there, the address itself answers as Ollama does",
        shown="none",
    )
    instance_path: Path = _setting(
        Path(),
        _path,
        "Folder for config.py, logs, the lock file and the backend's record",
        shown="instance/ in the checkout, else the user's state folder",
    )
    enable_thinking: bool = _setting(
        False, _boolean, "Default thinking mode, for loads that do not set enable_thinking"
    )
    model_selection: str = _setting(
        "requested",
        _choice("requested", "loaded"),
        "requested: a request that names a model on disk gets that model, any other name the "
        "loaded one; loaded: the loaded model answers every request, whatever model it names",
    )
    max_loaded: int = _setting(
        1,
        _whole_or_auto(1, MOST_LOADED, f"a whole number from 1 to {MOST_LOADED}, or auto"),
        "Models in memory at a time, each on a port from MLX_BACKEND_PORT up; auto: as many as fit "
        f"into memory (up to {MOST_LOADED})",
    )
    memory_budget: int | float | None = _setting(
        None,
        _budget,
        "Memory for all models together, such as 24GB or 60%",
        shown="what Metal recommends on macOS; elsewhere what is free, but with MAX_LOADED above 1 "
        "at most 80%",
    )
    prompt_cache_disk: int | float | None = _setting(
        None,
        _disk_budget,
        "Disk space for what models have computed for earlier prompts, such as 50GB or 20% of the "
        "free disk; 0: keep nothing on disk",
        shown="20GB, or a tenth of the free disk if that is less",
    )
    models: Table = _setting(
        (),
        _table,
        "Options for a model, by its id or a pattern (in config.py only): see docs/settings.md",
        shown="none",
        only_in_config=True,
    )
    profiles: Table = _setting(
        (),
        _table,
        "Names of your own for a model with options (in config.py only): see docs/settings.md",
        shown="none",
        only_in_config=True,
    )
    aliases: tuple[tuple[str, str], ...] = _setting(
        (),
        _names,
        "Other names for a model, a profile or whatever is loaded (in config.py only): see "
        "docs/settings.md",
        shown="none",
        only_in_config=True,
    )
    peers: tuple[Peer, ...] = _setting(
        (),
        _peers,
        "Other machines that run mlxproxy, whose models this one offers too (in config.py only): "
        "see docs/several-macs.md",
        shown="none",
        only_in_config=True,
    )
    sampling_defaults: str = _setting(
        "model",
        _choice("model", "greedy"),
        "Sampling of requests that set none: model: as the model's generation_config.json says; "
        "greedy: always the likeliest token",
    )
    preload: str | None = _setting(
        None,
        _optional_text,
        "Model to load at start; last: the most recently loaded one",
        shown="none",
    )
    idle_ttl: float = _setting(
        0.0, _duration(), "Seconds without a request before the model is unloaded; 0: never"
    )
    standby: bool = _setting(
        True,
        _boolean,
        "Keep a process ready that has imported mlx-lm, so that the next load is quick",
    )
    load_timeout: float = _setting(
        600.0, _duration(1), "Seconds before a load is considered failed"
    )
    drain_timeout: float = _setting(
        120.0, _duration(), "Seconds that a swap or unload waits for answers in flight to finish"
    )
    stop_timeout: float = _setting(
        10.0,
        _duration(),
        "Seconds the backend gets to exit after SIGTERM before it is killed with SIGKILL",
    )
    stall_timeout: float = _setting(
        300.0,
        _duration(1),
        "Seconds that one step of the backend's work may take before the backend is considered "
        "dead",
    )
    shutdown_timeout: float = _setting(
        30.0, _duration(), "Seconds that answers in flight get to finish when the proxy stops"
    )
    max_concurrent: int = _setting(
        32, _whole(1, 1024, "a whole number from 1 to 1024"), "Maximum number of answers in flight"
    )
    max_queue: int = _setting(
        64,
        _whole(0, 1024, "a whole number from 0 to 1024"),
        "Maximum number of queued requests; further ones get 429",
    )
    max_tokens: int = _setting(
        8192,
        _whole(1, 1 << 20, "a whole number from 1 to 1048576"),
        "Maximum tokens in an answer if the request sets no limit (never more than the model's "
        "context)",
    )
    max_body: int = _setting(
        32 << 20, byte_size, "Largest request body in bytes, or with a unit (K, M, G)", shown="32M"
    )
    api_key: tuple[str, ...] = _setting(
        (), _texts, "One or more API keys; every path except /health requires one", shown="none"
    )
    api_key_file: Path | None = _setting(
        None,
        _optional_path,
        "File with one API key per line (blank lines and lines that start with # are ignored); "
        "only its owner may have access to it",
        shown="none",
    )
    allowed_origins: tuple[str, ...] = _setting(
        (),
        _texts,
        "Browser origins whose pages may call the API; *: any",
        shown="pages served from this machine",
    )
    trusted_hosts: tuple[str, ...] = _setting(
        (),
        _texts,
        "Additional host names to accept in the Host header; *: any",
        shown="IP addresses, localhost, *.local and this machine's names",
    )
    template_kwargs: tuple[str, ...] = _setting(
        ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget", "preserve_thinking"),
        _texts,
        "Names that a request may set in chat_template_kwargs",
    )
    log_level: str = _setting(
        "INFO",
        _choice("DEBUG", "INFO", "WARNING", "ERROR"),
        "Log level of the proxy: DEBUG, INFO, WARNING or ERROR",
    )

    def part(self, kind: type[P], **others: Any) -> P:
        """Return the settings that a part of the program declares as its fields.

        Args:
            kind: a dataclass.
            others: the fields that are not settings, or that have other values there.
        """
        own = {item.name for item in fields(self)}
        names = [item.name for item in fields(kind) if item.name in own]  # type: ignore[arg-type]
        return kind(**{**{name: getattr(self, name) for name in names}, **others})

    @property
    def instance(self) -> Instance:
        """The paths in the instance folder."""
        return Instance(self.instance_path)

    @property
    def slots(self) -> int:
        """The maximum number of models in memory at the same time."""
        return self.max_loaded or MOST_LOADED

    @property
    def backend_ports(self) -> range:
        """One port for each model that may be in memory."""
        first = self.mlx_backend_port
        return range(first, first + self.slots)

    @property
    def local_url(self) -> str:
        """The proxy's URL on this machine."""
        everywhere = ("0.0.0.0", "::", "127.0.0.1", "::1")
        host = "localhost" if self.proxy_host in everywhere else self.proxy_host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.proxy_port}"

    @property
    def keys(self) -> tuple[str, ...]:
        """All accepted API keys, including those in the key file.

        Raises:
            SettingError: the file cannot be read, is empty, or is readable by others; or a key
                cannot be sent.
        """
        keys = [("API_KEY", "a key", key) for key in self.api_key]
        if self.api_key_file is not None:
            keys += _keys_in(self.api_key_file)
        for setting, which, key in keys:
            if not _is_sendable(key):
                raise SettingError(
                    f"{setting}: {which} cannot be sent in an HTTP header: it contains control "
                    "characters or characters outside Latin-1. Choose another one."
                )
        return tuple(key for _, _, key in keys)


def _keys_in(file: Path) -> list[tuple[str, str, str]]:
    """Return each key in a key file, after the setting and the words that name it in a sentence.

    Raises:
        SettingError: the file cannot be read, is empty, or is readable by others.
    """
    setting = f"API_KEY_FILE = {file}"
    try:
        text = read_text(str(file), MB)
        mode = file.stat().st_mode
    except (Unreadable, OSError) as error:
        raise SettingError(f"{setting}: {error}.") from None
    if mode & 0o077:
        raise SettingError(f"{setting}: other users can access it; run `chmod 600 {file}`.")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    found = [(setting, f"line {it}", key) for it, key in lines if key and not key.startswith("#")]
    if not found:
        raise SettingError(f"{setting}: it contains no key.")
    return found


def _is_sendable(key: str) -> bool:
    return key.isprintable() and all(ord(character) < 256 for character in key)


def describe() -> list[tuple[str, str, str]]:
    """Return (NAME, default as shown, meaning) of each setting, in order, for the documentation."""
    rows = []
    for item in fields(Settings):
        shown = item.metadata.get("shown")
        if shown is None:
            shown = _shown(item.default)
        rows.append((item.name.upper(), shown, item.metadata["meaning"]))
    return rows


def metavar(name: str) -> str:
    """Return the placeholder for the value of the setting NAME in a flag's help."""
    (parser,) = (item.metadata["parse"] for item in fields(Settings) if item.name == name.lower())
    return str(parser.metavar)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def load(
    flags: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Return the settings from all sources.

    Args:
        flags: NAME to text, as given on the command line.
        environ: the environment; None: the process's own.

    Raises:
        SettingError: a value is not allowed, or a name does not exist.
    """
    environ = os.environ if environ is None else environ
    flags = flags or {}
    environment = {
        name.removeprefix(ENV_PREFIX): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and name not in CLIENT_VARIABLES
    }
    early = {**environment, **flags}
    instance = (
        _parse("INSTANCE_PATH", early["INSTANCE_PATH"], "the environment or a flag")
        if "INSTANCE_PATH" in early
        else _default_instance()
    )
    values: dict[str, Any] = {"instance_path": instance}
    config = Instance(instance).config
    sources: Sequence[tuple[str, Mapping[str, Any]]] = (
        (str(config), _read_config(config)),
        ("the environment", environment),
        ("the command line", flags),
    )
    for source, given in sources:
        for name, value in given.items():
            values[name.lower()] = _parse(name, value, source)
    settings = Settings(**values)
    _check_ports(settings)
    return settings


def _check_ports(settings: Settings) -> None:
    """Raise SettingError unless the proxy and its backends can each have a port."""
    ports = settings.backend_ports
    if settings.proxy_port == settings.ollama_port:
        raise SettingError(
            f"PROXY_PORT and OLLAMA_PORT are both {settings.proxy_port}. Ollama's API is at "
            "PROXY_PORT anyhow: leave OLLAMA_PORT out, or set it to another port."
        )
    if settings.proxy_port == settings.mlx_backend_port:
        raise SettingError(
            f"PROXY_PORT and MLX_BACKEND_PORT are both {settings.proxy_port}: the proxy and its "
            "backend need a port each. Set one of them to another port."
        )
    told = f"the backends use ports {ports.start} to {ports[-1]} (MLX_BACKEND_PORT, MAX_LOADED)"
    for name, port in (
        ("PROXY_PORT", settings.proxy_port),
        ("OLLAMA_PORT", settings.ollama_port),
    ):
        if port in ports:
            raise SettingError(f"{name} = {port}, but {told}. Set it to another port.")
    if ports[-1] > 65535:
        raise SettingError(f"{told[0].upper()}{told[1:]}, but the last port is 65535.")


def _parse(name: str, value: Any, source: str) -> Any:
    known = {item.name.upper(): item for item in fields(Settings)}
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SettingError(f"{name} (from {source}) is not a setting of mlxproxy.{hint}")
    try:
        return known[name].metadata["parse"](value)
    except ValueError as allowed:
        shown = "…" if "API_KEY" in name or name == "PEERS" else repr(value)
        raise SettingError(f"{name} = {shown} (from {source}): must be {allowed}.") from None


def _read_config(path: Path) -> dict[str, Any]:
    """Return the upper-case names that ``config.py`` assigns.

    `Path` is predefined there, as in the original tool.
    """
    try:
        source = read_text(str(path), MB)
    except Missing:
        return {}
    except Unreadable as error:
        raise SettingError(f"{path} cannot be used: {error}.") from None
    namespace: dict[str, Any] = {"__file__": str(path), "Path": Path}
    try:
        exec(compile(source, str(path), "exec"), namespace)
    except Exception as error:
        raise SettingError(f"{path} failed to run: {type(error).__name__}: {error}.") from None
    found = {name: value for name, value in namespace.items() if name.isupper()}
    if "INSTANCE_PATH" in found:
        raise SettingError(
            f"INSTANCE_PATH cannot be set in {path}, because that file is located through it. Set "
            f"{ENV_PREFIX}INSTANCE_PATH in the environment instead."
        )
    return found
