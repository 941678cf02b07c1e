"""An answer at a terminal: its lines end between words, though words arrive in pieces."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from rich.cells import cell_len

from mlxproxy.commands.wrapping import Wrapper

WIDTH = 20
TEXT = "The quick brown fox jumps over the lazy dog, whose name nobody knows any more."


def screen(pieces: Iterable[str], width: int = WIDTH) -> list[str]:
    """The lines that a terminal shows, which breaks those that are too long, too."""
    lines, wrapper = [""], Wrapper()
    for piece in pieces:
        erase, text = wrapper.feed(piece, width)
        kept = lines[-1]
        while erase:
            erase -= cell_len(kept[-1])
            kept = kept[:-1]
        assert erase == 0
        lines[-1] = kept
        for character in text:
            if character == "\n":
                lines.append("")
                continue
            if cell_len(lines[-1]) + cell_len(character) > width:
                lines.append("")
            lines[-1] += character
    return [line.rstrip() for line in lines]


def cut(text: str, seed: int) -> list[str]:
    chance, pieces = random.Random(seed), []
    while text:
        size = chance.randint(1, 6)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("seed", range(20))
def test_no_word_is_cut_in_whatever_pieces_it_arrives(seed: int) -> None:
    shown = screen(cut(TEXT, seed))
    assert shown == screen([TEXT])
    assert " ".join(shown) == TEXT
    assert max(map(len, shown)) < WIDTH


def test_a_piece_is_shown_as_soon_as_it_arrives() -> None:
    wrapper = Wrapper()
    assert wrapper.feed("It begins", WIDTH) == (0, "It begins")
    assert wrapper.feed(" to ans", WIDTH) == (0, " to ans")
    assert wrapper.feed("wering", WIDTH) == (3, "\nanswering")


def test_the_texts_own_lines_stay() -> None:
    text = "one\n\n  - two\n  - three\n"
    assert screen(cut(text, 1)) == text.split("\n")


def test_a_word_longer_than_a_line_is_left_to_the_terminal() -> None:
    path = "/a/path/that/is/much/longer/than/a/line"
    shown = screen(cut(f"see {path} there", 2))
    assert "".join(shown).replace(" ", "") == f"see{path}there"
    assert shown[-1].endswith("there")


def test_code_is_left_as_it_is() -> None:
    code = "```python\nvalue = function(argument, another) + something\n```\n"
    wrapper = Wrapper()
    printed = "".join(text for erase, text in (wrapper.feed(part, WIDTH) for part in cut(code, 3)))
    assert printed == code
    assert screen([code + TEXT])[-5:] == screen([TEXT])


def test_a_text_without_spaces_is_broken_between_characters() -> None:
    shown = screen(cut("日本語の文章には空白がないので、どこでも改行できます。", 4))
    assert len(shown) == 3
    assert max(map(cell_len, shown)) < WIDTH


def test_a_tab_takes_the_cells_up_to_its_stop() -> None:
    wrapper = Wrapper()
    assert wrapper.feed("a\tb\tcdef", WIDTH) == (0, "a\tb\t\ncdef")
