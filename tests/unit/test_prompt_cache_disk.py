"""The files of the prompt cache on disk: their format, index, budget and folder names."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy.cli import main
from mlxproxy.engines.mlx_lm import prompt_disk
from mlxproxy.engines.mlx_lm.inside.disk import entry, index, store
from mlxproxy.engines.mlx_lm.inside.disk.fingerprint import NoFolder, files, fingerprint
from mlxproxy.engines.mlx_lm.inside.disk.index import BLOCK, LEAST_GAIN, Index
from mlxproxy.engines.mlx_lm.prompt_disk import PromptDisk

# -- the format

TOKENS = entry.packed(range(300))
ARRAYS = [("bfloat16", (1, 2, 3)), ("bool", (0, 4)), ("uint8", (5,))]
CONTENTS = [bytes(range(12)), b"", b"12345"]
HEAD = entry.Head(TOKENS, "user", True, [{"class": "KVCache", "state": [None, 1.5]}], ARRAYS)


def written(path: Path, head: entry.Head = HEAD, contents: Any = CONTENTS) -> Path:
    with store.writing(path) as file:
        entry.write(file, head, contents)
    return path


def read(path: Path) -> tuple[entry.Head, list[bytes]]:
    contents: list[bytes] = []
    with store.reading(path) as file:
        head = entry.read(file, lambda kind, content: contents.append(bytes(content)))
    return head, contents


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "one.kv")
    assert read(path) == (HEAD, CONTENTS)
    assert path.stat().st_size == HEAD.file_bytes()
    with store.reading(path) as file:
        assert entry.read_head(file) == HEAD
    assert entry.unpacked(HEAD.tokens) == list(range(300))


def test_a_file_in_which_any_byte_has_changed_is_rejected(tmp_path: Path) -> None:
    path = written(tmp_path / "one.kv")
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 7):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(entry.Damaged):
                read(path)


def test_a_file_of_any_other_length_is_rejected_without_being_read(tmp_path: Path) -> None:
    path = written(tmp_path / "one.kv")
    whole = path.read_bytes()
    for damaged in (*(whole[:length] for length in range(len(whole))), whole + b"\0"):
        path.write_bytes(damaged)
        with store.reading(path) as file, pytest.raises(entry.Damaged):
            entry.read_head(file)


@given(st.binary(max_size=200), st.booleans())
def test_noise_is_rejected(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, ours: bool
) -> None:
    path = tmp_path_factory.mktemp("noise") / "noise.kv"
    length = len(noise).to_bytes(8, "little")
    path.write_bytes(entry.MAGIC + length + noise if ours else noise)
    with pytest.raises(entry.Damaged):
        read(path)


HEADERS: list[dict[str, Any]] = [
    {"tokens": -1},
    {"tokens": True},
    {"tokens": 1 << 62},
    {"arrays": [["float3", [1]]]},
    {"arrays": [["uint8", [-5]]]},
    {"arrays": [["uint8", [1 << 50]]]},
    {"arrays": [["uint8"]]},
    {"arrays": 5},
    {"caches": 5},
]


@pytest.mark.parametrize("changed", HEADERS, ids=str)
def test_a_header_that_makes_no_sense_is_rejected(tmp_path: Path, changed: dict[str, Any]) -> None:
    values = {"tokens": 300, "kind": "user", "whole": True, "caches": [], "arrays": []}
    header = json.dumps({**values, **changed}).encode()
    path = tmp_path / "one.kv"
    path.write_bytes(
        entry.MAGIC + len(header).to_bytes(8, "little") + header + TOKENS + b"\0\0\0\0"
    )
    with store.reading(path) as file, pytest.raises(entry.Damaged):
        entry.read_head(file)


def test_a_file_that_shrinks_while_it_is_read_is_rejected(tmp_path: Path) -> None:
    path = written(tmp_path / "one.kv")
    with store.reading(path) as file:
        shrinks: Any = SimpleNamespace(
            fileno=file.fileno, read=file.read, readinto=lambda content: len(content) - 1
        )
        with pytest.raises(entry.Damaged):
            entry.read(shrinks, lambda kind, content: None)


def test_arrays_other_than_announced_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes of arrays"):
        written(tmp_path / "one.kv", contents=[b"too short"])
    assert not list(tmp_path.iterdir())


# -- the index


def index_of(*entries: tuple[str, list[int], bool]) -> Index:
    made = Index()
    for name, tokens, whole in entries:
        made.add(name, entry.packed(tokens), whole)
    return made


def longest(made: Index, tokens: list[int], cached: int = 0) -> tuple[str, int] | None:
    match = made.longest(entry.packed(tokens), cached)
    return None if match is None else (match.name, match.common)


SYSTEM = list(range(600))


def test_of_many_conversations_with_one_beginning_each_finds_its_own() -> None:
    tails = {f"chat {number}": [*SYSTEM, *[number] * 90] for number in range(1000, 1004)}
    made = index_of(*((name, tokens, False) for name, tokens in tails.items()))
    for name, tokens in tails.items():
        assert longest(made, [*tokens, 7, 8]) == (name, 690)


def test_an_entry_that_can_be_shortened_serves_any_prompt_with_its_beginning() -> None:
    made = index_of(("one", [*SYSTEM, 1, 2], False))
    assert longest(made, SYSTEM[:500]) == ("one", 499)  # one token is left to compute
    assert longest(made, [*SYSTEM[:300], 9, 9]) == ("one", 300)
    assert longest(made, [9, *SYSTEM]) is None


def test_an_entry_that_cannot_be_shortened_serves_only_prompts_that_begin_with_all_of_it() -> None:
    made = index_of(("system", SYSTEM, True), ("user", [*SYSTEM, *[5] * 80], True))
    assert longest(made, [*SYSTEM, 6]) == ("system", 600)
    assert longest(made, [*SYSTEM, *[5] * 80, 6]) == ("user", 680)
    assert longest(made, SYSTEM) is None
    assert longest(made, SYSTEM[:500]) is None


def test_reading_must_be_worth_it() -> None:
    made = index_of(("short", SYSTEM, False), ("long", [7] * 20_000, False))
    assert longest(made, [*SYSTEM, 6], cached=600 - LEAST_GAIN) == ("short", 600)
    assert longest(made, [*SYSTEM, 6], cached=601 - LEAST_GAIN) is None
    assert longest(made, [*[7] * 1200, 6]) is None  # a sixteenth of it are 1250
    assert longest(made, [*[7] * 1300, 6]) == ("long", 1300)
    assert longest(made, [*[7] * 1300, 6], cached=100) is None


def test_equal_hashes_alone_give_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    same = SimpleNamespace(digest=lambda: b"same")
    monkeypatch.setattr(index, "blake2b", lambda *_, **__: same)
    made = index_of(("one", [1] * 600, False), ("two", [2] * 600, True))
    assert longest(made, [3] * 700) is None
    assert longest(made, [1] * 700) == ("one", 600)
    made.discard("one")
    assert longest(made, [2] * 700) == ("two", 600)


def test_what_is_discarded_is_not_found_again() -> None:
    made = index_of(("one", SYSTEM, False), ("two", SYSTEM[:300], True))
    made.discard("one")
    made.discard("unknown")
    assert longest(made, [*SYSTEM, 1]) == ("two", 300)
    made.discard("two")
    assert longest(made, [*SYSTEM, 1]) is None
    assert len(made) == 0
    assert not made._through
    assert not made._ends


def test_a_longer_entry_makes_shorter_ones_superfluous() -> None:
    made = index_of(
        ("short", SYSTEM[:300], False),
        ("whole", SYSTEM[:400], True),
        ("other", [*SYSTEM[:300], 9], False),
    )
    assert made.beginnings(entry.packed(SYSTEM)) == ["short"]
    assert made.covers(entry.packed(SYSTEM[:300]))
    assert not made.covers(entry.packed(SYSTEM[:302]))


piece = st.sampled_from([[1] * 130, [2] * 130, [1] * 256, [3]])
prompt = st.lists(piece, max_size=8).map(lambda pieces: [*itertools.chain(*pieces)])


@given(st.lists(st.tuples(prompt, st.booleans()), max_size=8), prompt, st.integers(0, 300))
def test_the_index_finds_what_a_comparison_with_each_entry_finds(
    entries: list[tuple[list[int], bool]], asked: list[int], cached: int
) -> None:
    made = index_of(*((str(n), tokens, whole) for n, (tokens, whole) in enumerate(entries)))

    def worth(tokens: list[int], whole: bool) -> int:
        common = 0
        while common < min(len(tokens), len(asked)) and tokens[common] == asked[common]:
            common += 1
        if common < BLOCK or (whole and not common == len(tokens) < len(asked)):
            return 0
        common = min(common, len(asked) - 1)
        return common if common - cached >= max(LEAST_GAIN, len(tokens) / 16) else 0

    best = max((worth(*each) for each in entries), default=0)
    found = longest(made, asked, cached)
    assert (0 if found is None else found[1]) == best


# -- the folder


def shelf(kept: store.Store, name: str = "fingerprint") -> Path:
    return kept.folder(name, {"model": name})


def put(folder: Path, name: str, size: int, age: float) -> Path:
    path = folder / f"{name}.kv"
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_files_and_folders_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "kept").mkdir(mode=0o777)
        folder = shelf(store.Store(tmp_path / "kept", 1 << 30))
        written(folder / "one.kv")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "kept").rglob("*")}
    assert modes == {"fingerprint": 0o700, "about.json": 0o600, "one.kv": 0o600}
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700


def test_the_longest_unused_of_all_models_make_room(tmp_path: Path) -> None:
    kept = store.Store(tmp_path / "kept", 1000)
    ada, bob = shelf(kept, "ada"), shelf(kept, "bob")
    old, used = put(ada, "old", 300, 50), put(ada, "used", 300, 60)
    new = put(bob, "new", 300, 10)
    store.used(used)
    assert kept.make_room(100) == []
    assert kept.make_room(400) == [old]
    assert kept.make_room(800) == [new, used]
    assert kept.entries() == []
    with pytest.raises(store.NoRoom, match="larger than PROMPT_CACHE_DISK"):
        kept.make_room(1001)


def test_nothing_is_deleted_for_an_entry_that_does_not_fit(tmp_path: Path) -> None:
    kept = store.Store(tmp_path / "kept", 1000)
    old = put(shelf(kept), "old", 300, 50)
    with pytest.raises(store.NoRoom):
        kept.make_room(2000)
    assert old.exists()


def test_an_almost_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = store.RESERVE_BYTES + 500
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    kept = store.Store(tmp_path / "kept", 1 << 40)
    old = put(shelf(kept), "old", 300, 50)
    assert kept.make_room(400) == []
    assert kept.make_room(600) == [old]
    with pytest.raises(store.NoRoom, match="almost full"):
        kept.make_room(600)


def test_tiny_entries_do_not_become_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_ENTRIES", 3)
    kept = store.Store(tmp_path / "kept", 1 << 30)
    oldest, *_ = [put(shelf(kept), str(age), 1, age) for age in (30, 20, 10)]
    assert kept.make_room(1) == [oldest]


def test_what_a_killed_process_has_left_is_swept_up_after_a_while(tmp_path: Path) -> None:
    kept = store.Store(tmp_path / "kept", 1000)
    folder, empty = shelf(kept), shelf(kept, "empty")
    stale, fresh, entry_ = (folder / name for name in ("a.kv.1.part", "b.kv.2.part", "c.kv"))
    for path in (stale, fresh, entry_):
        path.touch()
    long_ago = (time.time() - store.STALE_SECONDS - 1,) * 2
    for path in (stale, entry_, empty, folder):
        os.utime(path, long_ago)
    kept.sweep()
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", fresh.name, "c.kv"]
    assert not empty.exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "one.kv"
    with pytest.raises(ValueError, match="bytes of arrays"):
        written(path, contents=(seen for seen in [b"half"] if not path.exists()))
    assert list(tmp_path.iterdir()) == []
    path.with_name(f"one.kv.{os.getpid()}.part").write_bytes(b"of a process with the same number")
    assert read(written(path)) == (HEAD, CONTENTS)
    assert list(tmp_path.iterdir()) == [path]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.kv")
    (tmp_path / "device.kv").symlink_to("/dev/zero")
    (tmp_path / "link.kv").symlink_to(__file__)
    (tmp_path / "folder.kv").mkdir()
    assert store.entries(tmp_path) == []
    for path in tmp_path.iterdir():
        with pytest.raises(OSError, match=path.name):
            store.reading(path)


# -- the name of a model's folder


def test_the_name_changes_with_everything_that_an_entry_depends_on(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    os.utime(weights, (1, 1))
    names = [fingerprint({"model": files(str(tmp_path))})]

    def changed(**other: Any) -> None:
        names.append(fingerprint({"model": files(str(tmp_path)), **other}))

    changed()
    assert names[0] == names[1]
    weights.write_bytes(b"12345")
    os.utime(weights, (1, 1))
    changed()
    weights.write_bytes(b"54321")
    changed()
    (tmp_path / "tokenizer.json").touch()
    changed()
    changed(options={"kv_bits": 8})
    changed(options={"kv_bits": 4})
    changed(versions={"mlx": "1"})
    assert len(set(names)) == len(names) - 1
    (tmp_path / ".DS_Store").touch()  # made by whoever looks at the folder
    changed()
    assert names[-1] in names[:-1]


def test_a_model_that_is_no_folder_has_no_name(tmp_path: Path) -> None:
    with pytest.raises(NoFolder):
        files("mlx-community/somewhere")
    assert files(None) is None


# -- the budget


@pytest.mark.parametrize(
    ("setting", "free", "expected"),
    [
        (None, 1000, 120),
        (None, 1 << 50, prompt_disk.DEFAULT_BYTES),
        (0.5, 1000, 600),
        (777, 1000, 777),
        (0, 1000, 0),
    ],
)
def test_the_budget_is_a_part_of_the_disk_that_is_free_or_already_taken_by_entries(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: int | float | None,
    free: int,
    expected: int,
) -> None:
    kept = PromptDisk(tmp_path / "kept", setting, stop_timeout=10.0)
    put(shelf(store.Store(kept.folder, 0)), "old", 200, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert kept.bytes() == expected


def test_a_backend_is_told_where_how_much_and_how_long() -> None:
    kept = PromptDisk(Path("/nowhere/kept"), 777, stop_timeout=10.0)
    assert kept.options("tiny/ada") == {
        "folder": "/nowhere/kept",
        "bytes": 777,
        "stop_seconds": 8.0,
        "model": "tiny/ada",
    }
    assert PromptDisk(Path("/nowhere/kept"), 0, 10.0).options("tiny/ada") is None
    shortest = PromptDisk(Path("/nowhere"), 1, 1.0).options("tiny/ada")
    assert shortest is not None
    assert shortest["stop_seconds"] == 0


# -- the command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["cache", *arguments])


@pytest.fixture
def library(home: Path) -> Path:
    """What three versions of two models have left."""
    kept = store.Store(home / "instance" / "prompt-cache", 1 << 30)
    (home / "instance").mkdir()
    for number, model in enumerate(("org/ada", "org/ada", "org/bob")):
        folder = kept.folder(str(number), {"model": model})
        put(folder, "one", 1_000_000, 600.0 * (number + 1))
    put(kept.root / "2", "two", 500, 9000.0)
    shelf(kept, "empty")
    return kept.root


def test_the_list_says_how_much_each_model_has(library: Path) -> None:
    lines = [line.split() for line in run("ls").output.splitlines()]
    assert lines == [
        ["MODEL", "PROMPTS", "SIZE", "LAST", "USED"],
        ["org/ada", "2", "2", "MB", "10", "min", "ago"],
        ["org/bob", "2", "1", "MB", "30", "min", "ago"],
    ]
    told = json.loads(run("ls", "--json").output)
    assert [(each["model"], each["prompts"], each["size_bytes"]) for each in told] == [
        ("org/ada", 2, 2_000_000),
        ("org/bob", 2, 1_000_500),
    ]


def test_one_models_prompts_are_deleted_or_all(library: Path) -> None:
    assert run("clear", "org/ada").output == "Deleted 2 prompts (2 MB).\n"
    assert [each["model"] for each in json.loads(run("ls", "--json").output)] == ["org/bob"]
    assert run("clear").output == "Deleted 2 prompts (1 MB).\n"
    assert json.loads(run("ls", "--json").output) == []
    assert run("clear").output == "Deleted 0 prompts (0 bytes).\n"
    assert not list(library.rglob("*.kv"))


def test_a_name_of_which_nothing_is_kept_is_told_what_there_is(library: Path) -> None:
    failed = run("clear", "ada")
    assert failed.exit_code == 1
    assert "org/ada, org/bob" in failed.output


def test_files_of_others_are_not_deleted(library: Path) -> None:
    (library / "0" / "notes.txt").write_text("mine")
    assert run("clear").exit_code == 0
    assert (library / "0" / "notes.txt").exists()


def test_with_nothing_kept_the_list_says_so(home: Path) -> None:
    assert "No prompts are kept" in run("ls").output
    assert run("ls", "--json").output == "[]\n"
