"""Line wrapping between words while the words are still arriving."""

from __future__ import annotations

from rich.cells import cell_len

TAB_CELLS = 8
FENCE = "```"


class Wrapper:
    """The end of a text on a terminal, to which more text is added.

    A piece of a word is shown as soon as it arrives. If the word turns out not to fit, the piece
    is erased and the word starts again on the next line. The terminal itself breaks a word that is
    longer than a line, and lines of code, which must be copyable as they are.
    """

    def __init__(self) -> None:
        self._column = 0
        self._word = ""  # the end of the text: more of this word may arrive
        self._line_start = ""
        self._is_code = False

    def feed(self, text: str, width: int) -> tuple[int, str]:
        """Return how many cells before the cursor to erase, and what to print then.

        Args:
            text: may contain no control characters except tabs and newlines.
            width: the columns of the terminal.
        """
        shown = end = self._word
        for character in text:
            end = self._add(end, character, width - 1)  # after a full line, the cursor is nowhere
        if end.startswith(shown):
            return 0, end.removeprefix(shown)
        return cell_len(shown), end

    def _add(self, end: str, character: str, room: int) -> str:
        """Return the end of the text with one more character."""
        if character == "\n":
            if self._line_start == FENCE:
                self._is_code = not self._is_code
            self._column, self._word, self._line_start = 0, "", ""
            return end + character
        self._line_start = (self._line_start + character).lstrip()[: len(FENCE)]
        tab = TAB_CELLS - self._column % TAB_CELLS
        cells = tab if character == "\t" else cell_len(character)
        # A character two cells wide belongs to a script without spaces, or is an emoji.
        stands_alone = cells > 1 or character.isspace()
        word = "" if stands_alone else self._word
        before = self._column - cell_len(word)
        self._word = "" if stands_alone else self._word + character
        if self._column + cells > room and not self._is_code:
            if character.isspace():
                self._column = 0
                return end + "\n"
            if before and cell_len(word) + cells <= room:
                self._column = cell_len(word)
                end = f"{end.removesuffix(word)}\n{word}"
        self._column += cells
        return end + character
