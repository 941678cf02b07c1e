"""The entry point around `mlx_lm.server`: `python start.py <mlx_lm.server> <its arguments>`.

The proxy runs this file with the backend's own Python, so it finds the package by its own path.
"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    sys.path[0] = str(folder.parent)
    importlib.import_module(f"{folder.name}.run").main()
