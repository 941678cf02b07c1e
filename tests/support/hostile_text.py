"""Text that takes over a terminal, and the text that may be left of it."""

from __future__ import annotations

NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eevil\u2028\x85\b\x00"

CLEAN = "]0;owned[2J31mevil"
