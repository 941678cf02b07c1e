"""`mlx_lm.server` as an engine; `backend/protocol.py` explains what each part is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mlxproxy.backend.batch import Batch
from mlxproxy.backend.protocol import (
    Address,
    Command,
    Examined,
    Probe,
    Stage,
    StandbyCommand,
    Unmet,
)
from mlxproxy.backend.spec import ModelSpec, Tuning
from mlxproxy.engines.mlx_lm import diagnosis, program, readiness, rules, unmet
from mlxproxy.engines.mlx_lm.inspection import Inspector
from mlxproxy.engines.mlx_lm.link import Link, WaitingLink
from mlxproxy.engines.mlx_lm.package import Package
from mlxproxy.engines.mlx_lm.prompt_disk import PromptDisk
from mlxproxy.engines.mlx_lm.wire import MlxLmWire
from mlxproxy.errors import LoadFailed

_TOGETHER: Final = Batch(program.NAME)
_ALONE: Final = Batch(program.NAME, settings=None)
INSIDE_OPTIONS = "MLXPROXY_INSIDE"  # as in inside/run.py
STANDBY_FLAG = "--standby"  # as in inside/standby.py
# Read when Python starts or mlx_lm is imported, so a standby needs them from the start.
ENVIRONMENT: Mapping[str, str] = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class MlxLm:
    """The engine of text models.

    Args:
        server_bin: the setting MLX_SERVER_BIN.
        max_tokens: the limit for an answer whose request sets none.
        cache_bytes: returns how many bytes the prompt cache of a model may take, given the bytes
            that the model takes.
        prompt_disk: where prompt caches outlive their process; None: nowhere.
    """

    name = program.NAME
    health: Probe = readiness.HEALTH
    trusts_output = False  # it logs what clients and models say
    advice = diagnosis.ADVICE
    rules = rules.RULES

    def __init__(
        self,
        server_bin: Path | None,
        max_tokens: int,
        cache_bytes: Callable[[int], int],
        prompt_disk: PromptDisk | None = None,
    ) -> None:
        self._server_bin = server_bin
        self._max_tokens = max_tokens
        self._cache_bytes = cache_bytes
        self._prompt_disk = prompt_disk

    @property
    def inspector(self) -> Inspector:
        """Return the inspector for the mlx-lm to which the program belongs."""
        return Inspector(Package(program.package_of(self._server_bin)))

    def command(self, spec: ModelSpec, address: Address) -> Command:
        """Return the command line. Clients that stream from the backend's port rely on its options.

        Raises:
            LoadFailed: the program is missing.
        """
        start = program.program_command(program.server_program(self._server_bin))
        inside = program.is_inside(start)
        cache = spec.tuning.prompt_cache_bytes
        environment = dict(ENVIRONMENT)
        if inside:
            options: dict[str, Any] = {"context": spec.max_context}
            if self._prompt_disk is not None:
                options["prompt_cache_disk"] = self._prompt_disk.options(spec.model_id)
            environment[INSIDE_OPTIONS] = json.dumps(options)
        return Command(
            argv=(
                *start,
                *("--model", spec.path),
                *("--host", address.host),
                *("--port", str(address.port)),
                # Its own default is 512, which cuts off today's models in mid-thought.
                *("--max-tokens", str(self._longest_answer(spec))),
                # Without it, ten prompts of any length are kept (mlx-lm issue 1390).
                *("--prompt-cache-bytes", str(cache or self._cache_bytes(spec.needed_bytes))),
                *_tuning(spec.tuning),
                "--chat-template-args",
                json.dumps({"enable_thinking": spec.enable_thinking}),
            ),
            environment=environment,
            link=Link if inside else None,
            remedy=(
                "Set MLX_SERVER_BIN to a working mlx_lm.server (`pip install mlx-lm` provides one)."
            ),
        )

    def standby(self) -> StandbyCommand | None:
        """Return the command of a process that waits for a load; None if the program is a wrapper,
        or missing."""
        try:
            start = program.program_command(program.server_program(self._server_bin))
        except LoadFailed:
            return None
        if not program.is_inside(start):
            return None
        return StandbyCommand(
            argv=(*start, STANDBY_FLAG),
            environment=ENVIRONMENT,
            link=WaitingLink,
            version=Package(program.package_of(self._server_bin)).installation,
        )

    def stages(self, spec: ModelSpec) -> Sequence[Stage]:
        """Return the steps to readiness."""
        return readiness.stages(spec.path)

    def death_in(self, output: bytes) -> str | None:
        """Return why the generation thread has crashed, if the output shows that it has."""
        return readiness.death_in(output)

    def wire(self, has: Callable[[str], bool]) -> MlxLmWire:
        """Return the wire, which knows how it spells requests and answers."""
        return MlxLmWire(has)

    def batch(
        self, request: Mapping[str, Any], spec: ModelSpec | None, has: Callable[[str], bool]
    ) -> Batch:
        """Return the requests that may be answered beside this one: all, or none."""
        return _ALONE if rules.is_exclusive(request, has) else _TOGETHER

    def unmet(
        self, request: Mapping[str, Any], spec: ModelSpec, has: Callable[[str], bool]
    ) -> Iterable[Unmet]:
        """Return the parts of a checked request that the answer will not honour."""
        return unmet.unmet(request, spec.model.capabilities, has)

    def examine(self) -> Examined:
        """Return whether the program works on this machine."""
        return program.examine(self._server_bin)

    def _longest_answer(self, spec: ModelSpec) -> int:
        context = spec.max_context
        return min(self._max_tokens, context or self._max_tokens)


def _tuning(tuning: Tuning) -> list[str]:
    """Return the options set for a model, in addition to those of every command line."""
    options = {
        "--draft-model": tuning.draft_model,
        "--adapter-path": tuning.adapter,
        "--kv-bits": tuning.kv_bits,
        "--decode-concurrency": tuning.decode_concurrency,
    }
    return [
        word
        for option, value in options.items()
        if value is not None
        for word in (option, str(value))
    ]
