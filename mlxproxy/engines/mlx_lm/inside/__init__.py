"""What runs in the backend's own process, beside `mlx_lm.server` itself.

Some faults cannot be seen or mended from outside: a client that leaves while nothing is sent to it,
a generation thread that hangs, a prompt of no tokens that ends everybody's answers. `run.py` starts
the backend's program with the features below, each in a module of its own, each with the names of
mlx-lm that it touches. A feature whose names are not as expected stays off, and the rest goes on.

Nothing here imports mlxproxy, which the backend's Python need not have.
"""
