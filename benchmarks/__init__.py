"""What the proxy adds: measured against nginx and a direct connection, in one run (`make bench`).

A stand-in that speaks as `mlx_lm.server` does sends events with the time in them; a load generator
in a process of its own takes the time at which each arrives. All contestants stand before the same
stand-in and take turns, round by round, so that whatever else the machine does meets them alike.
"""
