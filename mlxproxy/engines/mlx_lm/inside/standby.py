"""The start of a process that is going to be told later what to load.

It imports what `mlx_lm.server` needs, then waits for its command line on the channel to the proxy.
The end of the channel is its own end. What it is told is one JSON object per line:

==============  ====================================================================================
``prepare``     the folder of the model that most likely comes next
``argv``        the command line to go on with; ``environment``: variables to set first
==============  ====================================================================================

It reports ``waiting`` once, with the reason why it cannot prepare for a model (empty: it can), and
``taken`` when it has its command line.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from . import gate
from .report import take_standard_input

FLAG = "--standby"  # as in mlxproxy/engines/mlx_lm/engine.py

NAMES: gate.Names = {
    "load_config": ("model_path",),
    "load_tokenizer": ("model_path", "tokenizer_config_extra", "eos_token_ids"),
}
# What `mlx_lm.server` passes to it, since the proxy sets neither of the options that it depends on.
TOKENIZER_CONFIG = {"trust_remote_code": False}


def wait() -> None:
    """Return once this process has the command line of a load, as if it had been started with it.

    Exits if the proxy closes the channel.
    """
    with socket.socket(fileno=take_standard_input()) as channel:
        importlib.import_module("mlx_lm.server")
        utils = importlib.import_module("mlx_lm.utils")
        _send(channel, waiting=_unsuited(utils))
        with channel.makefile("rb") as lines:
            told: dict[str, Any] = {}
            while "argv" not in told:
                if not (line := lines.readline()):
                    sys.exit(0)
                told = json.loads(line)
                if "prepare" in told and not _unsuited(utils):
                    prepare(utils, Path(told["prepare"]))
        argv = told["argv"]
        sys.argv[:] = argv[argv.index(sys.argv[0]) :]  # from the program on
        os.environ.update(told["environment"])
        _send(channel, taken=True)
        os.dup2(channel.fileno(), 0)


def prepare(utils: Any, folder: Path) -> None:
    """Import a model's architecture and read its tokenizer, for the next load of these very files.

    Args:
        utils: `mlx_lm.utils`.
    """
    try:
        files = _files(folder)
        asked = (folder, TOKENIZER_CONFIG, utils.load_config(folder).get("eos_token_id"))
        tokenizer = utils.load_tokenizer(*asked)
    except Exception:  # the load itself will say what is wrong
        return
    load = utils.load_tokenizer  # now: one prepared before is gone with the call above

    @functools.wraps(load)
    def load_tokenizer(
        model_path: Any, tokenizer_config_extra: Any = None, eos_token_ids: Any = None
    ) -> Any:
        utils.load_tokenizer = load  # it is handed out once
        given = (model_path, tokenizer_config_extra, eos_token_ids)
        if given == asked and _files(folder) == files:
            return tokenizer
        return load(*given)

    utils.load_tokenizer = load_tokenizer


def _unsuited(utils: Any) -> str:
    """Return why this mlx-lm cannot prepare for a model; empty if it can."""
    try:
        gate.require(utils, NAMES)
    except gate.Unexpected as error:
        return str(error)
    return ""


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Return what tells whether the files of a folder are still the same."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.stat()) for entry in entries]
    return sorted((name, status.st_mtime_ns, status.st_size) for name, status in found)


def _send(channel: socket.socket, **report: Any) -> None:
    channel.sendall(json.dumps(report).encode() + b"\n")
