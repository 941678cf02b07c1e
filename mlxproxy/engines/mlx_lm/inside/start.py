"""Start `mlx_lm.server` from inside: `python start.py <mlx_lm.server> <its arguments>`.

The proxy runs this file with the backend's own Python, so the package is found beside it.
"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    sys.path[0] = str(folder.parent)
    importlib.import_module(f"{folder.name}.run").main()
