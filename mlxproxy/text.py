"""Text from any source, made safe for a terminal, a log and an error message."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import IO

# Characters that a terminal would obey (C0 and C1 except the newline and the tab), that change the
# direction of the text around them (Unicode's embeddings, overrides and isolates), that other
# programs take for the end of a line, and halves of surrogate pairs, which no file can hold.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Quoted text with a slash; otherwise, text from the first slash to the last: folder names contain
# spaces. After a letter, a slash begins no path (user/assistant); an endpoint is no path either.
_PATH = re.compile(r"""(['"])[^'"]*/[^'"]*\1|(?<![\w.])/(?!v1/)[^'":,;()\n]*/[^\s'":,;()]*""")


def harmless(text: str) -> str:
    """Return the text without what a terminal would obey: a model may be made to emit it."""
    return _HARMFUL.sub("", text)


def harmless_json(text: str) -> str:
    r"""Return the JSON with the same characters as ``\uXXXX``, which keeps its value the same."""
    return _HARMFUL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def without_paths(text: str) -> str:
    """Return the text with each path on this machine replaced by an ellipsis."""
    return _PATH.sub("…", text)


def wrapped(text: str, stream: IO[str], indent: int = 0) -> str:
    """Return the text wrapped to the width of the stream's terminal; unchanged if it is none.

    Lines are broken between words: a path or a command that is split cannot be copied.

    Args:
        indent: spaces before each line of a paragraph except the first.
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
    """Return the width of the terminal in columns."""
    return shutil.get_terminal_size().columns
