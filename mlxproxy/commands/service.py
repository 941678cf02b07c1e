"""`mlxproxy service`: starting at login and staying up, with launchd or systemd.

The service may start before a disk is mounted. It does not wait for the disk: the proxy itself
waits for its models folder to appear, and until then serves the models that are there.
"""

from __future__ import annotations

import os
import plistlib
import re
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlxproxy import settings
from mlxproxy.backend.lock import holder
from mlxproxy.engines.mlx_lm.program import program_on_path_alone
from mlxproxy.text import harmless

LABEL = "local.mlxproxy"
UNIT = "mlxproxy.service"
MARGIN = 15.0  # seconds a stop may take beyond the proxy's own limits
PATIENCE = 60.0  # for systemctl and launchctl themselves
RUNNING, STOPPED, ABSENT = 0, 3, 4  # exit statuses of `service status`, as systemctl's
LATE_DISK = "The disk with the models may be mounted later: the proxy waits for it."


class ServiceError(click.ClickException):
    """The reason why the service cannot be managed, as a sentence; the exit status is 1."""

    def __init__(self, message: str) -> None:
        super().__init__(harmless(message))


@dataclass(frozen=True)
class Plan:
    """What the service runs, and how.

    Attributes:
        environment: the settings that were given, as MLXPROXY_<NAME>.
        environment: the settings that were given, as MLXPROXY_<NAME>.
        log: the file for its output.
        stop_seconds: how long a stop may take before it is forced.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    stop_seconds: float


def plan(flags: Mapping[str, str]) -> Plan:
    """Return the service for these flags and this shell's environment, which it will not inherit.

    Raises:
        SettingError: a value is not allowed.
    """
    found = settings.load(flags)
    prefix = settings.ENV_PREFIX
    given = {
        name.removeprefix(prefix): value
        for name, value in os.environ.items()
        if name.startswith(prefix) and name not in settings.CLIENT_VARIABLES
    }
    given.update(flags)
    given.pop("INSTANCE_PATH", None)
    for name in given:
        value = getattr(found, name.lower())
        paths = value if isinstance(value, tuple) else (value,)
        if paths and all(isinstance(path, Path) for path in paths):
            given[name] = ":".join(map(str, paths))  # absolute: the service runs in another folder
    if "MLX_SERVER_BIN" not in given and found.mlx_server_bin is None:
        program = program_on_path_alone()
        if program is not None:  # the service has another PATH
            given["MLX_SERVER_BIN"] = str(program)
    instance = str(found.instance_path)
    return Plan(
        command=(sys.executable, "-m", "mlxproxy", "serve", "--instance-path", instance),
        environment={prefix + name: value for name, value in sorted(given.items())},
        log=found.instance.log("service"),
        stop_seconds=found.shutdown_timeout + found.stop_timeout + MARGIN,
    )


class Service(ABC):
    """The service of the current user."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def installed(self) -> bool:
        return self.path.is_file()

    def install(self, wanted: Plan) -> None:
        """Write the file and start the service, or restart it if it is already running.

        If that fails, the previous state is restored.

        Raises:
            ServiceError: the system refuses.
        """
        before = self._content()
        try:
            self._write(self.render(wanted), wanted.log)
            self._start(wanted)
        except ServiceError as error:
            self._restore(before, wanted)
            ending = "Nothing was installed." if before is None else "The service is as it was."
            raise ServiceError(f"{error.message.rstrip('.')}. {ending}") from None

    def _content(self) -> str | None:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ServiceError(f"{self.path} cannot be read: {error}.") from None

    def _write(self, text: str, log: Path | None = None) -> None:
        try:
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            # Readable only by its owner: it may contain an API key.
            with open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
        except OSError as error:
            raise ServiceError(f"{self.path} could not be written: {error.strerror}.") from None

    def _restore(self, before: str | None, wanted: Plan) -> None:
        with suppress(ServiceError):
            self._stop()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        if before is not None:
            with suppress(ServiceError):
                self._write(before)
                self._start(wanted)

    def uninstall(self) -> bool:
        """Stop the service and remove its file; return whether there was one."""
        there = self.installed
        if there:
            self._stop()
            self.path.unlink(missing_ok=True)
        return there

    @abstractmethod
    def render(self, wanted: Plan) -> str:
        """Return the text of the file."""

    @abstractmethod
    def restart(self) -> None:
        """Stop the service gracefully, and start it.

        Raises:
            ServiceError: the system refuses.
        """

    @abstractmethod
    def pid(self) -> int | None:
        """Return the pid of the running proxy, or None."""

    @abstractmethod
    def _start(self, wanted: Plan) -> None: ...

    @abstractmethod
    def _stop(self) -> None: ...


class LaunchAgent(Service):
    """A launchd agent: it runs while the user is logged in, on macOS."""

    def __init__(self) -> None:
        super().__init__(Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist")
        self._domain = f"gui/{os.getuid()}"
        self._target = f"{self._domain}/{LABEL}"

    def render(self, wanted: Plan) -> str:
        log = str(wanted.log)
        agent: dict[str, Any] = {
            "Label": LABEL,
            "ProgramArguments": list(wanted.command),
            "EnvironmentVariables": dict(wanted.environment),
            "WorkingDirectory": str(Path.home()),
            "RunAtLoad": True,
            "KeepAlive": True,
            "ProcessType": "Interactive",  # otherwise macOS throttles it as a background job
            "ExitTimeOut": round(wanted.stop_seconds),
            "StandardOutPath": log,
            "StandardErrorPath": log,
        }
        text = plistlib.dumps(agent, sort_keys=False).decode()
        return text.replace("<dict>", f"<!-- {LATE_DISK} -->\n<dict>", 1)

    def restart(self) -> None:
        # SIGTERM stops it gracefully, and KeepAlive restarts it; `kickstart -k` kills it.
        if self.pid() is None or _run("launchctl", "kill", "SIGTERM", self._target).returncode:
            _must("launchctl", "kickstart", self._target)

    def pid(self) -> int | None:
        found = re.search(
            r"^\s*pid = (\d+)$", _run("launchctl", "print", self._target).stdout, re.MULTILINE
        )
        return int(found[1]) if found else None

    def _start(self, wanted: Plan) -> None:
        self._stop()
        deadline = time.monotonic() + wanted.stop_seconds
        while _run("launchctl", "print", self._target).returncode == 0:  # it is still stopping
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"The old {LABEL} did not stop. `launchctl print {self._target}` shows "
                    "its state."
                )
            time.sleep(0.2)
        _run("launchctl", "enable", self._target)
        _must("launchctl", "bootstrap", self._domain, str(self.path))

    def _stop(self) -> None:
        _run("launchctl", "bootout", self._target)


class SystemdUnit(Service):
    """A systemd user unit: it runs while the user is logged in, or always with lingering."""

    def __init__(self) -> None:
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        super().__init__(Path(config) / "systemd" / "user" / UNIT)

    def render(self, wanted: Plan) -> str:
        command = " ".join(_quoted(word).replace("$", "$$") for word in wanted.command)
        environment = "".join(
            f"Environment={_quoted(f'{name}={value}')}\n"
            for name, value in wanted.environment.items()
        )
        return f"""\
# {LATE_DISK}
[Unit]
Description=mlxproxy serves MLX models
StartLimitIntervalSec=0

[Service]
ExecStart={command}
{environment}Restart=always
RestartSec=5
# The proxy stops its backend itself; what is left after it is killed.
KillMode=mixed
TimeoutStopSec={wanted.stop_seconds:.0f}

[Install]
WantedBy=default.target
"""

    def restart(self) -> None:
        _must("systemctl", "--user", "restart", UNIT)

    def pid(self) -> int | None:
        shown = _run("systemctl", "--user", "show", "--property=MainPID", UNIT).stdout
        found = re.search(r"MainPID=(\d+)", shown)
        return int(found[1]) or None if found else None

    def _start(self, wanted: Plan) -> None:
        _must("systemctl", "--user", "daemon-reload")
        _must("systemctl", "--user", "enable", UNIT)
        _must("systemctl", "--user", "restart", UNIT)

    def _stop(self) -> None:
        _run("systemctl", "--user", "disable", "--now", UNIT)

    def uninstall(self) -> bool:
        there = super().uninstall()
        if there:
            _run("systemctl", "--user", "daemon-reload")
        return there


def of(platform: str = sys.platform) -> Service:
    """Return the service manager of a platform."""
    return LaunchAgent() if platform == "darwin" else SystemdUnit()


# -- commands


def install(flags: Mapping[str, str], dry_run: bool) -> None:
    """Install and start the service, or only print its file."""
    service, wanted = of(), plan(flags)
    if dry_run:
        click.echo(service.render(wanted), nl=False)
        return
    _require_alone(service, flags)
    service.install(wanted)
    click.echo(f"Installed {service.path}: mlxproxy is running, and will start when you log in.")
    if isinstance(service, SystemdUnit):
        click.echo("To keep it running while you are logged out: loginctl enable-linger")


def _require_alone(service: Service, flags: Mapping[str, str]) -> None:
    """Return if no running proxy would keep the service from its ports.

    Raises:
        ServiceError: a proxy runs in a terminal, or the system does not say.
    """
    found = settings.load(flags)
    proxy = holder(found.instance_path, found.backend_ports)
    if proxy is not None and proxy.pid != service.pid():
        raise ServiceError(
            f"mlxproxy is already running (pid {proxy.pid}). Stop it (Ctrl-C in its terminal), "
            "then install the service."
        )


def uninstall() -> None:
    """Stop and remove the service."""
    service = of()
    click.echo(
        f"Removed {service.path}." if service.uninstall() else "The service was not installed."
    )


def restart() -> None:
    """Restart the service.

    Raises:
        ServiceError: it is not installed, or the system refuses.
    """
    service = of()
    if not service.installed:
        raise ServiceError("The service is not installed. Run `mlxproxy service install`.")
    service.restart()
    click.echo("Restarted.")


def status() -> int:
    """Print whether the service runs; return the exit status."""
    service = of()
    if not service.installed:
        click.echo("Not installed. `mlxproxy service install` installs it.")
        return ABSENT
    pid = service.pid()
    if pid is None:
        click.echo(f"Installed, but not running: {service.path}")
        return STOPPED
    click.echo(f"Running with pid {pid}: {service.path}")
    return RUNNING


def _quoted(word: str) -> str:
    """Return a word quoted for a systemd unit."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise ServiceError(
            f"{command[0]} was not found, so services cannot be managed on this system."
        ) from None
    except subprocess.TimeoutExpired:
        raise ServiceError(f"`{' '.join(command)}` did not finish within {PATIENCE:g} s.") from None


def _must(*command: str) -> None:
    done = _run(*command)
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
        raise ServiceError(f"`{' '.join(command)}` failed: {said}")
