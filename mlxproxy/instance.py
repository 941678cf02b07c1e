"""What is where in the instance folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instance:
    """The instance folder of a proxy; several proxies may share one, with other backend ports."""

    folder: Path

    @property
    def config(self) -> Path:
        """The user's settings, in Python."""
        return self.folder / "config.py"

    @property
    def models(self) -> Path:
        """The models folder for the demo model."""
        return self.folder / "models"

    @property
    def catalog(self) -> Path:
        """What was read of the models folders."""
        return self.folder / "catalog.json"

    @property
    def history(self) -> Path:
        """What was loaded, and how long it took."""
        return self.folder / "history.json"

    def log(self, source: str) -> Path:
        """The log of the `proxy`, the `backend` or the `service`."""
        return self.folder / "logs" / f"{source}.log"

    def backend_log(self, port: int, first_port: int) -> Path:
        """The log of the backend on this port; the first slot's has no number."""
        return self.log("backend" if port == first_port else f"backend-{port}")

    def lock(self, port: int) -> Path:
        """What the proxy that has this backend port holds locked."""
        return self.folder / f"backend-{port}.lock"

    def backend(self, port: int) -> Path:
        """The record of the backend on this port."""
        return self.folder / f"backend-{port}.json"

    def proxy(self, port: int) -> Path:
        """The record of the proxy that has this backend port."""
        return self.folder / f"proxy-{port}.json"

    def proxies(self) -> list[Path]:
        """The records of all proxies that share the folder."""
        return sorted(self.folder.glob("proxy-*.json"))
