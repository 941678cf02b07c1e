"""What is on disk: every model in the folders, and the truth about each.

`catalog` keeps the list, with one `shelf` for each folder and its `scanning`; `inspection` puts
together what the files of one model tell (`weights`, `kvcache`, `template`, `capabilities`), by
mlx-lm's own tables (`mlxlm`); `memory` estimates whether it fits.
"""

from mlxproxy.catalog.catalog import LONGEST_NAME, Catalog
from mlxproxy.catalog.model import Model

__all__ = ["LONGEST_NAME", "Catalog", "Model"]
