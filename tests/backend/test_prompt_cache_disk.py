"""The prompt cache on disk, with the real `mlx_lm.server` and a model for each kind of cache."""

from __future__ import annotations

import concurrent.futures
import errno
import importlib.metadata
import json
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from mlxproxy.engines.mlx_lm.inside import prompt_cache
from mlxproxy.engines.mlx_lm.inside.disk import cache as disk_cache
from mlxproxy.engines.mlx_lm.inside.disk import entry, store
from mlxproxy.engines.mlx_lm.inside.disk.cache import IDLE_SECONDS, Codec, Disk, Unsupported
from tests.support import random_models, tiny_models
from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.waiting import until

QUANTIZED = "quantized"  # the llama with `kv_bits`
SHORT, LONG = 300, 900  # tokens: within the window of the models that have one, and beyond it

pytest.importorskip("mlx.core")
pytestmark = pytest.mark.skipif(
    importlib.metadata.version("mlx-lm").startswith("0.31."),
    reason="mlx-lm 0.31 cannot make a cache from its state",
)


class Said(NamedTuple):
    """An answer, and how much of its prompt was not computed."""

    text: str
    prompt: int
    cached: int


def chat(first: str, *more: str) -> list[dict[str, str]]:
    """Return a conversation of these messages of a user, each answered with yes."""
    messages = [{"role": "user", "content": first}]
    for text in more:
        messages.append({"role": "assistant", "content": "Yes."})
        messages.append({"role": "user", "content": text})
    return messages


def ask(proxy: Proxy, model: str, messages: list[dict[str, str]], **fields: Any) -> Said:
    body = {"model": f"tiny/{model}", "messages": messages, "max_tokens": 12, **fields}
    answer = proxy.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    usage = found["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Said(found["choices"][0]["message"]["content"], usage["prompt_tokens"], cached)


def kept(proxy: Proxy) -> Path:
    return proxy.instance / "prompt-cache"


def files(proxy: Proxy) -> list[Path]:
    return sorted(kept(proxy).glob("*/*.kv"))


def warnings(proxy: Proxy) -> list[str]:
    """Return what the backend's log says is wrong with the prompt cache."""
    log = (proxy.instance / "logs" / "backend.log").read_text()
    return [line for line in log.splitlines() if "WARNING - Prompt cache: " in line]


def one_more(proxy: Proxy, before: int = 0) -> str:
    """Wait for a warning after the first `before` ones; it must be the only one."""
    found: list[str] = until(lambda: warnings(proxy)[before:], what="the warning")
    (line,) = found
    return line


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a model for each kind of cache, and one to swap to."""
    root = tmp_path_factory.mktemp("models")
    for arch in random_models.CONFIGS:
        random_models.build(root / "tiny" / arch, arch)
    random_models.build(root / "tiny" / QUANTIZED, "llama", seed=2)
    tiny_models.build(root / "tiny" / "beta", says="beta")
    return root


@pytest.fixture(scope="module")
def house(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    instance = tmp_path_factory.mktemp("proxy") / "instance"
    instance.mkdir()
    (instance / "config.py").write_text(f'MODELS = {{"tiny/{QUANTIZED}": {{"kv_bits": 8}}}}\n')
    proxy = Proxy(instance, root)
    try:
        yield proxy.start()
    finally:
        proxy.clean_up()


@pytest.fixture
def empty(house: Proxy) -> Proxy:
    """The proxy, with nothing loaded and nothing kept."""
    house.unload()
    shutil.rmtree(kept(house), ignore_errors=True)
    return house


def swap(proxy: Proxy) -> None:
    """Load another model, so that the process of the one before ends."""
    assert ask(proxy, "beta", chat("Hello!")).text.startswith("beta0")


# -- a conversation goes on after a swap


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("model", [*random_models.CONFIGS, QUANTIZED])
def test_after_a_swap_and_back_an_answer_is_the_same_and_its_prompt_is_not_read_again(
    empty: Proxy, model: str, length: int
) -> None:
    text = tiny_models.long_prompt(length)
    first, second = chat(text), chat(text, "And then?")
    read = ask(empty, model, first).prompt
    expected = ask(empty, model, second)
    other = ask(empty, model, chat(text[::-1], "And then?"))
    assert other.text != expected.text  # the answer depends on what was read before
    empty.unload()
    shutil.rmtree(kept(empty))

    ask(empty, model, first)
    swap(empty)
    found = ask(empty, model, second)
    assert found.text == expected.text
    if model == "llama4" and length == LONG:  # its chunk has moved on: it cannot be shortened
        assert found.cached < 256
    else:
        assert found.cached >= read - 2


@pytest.mark.parametrize("turns", [1, 2])
def test_the_same_prompt_again_is_read_but_for_its_end(empty: Proxy, turns: int) -> None:
    """The prompt as a whole is on disk; at least one token must be computed."""
    messages = chat(tiny_models.long_prompt(SHORT), *["And then?"] * (turns - 1))
    for model in ("llama", "qwen3_next"):
        expected = ask(empty, model, messages)
        swap(empty)
        found = ask(empty, model, messages)
        assert found.text == expected.text
        assert expected.prompt - 20 < found.cached < expected.prompt


def test_conversations_in_one_batch_each_find_their_own(
    empty: Proxy, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    system = tiny_models.long_prompt(550)
    texts = [f"{system}{number * 7919} {tiny_models.long_prompt(90)}" for number in range(1, 5)]

    def turn(*more: str) -> list[Said]:
        return list(pool.map(lambda text: ask(empty, "llama", chat(text, *more)), texts))

    before = turn()
    expected = turn("And then?")
    empty.unload()
    shutil.rmtree(kept(empty))
    turn()
    swap(empty)
    found = turn("And then?")
    assert [said.text for said in found] == [said.text for said in expected]
    assert len({said.text for said in found}) == 4
    for said, first in zip(found, before, strict=True):
        assert said.cached >= first.prompt - 2


def test_a_seeded_request_continues_too(empty: Proxy) -> None:
    text = tiny_models.long_prompt(SHORT)
    ask(empty, "llama", chat(text), seed=5, temperature=1)
    expected = ask(empty, "llama", chat(text, "And then?"), seed=5, temperature=1)
    swap(empty)
    found = ask(empty, "llama", chat(text, "And then?"), seed=5, temperature=1)
    assert found.text == expected.text
    assert found.cached >= expected.prompt - 20


def test_what_a_model_keeps_is_told(house: Proxy) -> None:
    assert {
        model: house.get(f"/v1/models/tiny/{model}").json()["capabilities"]["prompt_cache_disk"]
        for model in random_models.CONFIGS
    } == {
        "llama": "prefix",
        "gemma3_text": "window",
        "mamba2": "whole",
        "qwen3_next": "whole",
        "llama4": "window",
    }
    swap(house)
    assert "prompt_cache_disk" in house.loaded()["features"]
    assert "prompt_cache_disk" in house.loaded()["models"][0]["features"]


# -- it outlives what ends a process


def test_it_outlives_unload_restart_and_crash_of_the_proxy(
    start: Callable[..., Proxy], root: Path, tmp_path: Path
) -> None:
    text = tiny_models.long_prompt(SHORT)

    port = free_port()  # the next proxy looks for orphans on its own ports

    def started() -> Proxy:
        return start(root, instance=tmp_path / "instance", MLX_BACKEND_PORT=port)

    proxy = started()
    turns: list[str] = []
    expected = ask(proxy, "llama", chat(text))

    def goes_on(proxy: Proxy) -> None:
        nonlocal expected
        turns.append("And then?")
        found = ask(proxy, "llama", chat(text, *turns))
        assert found.cached >= expected.prompt - 2
        expected = found

    proxy.unload()
    goes_on(proxy)
    assert proxy.stop() == 0
    proxy = started()
    goes_on(proxy)
    proxy.stop(signal.SIGKILL)
    goes_on(started())


def test_nobody_else_can_read_it(empty: Proxy) -> None:
    ask(empty, "llama", chat(tiny_models.long_prompt(SHORT)))
    empty.unload()
    found = files(empty)
    assert found
    for file in kept(empty).glob("*/*"):
        assert file.stat().st_mode & 0o777 == 0o600
    for folder in (kept(empty), found[0].parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_longer_conversation_replaces_the_shorter_one(empty: Proxy) -> None:
    text = tiny_models.long_prompt(SHORT)
    words = ask(empty, "llama", chat(text)).prompt
    empty.unload()
    (file,) = files(empty)
    ask(empty, "llama", chat(text))  # with its own answer, it begins with the same tokens
    prompt = f"{text} {tiny_models.long_prompt(40)}"
    ask(empty, "llama", chat(prompt))
    empty.unload()
    with store.reading(file) as opened:
        assert entry.read_head(opened).length > words
    assert len(files(empty)) == 2


def test_a_model_whose_files_have_changed_finds_nothing(empty: Proxy, root: Path) -> None:
    messages = chat(tiny_models.long_prompt(SHORT))
    ask(empty, "llama", messages)
    empty.unload()
    assert len(files(empty)) == 1
    weights = root / "tiny" / "llama" / "model.safetensors"
    random_models.build(weights.parent, "llama", seed=3)
    try:
        assert ask(empty, "llama", messages).cached < 256
    finally:
        random_models.build(weights.parent, "llama")


# -- faults


def test_a_damaged_file_is_deleted_and_the_prompt_read_again(empty: Proxy) -> None:
    text = tiny_models.long_prompt(SHORT)
    ask(empty, "llama", chat(text))
    expected = ask(empty, "llama", chat(text, "And then?"))
    empty.unload()
    damaged = files(empty)
    for file in damaged:
        content = bytearray(file.read_bytes())
        content[-1000] ^= 1
        file.write_bytes(content)
    before = len(warnings(empty))
    found = ask(empty, "llama", chat(text, "And then?"))
    assert found.text == expected.text
    assert found.cached < 256
    assert not damaged[-1].exists() or not damaged[0].exists()
    assert "its checksum is wrong" in one_more(empty, before)


def test_foreign_and_broken_files_do_no_harm(empty: Proxy) -> None:
    messages = chat(tiny_models.long_prompt(SHORT))
    expected = ask(empty, "llama", messages)
    empty.unload()
    (file,) = files(empty)
    folder = file.parent
    file.write_bytes(file.read_bytes()[:-1])
    (folder / "empty.kv").touch()
    (folder / "folder.kv").mkdir()
    (folder / "link.kv").symlink_to("/dev/zero")
    (folder / "notes.txt").write_text("mine")
    (kept(empty) / "foreign").write_text("mine")
    before = len(warnings(empty))
    assert ask(empty, "llama", messages).text == expected.text
    assert "deleted 2 damaged files" in one_more(empty, before)
    assert (folder / "notes.txt").exists()
    assert (kept(empty) / "foreign").exists()


def test_with_no_room_nothing_is_kept_and_everybody_is_answered(
    start: Callable[..., Proxy], root: Path
) -> None:
    proxy = start(root, PROMPT_CACHE_DISK="1")
    for number in range(3):
        ask(proxy, "llama", chat(f"{number} {tiny_models.long_prompt(SHORT)}"))
    proxy.unload()
    assert not files(proxy)
    assert "larger than PROMPT_CACHE_DISK" in one_more(proxy)


def test_a_folder_that_cannot_be_made_does_no_harm(start: Callable[..., Proxy], root: Path) -> None:
    proxy = start(root)
    kept(proxy).write_text("in the way")
    ask(proxy, "llama", chat(tiny_models.long_prompt(SHORT)))
    assert proxy.unload().status_code == 200
    assert "a prompt was not written" in one_more(proxy)
    assert kept(proxy).read_text() == "in the way"


def test_turned_off_nothing_is_written(start: Callable[..., Proxy], root: Path) -> None:
    proxy = start(root, PROMPT_CACHE_DISK="0")
    ask(proxy, "llama", chat(tiny_models.long_prompt(SHORT)))
    assert "prompt_cache_disk" not in proxy.loaded()["features"]
    proxy.unload()
    assert not kept(proxy).exists()


def test_two_proxies_share_it(start: Callable[..., Proxy], root: Path, tmp_path: Path) -> None:
    both = [start(root, instance=tmp_path / "instance") for _ in range(2)]
    messages = chat(tiny_models.long_prompt(SHORT))
    (expected,) = {ask(proxy, "llama", messages) for proxy in both}
    threads = [threading.Thread(target=proxy.unload) for proxy in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files(both[0])) == 1
    for proxy in both:
        found = ask(proxy, "llama", messages)
        assert found.text == expected.text
        assert found.cached >= expected.prompt - 2


# -- when it is written


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Desk(NamedTuple):
    """The feature in this process, with caches of the real mlx-lm."""

    disk: Disk
    store: store.Store
    clock: Clock
    busy: threading.Event

    def insert(self, number: int, length: int = 300) -> Any:
        """Insert an entry whose tokens and arrays are the number; return its caches."""
        import mlx.core as mx
        from mlx_lm.models.cache import KVCache

        made = KVCache()
        made.update_and_fetch(*[mx.full((1, 1, length, 4), float(number))] * 2)
        mx.eval(made.state)
        self.disk.inserted(KEY, [number] * length, [made], "user")
        return made

    def kept(self) -> list[int]:
        """Return the numbers of the entries on disk."""
        numbers = []
        for stored in self.store.entries():
            with store.reading(stored.path) as file:
                numbers.append(entry.unpacked(entry.read_head(file).tokens)[0])
        return sorted(numbers)


KEY = ("/models/ada", None, None)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    import mlx.core as mx
    from mlx_lm.models import cache

    kept, clock, busy = store.Store(tmp_path / "kept", 1 << 30), Clock(), threading.Event()
    disk = Disk(kept, Codec(cache, mx), "ada", {}, 8.0, busy.is_set, pytest.fail, clock)
    disk.open(KEY, "fingerprint", [cache.KVCache()])
    return Desk(disk, kept, clock, busy)


def test_entries_are_written_once_nothing_has_been_asked_for_a_while(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    woken = threading.Semaphore(0)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        woken.acquire()

    monkeypatch.setattr(disk_cache, "time", SimpleNamespace(sleep=sleep))
    threading.Thread(target=desk.disk.run, daemon=True).start()
    held = [desk.insert(1), desk.insert(2)]
    until(lambda: len(slept) == 1, what="the wait")
    assert slept[0] == pytest.approx(IDLE_SECONDS)
    assert desk.kept() == []
    desk.busy.set()
    desk.clock.now = IDLE_SECONDS + 1
    woken.release()
    until(lambda: len(slept) == 2, what="the wait for the answer in flight")
    assert desk.kept() == []
    desk.busy.clear()
    woken.release()
    until(lambda: desk.kept() == [1, 2], what="the files")
    assert held


def test_what_memory_has_dropped_is_not_written(desk: Desk) -> None:
    held = desk.insert(1)
    desk.insert(2)
    desk.disk.finish()
    assert desk.kept() == [1]
    assert held


def test_at_the_end_the_newest_are_written_first_and_only_while_there_is_time(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [desk.insert(number) for number in (1, 2, 3)]
    write = entry.write

    def slow_write(*arguments: Any) -> None:
        write(*arguments)
        desk.clock.now += 0.6  # of a second and a little that three small entries are allowed

    monkeypatch.setattr(entry, "write", slow_write)
    desk.disk.finish()
    assert desk.kept() == [2, 3]
    assert held


def test_an_entry_that_takes_too_long_is_given_up(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = desk.insert(1)
    crc32 = zlib.crc32

    def slow_disk(*arguments: Any) -> int:
        desk.clock.now += 10
        return crc32(*arguments)

    monkeypatch.setattr(entry.zlib, "crc32", slow_disk)
    desk.disk.finish()
    assert desk.kept() == []
    assert list((desk.store.root / "fingerprint").iterdir()) == [
        desk.store.root / "fingerprint" / store.ABOUT
    ]
    assert held


def test_a_full_disk_costs_an_entry_and_one_line(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(entry, "write", full)
    held = [desk.insert(1), desk.insert(2)]
    desk.disk.finish()
    assert desk.kept() == []
    (line,) = caplog.messages
    assert "No space left on device" in line
    assert held


def test_images_and_short_prompts_are_not_kept(desk: Desk) -> None:
    held = [desk.insert(-1), desk.insert(1, length=255), desk.insert(2, length=256)]
    desk.disk.finish()
    assert desk.kept() == [2]
    assert held


def test_an_architecture_with_a_cache_of_its_own_is_told(desk: Desk) -> None:
    class LayerCache:
        pass

    with pytest.raises(Unsupported, match="a cache of its own \\(LayerCache\\)"):
        desk.disk.open(KEY, "fingerprint", [LayerCache()])


def test_an_entry_in_memory_does_not_hold_the_memory_of_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlx.core as mx
    from mlx_lm.models import cache

    for name in ("fetch_nearest_cache", "insert_cache"):
        monkeypatch.setattr(cache.LRUPromptCache, name, getattr(cache.LRUPromptCache, name))
    prompt_cache.arm(cache)
    before = mx.get_active_memory()
    batch = mx.zeros((1, 1, 1 << 20, 4))
    mx.eval(batch)
    kept, part = cache.LRUPromptCache(), cache.KVCache()
    part.state = (batch[..., :64, :], batch[..., 64:128, :], 64)
    kept.insert_cache("model", [1, 2], [part])
    del batch
    assert mx.get_active_memory() - before < 1 << 20


# -- several processes


WRITER = """
import sys
from pathlib import Path
from mlxproxy.engines.mlx_lm.inside.disk import entry, store
folder = Path(sys.argv[1])
print(flush=True)
while True:
    for number in range(4):
        tokens = entry.packed([number] * 300)
        head = entry.Head(tokens, "user", False, [], [("uint8", (1 << 22,))] * 2)
        path = folder / store.name_of(tokens)
        with store.writing(path) as file:
            entry.write(file, head, [bytes([number]) * (1 << 22)] * 2)
"""


def test_processes_that_are_killed_while_they_write_leave_whole_files(tmp_path: Path) -> None:
    def write() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    for _ in range(3):
        writers = [write() for _ in range(2)]
        for writer in writers:
            assert writer.stdout
            writer.stdout.readline()
        until(lambda: len(list(tmp_path.glob("*.kv"))) == 4, what="the files")
        for writer in writers:
            writer.kill()
            writer.communicate()
        for file in tmp_path.glob("*.kv"):
            with store.reading(file) as opened:
                entry.read(opened, lambda kind, content: None)


def test_the_backend_killed_while_it_writes_costs_nothing_else(empty: Proxy) -> None:
    text = tiny_models.long_prompt(SHORT)
    messages = chat(text)
    expected = ask(empty, "llama", messages)
    empty.unload()
    (file,) = files(empty)
    part = file.with_name(f"{file.name}.1{store.PART}")
    part.write_bytes(file.read_bytes()[:5000])
    file.unlink()
    found = ask(empty, "llama", messages)
    assert (found.text, found.cached < 256) == (expected.text, True)
    assert json.loads((file.parent / store.ABOUT).read_text())["model"] == "tiny/llama"
