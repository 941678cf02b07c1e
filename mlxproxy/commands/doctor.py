"""`mlxproxy doctor`: what keeps the proxy from working on this machine, and what mends it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from mlxproxy import settings
from mlxproxy.backend import ports
from mlxproxy.backend.lock import PortLock
from mlxproxy.backend.orphan import Orphans
from mlxproxy.backend.processes import ask
from mlxproxy.catalog import Catalog
from mlxproxy.catalog.lmstudio import models_folder
from mlxproxy.commands import service, terminal
from mlxproxy.commands.client import ClientError, connect
from mlxproxy.settings import SettingError, Settings
from mlxproxy.wiring import engines_of, inspector_of

PYTHONS = ((3, 10), (3, 13))
ROOM = 500_000_000  # bytes: logs, the demo model
SCAN = 30.0  # seconds for a models folder


@dataclass(frozen=True)
class Finding:
    """One check's outcome.

    Attributes:
        check: its name.
        sentence: what was found.
        mend: the command that mends it; None where nothing is wrong.
    """

    check: str
    sentence: str
    mend: str | None = None

    @property
    def fine(self) -> bool:
        return self.mend is None


def doctor(as_json: bool) -> int:
    """Prints what was found; returns the exit status: 1 if anything is wrong."""
    console = terminal.output()
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            word, style = ("ok   ", "green") if finding.fine else ("wrong", "bold red")
            console.print(word, style=style, end="  ")
            console.print(f"{finding.check}: {finding.sentence}", soft_wrap=True)
            if finding.mend:
                console.print(f"       fix: {finding.mend}", soft_wrap=True)
    if as_json:
        terminal.print_json([{**asdict(it), "fine": it.fine} for it in findings])
    return 0 if all(finding.fine for finding in findings) else 1


def examine() -> Iterator[Finding]:
    """All checks, as they end; no server is needed, and none is started."""
    yield _python()
    try:
        found = settings.load()
    except SettingError as error:
        yield Finding("settings", str(error), _where_set(str(error)))
        return
    yield Finding("settings", f"valid; the instance folder is {found.instance_path}")
    yield from (Finding(*engine.examine()) for engine in engines_of(found))
    yield from _models(found)
    yield _disk(found)
    proxy = _running(found)
    yield _lock(found, proxy)
    yield _orphan(found, proxy)
    yield _port(found.proxy_port, "PROXY_PORT", proxy)
    yield _port(found.mlx_backend_port, "MLX_BACKEND_PORT", proxy)
    yield _service()


def _python() -> Finding:
    version = platform.python_version()
    sentence = f"{version} ({sys.executable})"
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Finding(
            "Python",
            f"{sentence}, but 3.10 to 3.13 is needed",
            "brew install python@3.12 && make clean install",
        )
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return Finding(
            "Python",
            f"{sentence} is built for Intel, but MLX needs Apple silicon",
            "/opt/homebrew/bin/brew install python@3.12 && make clean install",
        )
    return Finding("Python", sentence)


def _where_set(error: str) -> str:
    name = error.split()[0]
    if "the environment" in error:
        return f"unset {settings.ENV_PREFIX}{name}"
    return "correct it in config.py"


def _models(found: Settings) -> Iterator[Finding]:
    demo = not found.models_root
    inspector = inspector_of(engines_of(found))
    for root in found.models_root or (models_folder(),):
        models = Catalog((root,), inspector, patience=SCAN).models() if root.is_dir() else []
        usable = sum(model.loadable for model in models)
        if usable:
            yield Finding("models", f"{usable} of {len(models)} in {root} can be loaded")
        elif demo and root.is_relative_to(Path.home()):
            yield Finding("models", f"none in {root}, so `mlxproxy serve` downloads a demo model")
        elif not root.is_dir():
            mend = "connect its disk, or run: mlxproxy serve --models-root FOLDER"
            yield Finding("models", f"{root} does not exist", mend)
        else:
            sentence = f"none of {len(models)} in {root} can be loaded"
            mend = "`mlxproxy ls --all` shows why; download a model in MLX format in LM Studio"
            yield Finding("models", sentence, mend)


def _disk(found: Settings) -> Finding:
    folder = found.instance_path
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("disk", f"{folder} is not writable", f"chmod u+rwx {folder}")
    free = shutil.disk_usage(folder).free
    sentence = f"{terminal.size(free)} free in {folder}"
    if free < ROOM:
        needed = f"{sentence}, but {terminal.size(ROOM)} is needed"
        return Finding("disk", needed, "free some space, or: export MLXPROXY_INSTANCE_PATH=FOLDER")
    return Finding("disk", sentence)


def _running(found: Settings) -> psutil.Process | None:
    """The proxy that runs with our instance folder and backend port."""
    if not found.instance_path.is_dir():
        return None
    return PortLock(found.instance_path, found.backend_ports).holder()


def _lock(found: Settings, proxy: psutil.Process | None) -> Finding:
    if proxy is None:
        return Finding("lock", "free: no mlxproxy is running with these settings")
    who = f"mlxproxy is running (pid {proxy.pid})"
    holder = ports.listener(found.proxy_port)
    if holder is None or not _is_family(holder, proxy):
        return Finding("lock", f"{who} with a PROXY_PORT other than {found.proxy_port}")
    try:
        client = connect(None, None)
        client.get("/health")
    except ClientError as error:
        return Finding("lock", f"{who}, but: {error.message}", f"kill {proxy.pid}")
    return Finding("lock", f"{who} and answers at {client.url}")


def _orphan(found: Settings, proxy: psutil.Process | None) -> Finding:
    if proxy is None and found.instance_path.is_dir():
        orphans = Orphans(found.instance_path, found.backend_ports).find()
        if orphans:
            pids = " ".join(str(orphan.pid) for orphan in orphans)
            sentence = f"the backend of a killed proxy is still running (pid {pids})"
            return Finding("orphan", sentence, f"kill {pids}")
    return Finding("orphan", "none")


def _port(port: int, setting: str, proxy: psutil.Process | None) -> Finding:
    check = f"port {port}"
    if ports.is_free(port):
        return Finding(check, "free")
    holder = ports.listener(port)
    if holder is None:
        mend = f"sudo lsof -nP -iTCP:{port} -sTCP:LISTEN   (or set {setting} to another port)"
        return Finding(check, "in use by another user's process", mend)
    if proxy is not None and _is_family(holder, proxy):
        return Finding(check, f"in use by this mlxproxy (pid {holder.pid})")
    mend = f"kill {holder.pid}   (or set {setting} to another port)"
    return Finding(check, f"in use by {ports.describe(holder)}", mend)


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
