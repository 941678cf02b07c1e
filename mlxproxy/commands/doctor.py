"""`mlxproxy doctor`: what keeps the proxy from working on this machine, and how to fix it.

If a proxy is running with this instance folder, the checks are about that proxy: its settings are
those that it was started with, and its models are those that it reports.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import psutil

from mlxproxy import settings
from mlxproxy.backend import ports
from mlxproxy.backend.lock import any_proxy, holder
from mlxproxy.backend.orphan import Orphans
from mlxproxy.backend.processes import ask
from mlxproxy.catalog import Catalog
from mlxproxy.catalog.lmstudio import models_folder
from mlxproxy.commands import service, terminal
from mlxproxy.commands.client import Client, ClientError, Refused
from mlxproxy.preferences import Preferences
from mlxproxy.settings import SettingError, Settings
from mlxproxy.text import harmless, wrapped
from mlxproxy.wiring import engines_of, inspector_of

OLDEST_PYTHON = (3, 10)
ROOM_BYTES = 500_000_000  # for logs and the demo model
SCAN_SECONDS = 30.0  # for scanning a models folder
INDENT = 7  # width in columns of the word before a finding


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name.
        sentence: what was found.
        fix: the command that fixes it; None if nothing is wrong.
    """

    check: str
    sentence: str
    fix: str | None = None

    @property
    def ok(self) -> bool:
        return self.fix is None


class Folder(NamedTuple):
    """A models folder: how many models it contains, and how many of them can be loaded."""

    path: Path
    exists: bool
    models: int
    usable: int


def doctor(as_json: bool) -> int:
    """Print the findings; return the exit status, which is 1 if anything is wrong."""
    console = terminal.output()
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            word, style = ("ok", "green") if finding.ok else ("wrong", "bold red")
            text = f"{word:{INDENT}}{finding.check}: {harmless(finding.sentence)}"
            console.print(word, style=style, end="")
            console.print(wrapped(text, console.file, INDENT).removeprefix(word), soft_wrap=True)
            if finding.fix:
                console.print(f"{'':{INDENT}}fix: {finding.fix}", soft_wrap=True)
    if as_json:
        terminal.print_json([{**asdict(finding), "ok": finding.ok} for finding in findings])
    return 0 if all(finding.ok for finding in findings) else 1


def examine() -> Iterator[Finding]:
    """Yield the outcome of each check as it ends, without needing or starting a server."""
    yield _python()
    try:
        given = settings.load()
    except SettingError as error:
        yield Finding("settings", str(error), _where_set(str(error)))
        return
    proxy = holder(given.instance_path, given.backend_ports) or any_proxy(given.instance_path)
    found = given if proxy is None else _settings_of(proxy) or given
    yield Finding("settings", f"valid{_differences(given, found)}")
    client = None
    if proxy is None:
        yield Finding("server", "not running (`make run` or `mlxproxy serve` starts it)")
    else:
        client = Client(found.local_url, _key(found))
        yield _server(proxy, client)
    yield from (Finding(*engine.examine()) for engine in engines_of(found))
    yield from _models(found, client)
    yield from _names(found, client)
    yield _disk(found)
    yield _leftovers(found, proxy)
    yield _port(found.proxy_port, "PROXY_PORT", proxy)
    if found.ollama_port is not None:
        yield _port(found.ollama_port, "OLLAMA_PORT", proxy)
    for port in found.backend_ports:
        yield _port(port, "MLX_BACKEND_PORT", proxy)
    yield _service()


def _python() -> Finding:
    version = platform.python_version()
    sentence = f"{version} ({sys.executable})"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding(
            "Python",
            f"{sentence}, but 3.10 or newer is needed",
            "brew install python && make clean install",
        )
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return Finding(
            "Python",
            f"{sentence} is built for Intel, but MLX needs Apple silicon",
            "/opt/homebrew/bin/brew install python && make clean install",
        )
    return Finding("Python", sentence)


def _where_set(error: str) -> str:
    name = error.split()[0]
    if "the environment" in error:
        return f"unset {settings.ENV_PREFIX}{name}"
    file = re.search(r"\(from (/.*)\)", error)
    return f"correct it in {file[1] if file else 'config.py'}"


# -- the running proxy


def _settings_of(proxy: psutil.Process) -> Settings | None:
    """Return the settings that the proxy was started with, or None if they cannot be determined."""
    environment, command = ask(proxy.environ), ask(proxy.cmdline)
    if environment is None or command is None or "serve" not in command:
        return None
    words = iter(command[command.index("serve") + 1 :])
    flags = {}
    for word in words:
        name, is_joined, value = word.partition("=")
        value = value if is_joined else next(words, "")
        flags[name.lstrip("-").replace("-", "_").upper()] = value
    try:
        return settings.load(flags, environment)
    except SettingError:
        return None


def _differences(given: Settings, found: Settings) -> str:
    """Return, in words, the settings of the running proxy that a command here doesn't know."""
    own = [
        _shown(item.name.upper(), value)
        for item in fields(Settings)
        if (value := getattr(found, item.name)) != getattr(given, item.name)
    ]
    started = f"; the running mlxproxy was started with {', '.join(own)}" if own else ""
    return f"; the instance folder is {found.instance_path}{started}"


def _shown(name: str, value: Any) -> str:
    if name == "API_KEY":
        return name
    if isinstance(value, tuple):
        value = (":" if name == "MODELS_ROOT" else ",").join(map(str, value))
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def _key(found: Settings) -> str | None:
    try:
        return next(iter(found.keys), None)
    except SettingError:
        return None


def _server(proxy: psutil.Process, client: Client) -> Finding:
    who = f"running (pid {proxy.pid})"
    try:
        client.get("/health")
    except ClientError as error:
        return Finding("server", f"{who}, but: {error.message}", f"kill {proxy.pid}")
    return Finding("server", f"{who} and answers at {client.url}")


# -- the models


def _models(found: Settings, client: Client | None) -> Iterator[Finding]:
    folders = _served(client) if client is not None else None
    folders = folders if folders is not None else list(_on_disk(found))
    is_default = client is None and not found.models_root
    for folder in folders:
        path = folder.path
        if folder.usable:
            yield Finding("models", f"{folder.usable} of {folder.models} in {path} can be loaded")
        elif is_default and path.is_relative_to(Path.home()):
            yield Finding("models", f"none in {path}, so `mlxproxy serve` downloads a demo model")
        elif not folder.exists:
            fix = "connect its disk, or run: mlxproxy serve --models-root FOLDER"
            yield Finding("models", f"{path} does not exist", fix)
        elif any(other.usable for other in folders):
            yield Finding("models", f"none of {folder.models} in {path} can be loaded")
        else:
            fix = "`mlxproxy ls --all` shows why; download a model in MLX format in LM Studio"
            yield Finding("models", f"none of {folder.models} in {path} can be loaded", fix)


def _served(client: Client) -> list[Folder] | None:
    """Return the folders as the server sees them, or None if it does not answer."""
    try:
        health = client.get("/health")
        listed = client.get("/v1/models?all=true")["data"]
        models = [model for model in listed if "profile_of" not in model]
    except (ClientError, KeyError):
        return None
    missing = health.get("models_root_missing", ())
    return [
        _folder(Path(root), root not in missing, models) for root in health.get("models_root", ())
    ]


def _folder(root: Path, exists: bool, models: Sequence[dict[str, Any]]) -> Folder:
    inside = [model for model in models if Path(model["path"]).is_relative_to(root)]
    return Folder(root, exists, len(inside), sum(model["loadable"] for model in inside))


def _on_disk(found: Settings) -> Iterator[Folder]:
    inspector = inspector_of(found)
    for root in found.models_root or (models_folder(),):
        exists = root.is_dir()
        models = Catalog((root,), inspector, patience=SCAN_SECONDS).models() if exists else []
        yield Folder(root, exists, len(models), sum(model.loadable for model in models))


def _names(found: Settings, client: Client | None) -> Iterator[Finding]:
    """Yield what is wrong with PROFILES, ALIASES and MODELS."""
    file = found.instance.config
    try:
        engines = engines_of(found)
        preferences = Preferences(found, engines[0].rules, [engine.name for engine in engines])
    except SettingError as error:
        yield Finding("settings", str(error), f"correct it in {file}")
        return
    roots = found.models_root or (models_folder(),)
    catalog = Catalog(roots, inspector_of(found), patience=SCAN_SECONDS)

    def is_served(name: str) -> bool:
        assert client is not None
        try:
            client.get(f"/v1/models/{quote(name)}")
        except Refused as error:
            return error.code != "model_not_found"
        except ClientError:
            pass  # that is a finding of its own
        return True

    for sentence in preferences.strangers(catalog.knows if client is None else is_served):
        yield Finding("settings", sentence, f"download that model, or correct the name in {file}")


# -- the machine


def _disk(found: Settings) -> Finding:
    folder = found.instance_path
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("disk", f"{folder} is not writable", f"chmod u+rwx {folder}")
    free = shutil.disk_usage(folder).free
    sentence = f"{terminal.size(free)} free in {folder}"
    if free < ROOM_BYTES:
        needed = f"{sentence}, but {terminal.size(ROOM_BYTES)} is needed"
        return Finding("disk", needed, "free some space, or: export MLXPROXY_INSTANCE_PATH=FOLDER")
    return Finding("disk", sentence)


def _leftovers(found: Settings, proxy: psutil.Process | None) -> Finding:
    check = "leftovers"
    if proxy is None and found.instance_path.is_dir():
        orphans = Orphans(found.instance_path, found.backend_ports).find()
        if orphans:
            pids = " ".join(str(orphan.pid) for orphan in orphans)
            sentence = f"the backend of a killed mlxproxy is still running (pid {pids})"
            return Finding(check, sentence, f"kill {pids}")
    return Finding(check, "no backend of a killed mlxproxy is running")


def _port(port: int, setting: str, proxy: psutil.Process | None) -> Finding:
    check = f"port {port}"
    if ports.is_free(port):
        return Finding(check, "free")
    holder = ports.listener(port)
    if holder is None:
        fix = f"sudo lsof -nP -iTCP:{port} -sTCP:LISTEN   (or set {setting} to another port)"
        return Finding(check, "in use by another user's process", fix)
    if proxy is not None and _is_family(holder, proxy):
        return Finding(check, f"in use by this mlxproxy (pid {holder.pid})")
    fix = f"kill {holder.pid}   (or set {setting} to another port)"
    return Finding(check, f"in use by {ports.describe(holder)}", fix)


def _is_family(process: psutil.Process, proxy: psutil.Process) -> bool:
    return process == proxy or proxy in (ask(process.parents) or ())


def _service() -> Finding:
    installed = service.of()
    if not installed.installed:
        return Finding(
            "service", "not installed (`mlxproxy service install` starts mlxproxy at login)"
        )
    with contextlib.suppress(OSError):
        if sys.executable not in installed.path.read_text():
            sentence = f"{installed.path} starts a different installation of mlxproxy"
            return Finding("service", sentence, "mlxproxy service install")
    try:
        pid = installed.pid()
    except service.ServiceError as error:
        return Finding("service", error.message, "mlxproxy service uninstall")
    if pid is None:
        sentence = f"{installed.path} is installed, but not running"
        return Finding("service", sentence, "mlxproxy service restart")
    return Finding("service", f"running (pid {pid})")
