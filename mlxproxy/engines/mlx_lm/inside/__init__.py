"""Code that runs in the backend's own process, next to `mlx_lm.server` itself.

Some faults cannot be seen or fixed from outside: a client that disconnects while nothing is sent to
it, a generation thread that hangs, a prompt of no tokens that aborts everybody's answers. `run.py`
starts the backend's program with the features below. Each is in a module of its own, with the names
of mlx-lm that it touches. A feature whose names are not as expected stays off; the others stay on.

Nothing here imports mlxproxy, since the backend's Python need not have it.
"""
