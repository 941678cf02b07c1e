"""A second kind of backend, as unlike `mlx_lm.server` as it may be: the proof of the seam.

`server.py` is its program, `engine.py` what the proxy knows of it. Run as a module, this is a proxy
that has both engines: their list is all that is told to the rest of mlxproxy.
"""
