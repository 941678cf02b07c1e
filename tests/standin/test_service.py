"""`mlxproxy service`: what launchd and systemd are told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxproxy.commands import service
from tests.support.proxy import Proxy
from tests.support.pty import environment, run

# Stands for systemctl or launchctl: writes down its arguments, and knows one running service until
# it is told to stop it.
MANAGER = """\
#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in
  *bootout*|*disable*) rm -f {folder}/running ;;
  *bootstrap*|*enable*|*restart*|*kickstart*) touch {folder}/running ;;
  *print*) test -f {folder}/running && echo '	pid = 4711' ;;
  *show*) if test -f {folder}/running; then echo MainPID=4711; else echo MainPID=0; fi ;;
esac
"""


@pytest.fixture
def manager(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs in place of systemctl and launchctl, and what they were told."""
    folder = home / "bin"
    folder.mkdir()
    for name in ("systemctl", "launchctl"):
        (folder / name).write_text(MANAGER.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def calls(manager: Path) -> list[str]:
    return (manager / "calls").read_text().splitlines()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    strange = tmp_path / 'a "strange" 100% $folder\\'
    flags = ["--instance-path", str(strange), "--api-key", 'a"b$c%d']
    done = run("service", "install", "--dry-run", *flags, env=environment(tmp_path))
    if sys.platform == "darwin":
        pytest.skip("the command writes a launchd file here")
    unit = tmp_path / "mlxproxy.service"
    unit.write_text(done.stdout)
    verified = subprocess.run(
        ["systemd-analyze", "--user", "--man=no", "verify", str(unit)],
        env=environment(tmp_path, XDG_RUNTIME_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (verified.returncode, verified.stderr) == (0, "")


def test_a_dry_run_of_an_install_prints_the_file_and_changes_nothing(tmp_path: Path) -> None:
    done = run("service", "install", "--dry-run", env=environment(tmp_path))
    assert done.returncode == 0
    assert "mlxproxy" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_service_with_a_wrong_setting_is_not_installed(tmp_path: Path) -> None:
    done = run("service", "install", "--proxy-port", "http", env=environment(tmp_path))
    assert done.returncode == 1
    assert "PROXY_PORT" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "darwin", reason="the command talks to launchd here")
def test_a_service_is_installed_restarted_and_uninstalled_on_linux(
    manager: Path, tmp_path: Path
) -> None:
    env = environment(tmp_path, PATH=f"{manager}:{os.environ['PATH']}")
    assert run("service", "status", env=env).returncode == 4
    assert run("service", "restart", env=env).returncode == 1
    installed = run("service", "install", "--api-key", "secret", env=env)
    assert installed.returncode == 0
    assert "loginctl enable-linger" in installed.stdout
    unit = tmp_path / ".config" / "systemd" / "user" / "mlxproxy.service"
    assert "secret" in unit.read_text()
    assert unit.stat().st_mode & 0o077 == 0
    status = run("service", "status", env=env)
    assert (status.returncode, "4711" in status.stdout) == (0, True)
    assert run("service", "restart", env=env).returncode == 0
    assert run("service", "install", env=env).returncode == 0
    assert "secret" not in unit.read_text()
    (manager / "running").unlink()
    assert run("service", "status", env=env).returncode == 3
    assert run("service", "uninstall", env=env).returncode == 0
    assert not unit.exists()
    assert run("service", "uninstall", env=env).stdout == "The service was not installed.\n"
    assert calls(manager)[:3] == [
        "--user daemon-reload",
        "--user enable mlxproxy.service",
        "--user restart mlxproxy.service",
    ]
    assert calls(manager)[-2:] == [
        "--user disable --now mlxproxy.service",
        "--user daemon-reload",
    ]


def test_a_service_is_installed_restarted_and_uninstalled_on_a_mac(
    home: Path, manager: Path
) -> None:
    agent = service.of("darwin")
    target = f"gui/{os.getuid()}/{service.LABEL}"
    agent.install(service.plan({}))
    assert agent.path == home / "Library" / "LaunchAgents" / f"{service.LABEL}.plist"
    assert agent.path.stat().st_mode & 0o077 == 0
    assert calls(manager) == [
        f"bootout {target}",
        f"print {target}",
        f"enable {target}",
        f"bootstrap gui/{os.getuid()} {agent.path}",
    ]
    assert agent.pid() == 4711
    agent.restart()
    assert calls(manager)[-1] == f"kill SIGTERM {target}"
    assert agent.uninstall()
    assert calls(manager)[-1] == f"bootout {target}"
    assert not agent.path.exists()
    assert agent.pid() is None


def test_an_error_of_the_service_manager_is_quoted(home: Path, manager: Path) -> None:
    (manager / "systemctl").write_text("#!/bin/sh\necho no bus >&2; exit 1\n")
    with pytest.raises(service.ServiceError, match="no bus"):
        service.of("linux").install(service.plan({}))


@pytest.mark.parametrize(
    ("platform", "refused"),
    [
        ("linux", "daemon-reload"),
        ("linux", "enable"),
        ("linux", "restart"),
        ("darwin", "bootstrap"),
    ],
)
def test_an_install_that_fails_leaves_nothing(
    platform: str, refused: str, home: Path, manager: Path
) -> None:
    for name in ("systemctl", "launchctl"):
        answer = f'case "$*" in *{refused}*) echo no bus >&2; exit 1 ;; esac\n'
        script = (manager / name).read_text()
        (manager / name).write_text(script.replace("#!/bin/sh\n", f"#!/bin/sh\n{answer}"))
    installed = service.of(platform)
    with pytest.raises(service.ServiceError, match=r"no bus\. Nothing was installed\."):
        installed.install(service.plan({}))
    assert not installed.installed
    assert not (manager / "running").exists()
    assert [path for path in home.rglob("*") if path.is_file() and path.parent != manager] == []


def test_an_install_that_fails_leaves_the_service_that_was_there(home: Path, manager: Path) -> None:
    unit = service.of("linux")
    unit.install(service.plan({"API_KEY": "first"}))
    before = unit.path.read_text()
    refusing = (
        "#!/bin/sh\nif grep -qs second ~/.config/systemd/user/*; then echo no >&2; exit 1; fi\n"
    )
    script = (manager / "systemctl").read_text()
    (manager / "systemctl").write_text(script.replace("#!/bin/sh\n", refusing))
    with pytest.raises(service.ServiceError, match="The service is as it was"):
        unit.install(service.plan({"API_KEY": "second"}))
    assert unit.path.read_text() == before
    assert unit.path.stat().st_mode & 0o077 == 0
    assert unit.pid() == 4711


@pytest.mark.skipif(sys.platform == "darwin", reason="the command talks to launchd here")
def test_no_service_is_installed_beside_a_proxy_in_a_terminal(
    start: Callable[..., Proxy], models: Path, manager: Path
) -> None:
    proxy = start(models)
    env = {**proxy.environment, **{k: os.environ[k] for k in ("HOME", "PATH")}}
    done = run("service", "install", env=env)
    assert done.returncode == 1
    assert proxy.process is not None
    assert f"mlxproxy is already running (pid {proxy.process.pid})" in done.stderr
    assert not service.of("linux").installed
    assert run("service", "install", "--dry-run", env=env).returncode == 0


def test_a_missing_service_manager_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(service.ServiceError, match="launchctl was not found"):
        service.of("darwin").install(service.plan({}))
