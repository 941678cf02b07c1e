"""Text made fit for a terminal, a log and an error message, whoever has written it."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import IO

# What a terminal would obey (C0 and C1 but for the line's end and the tab), what turns the
# direction of the text around it (Unicode's embeddings, overrides and isolates), what other
# programs take for the end of a line, and halves of characters that no file can hold.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# What is quoted and has a slash; else from a first slash to the last: folders have spaces in their
# names. What follows a letter is no path (user/assistant), nor is an endpoint.
_PATH = re.compile(r"""(['"])[^'"]*/[^'"]*\1|(?<![\w.])/(?!v1/)[^'":,;()\n]*/[^\s'":,;()]*""")


def harmless(text: str) -> str:
    """Return the text without what a terminal would obey: a model may have been made to say it."""
    return _HARMFUL.sub("", text)


def harmless_json(text: str) -> str:
    r"""Return the JSON with the same characters as ``\uXXXX``: it stays the same value."""
    return _HARMFUL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def without_paths(text: str) -> str:
    """Return the text with each path of this machine as an ellipsis."""
    return _PATH.sub("…", text)


def wrapped(text: str, stream: IO[str], indent: int = 0) -> str:
    """Return the text in lines that fit the stream's terminal; unchanged if it has none.

    Lines end between words: a path or a command that is cut in two cannot be copied.

    Args:
        indent: spaces before each line but the first of its paragraph.
    """
    if not stream.isatty():
        return text
    return "\n".join(
        textwrap.fill(
            line,
            width(),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )


def width() -> int:
    """Return the columns of the terminal."""
    return shutil.get_terminal_size().columns
