"""The models on disk: every model in the models folders, and what its files say about it.

`catalog` keeps the list, with one `root_scanner` per folder, which walks it with `scanning`. The
engines (`inspector`) decide what a model can do, whether it can be loaded and what it needs, with
the help of the modules that read its files (`weights`, `template`).
"""

from mlxproxy.catalog.catalog import LONGEST_NAME, Catalog
from mlxproxy.catalog.model import Model

__all__ = ["LONGEST_NAME", "Catalog", "Model"]
