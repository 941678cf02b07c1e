"""The proxy's overhead, measured against nginx and a direct connection in one run (`make bench`).

A stand-in that behaves like `mlx_lm.server` sends events that contain the time; a load generator
in a separate process records the time at which each one arrives. All contestants use the same
stand-in and take turns, round by round, so that other load on the machine affects them alike.
"""
