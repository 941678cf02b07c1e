"""The layout of the instance folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instance:
    """The instance folder of a proxy; several may share it if their backend ports differ."""

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
        """The cache of what was read from the models folders."""
        return self.folder / "catalog.json"

    @property
    def history(self) -> Path:
        """The record of past loads and how long each took."""
        return self.folder / "history.json"

    @property
    def prompt_cache(self) -> Path:
        """The folder for what models have computed for earlier prompts."""
        return self.folder / "prompt-cache"

    def log(self, source: str) -> Path:
        """Return the path of the log of the `proxy`, the `backend` or the `service`."""
        return self.folder / "logs" / f"{source}.log"

    def backend_log(self, port: int, first_port: int) -> Path:
        """Return the log of the backend on this port; that of the first slot has no number."""
        return self.log("backend" if port == first_port else f"backend-{port}")

    def lock(self, port: int) -> Path:
        """Return the path of the file that the proxy with this backend port holds locked."""
        return self.folder / f"backend-{port}.lock"

    def backend(self, port: int) -> Path:
        """Return the path of the record of the backend on this port."""
        return self.folder / f"backend-{port}.json"

    def standby(self, first_port: int) -> Path:
        """Return the path of the record of the standby of the proxy with this first port."""
        return self.folder / f"standby-{first_port}.json"

    def proxy(self, port: int) -> Path:
        """Return the path of the record of the proxy that has this backend port."""
        return self.folder / f"proxy-{port}.json"

    def proxies(self) -> list[Path]:
        """Return the paths of the records of all proxies that share the folder."""
        return sorted(self.folder.glob("proxy-*.json"))
