"""mlxproxy serves the MLX models of an LM Studio folder through `mlx_lm.server`."""

__version__ = "0.1.0"
