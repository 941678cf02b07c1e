"""`mlx_lm.server`, the backend of text models."""
