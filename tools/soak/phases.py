"""The lives of a proxy during the soak."""

from __future__ import annotations

from dataclasses import dataclass

from tools.soak.ledger import STATUS

MODELS = ("alpha", "beta", "gamma", "delta")
LARGE = "delta"  # twice as large as each of the others
BROKEN = "broken"  # its load always fails
# Megabytes that a model is estimated to take: a little more than its process really does.
MODEL_MB, REAL_MODEL_MB = 64, 400
PROCESS_MB = 24  # of the stand-in without its model, at most
PLACES, QUEUE = 8, 16
IDLE = 5.0  # seconds

# No unloads and no crashes: no other error has a cause.
CALM = frozenset({"too_many_requests", "model_swapped", "load_failed", "no_model_loaded"})
ANY = frozenset(STATUS) - {"shutting_down"}


@dataclass(frozen=True)
class Phase:
    """One life of a proxy: whether backends crash and clients unload, and which errors may occur.

    Attributes:
        selection: the setting MODEL_SELECTION.
        codes: the codes of the errors that clients may get.
    """

    name: str
    selection: str
    faults: bool
    codes: frozenset[str]


PHASES = (
    Phase("swaps", "requested", False, CALM),
    Phase("faults-requested", "requested", True, ANY),
    Phase("faults-loaded", "loaded", True, ANY),
)
