"""`mlx_vlm.server`, the backend of models that see, embed or rank."""
