"""The real `mlx_vlm.server`: an extra. Where it is missing, the tests that need it are skipped."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

# An environment of its own: `TEST_VLM_SERVER=…/bin/mlx_vlm.server make test`.
_CHOSEN = os.environ.get("TEST_VLM_SERVER")
_BESIDE = Path(sys.executable).parent / "mlx_vlm.server"
_FOUND = _CHOSEN or (_BESIDE if _BESIDE.is_file() else shutil.which("mlx_vlm.server"))
VLM_SERVER_BIN = Path(_FOUND) if _FOUND else None

needs_mlx_vlm = pytest.mark.skipif(
    VLM_SERVER_BIN is None,
    reason="mlx-vlm is not installed: `make install-vision`, or name its server in TEST_VLM_SERVER",
)
