"""What is on disk: every model in the folders, and the truth about each.

`catalog` keeps the list, with one `root_scanner` for each folder and its `scanning`. What a model
can do, whether it can be loaded and what it needs is for the engines to say (`inspector`), with the
help of what reads files here (`weights`, `template`).
"""

from mlxproxy.catalog.catalog import LONGEST_NAME, Catalog
from mlxproxy.catalog.model import Model

__all__ = ["LONGEST_NAME", "Catalog", "Model"]
