"""The messages of `mlx_vlm.server` when a load fails, and what the user can do about each.

Measured with mlx-vlm 0.7.10. Most come from the same libraries as those of mlx-lm.
"""

from __future__ import annotations

from typing import Final

from mlxproxy.engines.mlx_lm import diagnosis

ADVICE: Final[tuple[tuple[str, str], ...]] = (
    (
        r"Model type (\S+) not supported|No module named 'mlx_vlm\.models\.(\S+)'",
        "the installed mlx-vlm does not support the architecture. Update mlx-vlm, or choose "
        "another model.",
    ),
    (
        r"does not produce embeddings",
        "the installed mlx-vlm makes no embeddings with it. Choose another embedding model.",
    ),
    *diagnosis.ADVICE,
)
