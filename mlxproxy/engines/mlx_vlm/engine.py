"""`mlx_vlm.server` as an engine; `backend/protocol.py` explains what each part is for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mlxproxy.backend.protocol import Address, Command, Examined, Probe, Stage, Unmet
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.engines.mlx_vlm import diagnosis, program, readiness, rules, unmet
from mlxproxy.engines.mlx_vlm.inspection import Inspector
from mlxproxy.engines.mlx_vlm.package import Package
from mlxproxy.engines.mlx_vlm.wire import MlxVlmWire

KEY_VARIABLE: Final = "MLX_VLM_SERVER_API_KEY"
KEY_BYTES: Final = 32
# While one prompt is read, the others wait for a step of this many tokens; its own default is 2048.
PREFILL_STEP: Final = 512


_OPTIONS: Final = {"embedding": "--embedding-model", "reranker": "--reranker-model"}
_FIRST: Final = {"embedding": readiness.embed, "reranker": readiness.rank}


class MlxVlm:
    """The engine of models that see, embed or rank.

    Its server would unload models, read folders, write files and fetch addresses for anybody who
    reaches its port, pages in a browser included: it demands a key that only this process knows.

    Args:
        server_bin: the setting VLM_SERVER_BIN.
        max_tokens: the limit for an answer whose request sets none.
    """

    name = program.NAME
    trusts_output = False  # it logs what clients and models say
    advice = diagnosis.ADVICE
    rules = rules.RULES

    def __init__(self, server_bin: Path | None, max_tokens: int) -> None:
        self._server_bin = server_bin
        self._max_tokens = max_tokens
        self._key = secrets.token_urlsafe(KEY_BYTES)
        self._wire = MlxVlmWire(self._key)

    @property
    def inspector(self) -> Inspector:
        """Return the inspector for the mlx-vlm to which the program belongs."""
        return Inspector(Package(program.package_of(self._server_bin)))

    @property
    def health(self) -> Probe:
        """Return the probe of a process that serves."""
        return readiness.health(self._wire.authorization)

    def command(self, spec: ModelSpec, address: Address) -> Command:
        """Return the command line.

        Raises:
            LoadFailed: the program is missing.
        """
        longest = min(self._max_tokens, spec.max_context or self._max_tokens)
        return Command(
            argv=(
                str(program.server_program(self._server_bin)),
                *(_OPTIONS.get(spec.model.type, "--model"), spec.path),
                *("--host", address.host),
                *("--port", str(address.port)),
                *("--max-tokens", str(longest)),
                *("--prefill-step-size", str(PREFILL_STEP)),
                *("--top-logprobs-k", str(rules.MAX_TOP_LOGPROBS)),
                *("--log-progress-interval", "0"),
                *(("--kv-bits", str(spec.tuning.kv_bits)) if spec.tuning.kv_bits else ()),
                *(("--enable-thinking",) if spec.enable_thinking else ()),
            ),
            environment={
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
                "PYTHONUNBUFFERED": "1",
                KEY_VARIABLE: self._key,
            },
            remedy="Set VLM_SERVER_BIN to a working mlx_vlm.server (`pip install mlx-vlm`).",
        )

    def stages(self, spec: ModelSpec) -> Sequence[Stage]:
        """Return the steps to readiness."""
        first = _FIRST.get(spec.model.type, readiness.chat)
        return (first(spec.path, self._wire.authorization),)

    def death_in(self, output: bytes) -> str | None:
        """Return None: what ends it ends the process."""
        return None

    def wire(self, has: Callable[[str], bool]) -> MlxVlmWire:
        """Return the wire, which knows how it spells requests and answers."""
        return self._wire

    def is_exclusive(self, request: Mapping[str, Any], has: Callable[[str], bool]) -> bool:
        """Return whether the backend answers this checked request alone."""
        return rules.is_exclusive(request)

    def unmet(
        self, request: Mapping[str, Any], spec: ModelSpec, has: Callable[[str], bool]
    ) -> Iterable[Unmet]:
        """Return the parts of a checked request that the answer will not honour."""
        return unmet.unmet(request, spec.model.capabilities)

    def examine(self) -> Examined:
        """Return whether the program works on this machine."""
        return program.examine(self._server_bin)
