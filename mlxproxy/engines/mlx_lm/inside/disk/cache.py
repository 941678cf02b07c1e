"""What connects the files of entries with mlx-lm's prompt cache.

Entries are found and read by the generation thread, since what is computed there must be made
there. They are written by a thread of its own, which calls nothing of MLX: it copies the memory of
arrays that are computed and that nobody changes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import gate
from ..prompt_cache import flat
from . import entry, store
from .fingerprint import NoFolder, files, fingerprint
from .index import BLOCK, LEAST_GAIN, Index

IDLE_SECONDS = 25.0  # without a request, until entries are written
LOOK_SECONDS = 1.0
# A stop may be delayed by this much, and by as much for each gigabyte.
STOP_SECONDS = 1.0
PENDING = 64  # entries; mlx-lm keeps ten in memory
GIGABYTE = 1e9

CACHE_NAMES: gate.Names = {
    "LRUPromptCache.fetch_nearest_cache": ("self", "model", "tokens"),
    "LRUPromptCache.insert_cache": ("self", "model", "tokens", "prompt_cache"),
    "can_trim_prompt_cache": ("cache",),
    "make_prompt_cache": ("model",),
}
SERVER_NAMES: gate.Names = {
    "ModelProvider._load": ("self", "model_path", "adapter_path", "draft_model_path"),
}

Key = tuple[str, str | None, str | None]  # the paths of a model, its adapter and its draft model


class Unsupported(Exception):
    """A model's cache cannot be written; the message says why."""


class Codec:
    """Turns mlx-lm's caches into JSON values and arrays, and back.

    Args:
        caches: `mlx_lm.models.cache`.
        mx: `mlx.core`.
    """

    def __init__(self, caches: Any, mx: Any) -> None:
        self._caches = caches
        self._mx = mx

    def check(self, prompt_cache: list[Any]) -> None:
        """Check that all caches of a prompt can be written.

        Raises:
            Unsupported: one of them cannot.
        """
        for cache in flat(prompt_cache):
            name = type(cache).__name__
            if vars(self._caches).get(name) is not type(cache) or not hasattr(cache, "from_state"):
                raise Unsupported(f"its architecture has a cache of its own ({name})")

    def is_whole(self, prompt_cache: list[Any]) -> bool:
        """Return whether the caches cannot be shortened, so that only a longer prompt can use
        them."""
        return not self._caches.can_trim_prompt_cache(prompt_cache) or any(
            getattr(cache, "start_position", 0) > 0 for cache in flat(prompt_cache)
        )

    def encode(self, prompt_cache: list[Any]) -> tuple[list[Any], list[entry.Array], list[Any]]:
        """Return the JSON values of the caches, their arrays' types, and the arrays.

        Raises:
            Unsupported: a cache contains something else.
        """
        arrays: list[Any] = []

        def value_of(state: Any) -> Any:
            if isinstance(state, self._mx.array):
                arrays.append(state)
                return {"array": len(arrays) - 1}
            if isinstance(state, (list, tuple)):
                return [value_of(each) for each in state]
            if state is None or isinstance(state, (bool, int, float, str)):
                return state
            raise Unsupported(f"its cache contains a {type(state).__name__}")

        values = [
            {"class": type(cache).__name__, "state": value_of(cache.state)}
            for cache in prompt_cache
        ]
        kinds = [(_type_name(each), tuple(each.shape)) for each in arrays]
        for kind, _ in kinds:
            if kind not in entry.ITEM_BYTES:
                raise Unsupported(f"its cache has items of the type {kind}")
        return values, kinds, arrays

    def array(self, kind: entry.Array, content: bytearray) -> Any:
        """Return a copy of a file's content as an array."""
        import numpy as np  # mlx-lm needs it too; an editor's plain Python does not

        name, shape = kind
        dtype = getattr(self._mx, "bool_" if name == "bool" else name)
        if not content:
            return self._mx.zeros(shape, dtype)
        flat = self._mx.array(np.frombuffer(content, np.uint8))
        return flat.view(dtype).reshape(shape)

    def decode(self, values: Any, arrays: list[Any]) -> list[Any]:
        """Return the caches, computed.

        Raises:
            entry.Damaged: these are no caches of this mlx-lm.
        """

        def state_of(value: Any) -> Any:
            if isinstance(value, dict):
                return arrays[value["array"]]
            return [state_of(each) for each in value] if isinstance(value, list) else value

        try:
            made = []
            for value in values:
                kind = vars(self._caches)[value["class"]]
                made.append(kind.from_state(state_of(value["state"])))
            self.check(made)
        except (LookupError, TypeError, ValueError, AttributeError, Unsupported):
            raise entry.Damaged("it is of no cache of this mlx-lm") from None
        self._mx.eval(arrays)
        return made


class _Pending:
    """An entry that is in memory only: weakly held, so that mlx-lm decides how long it is kept."""

    def __init__(self, shelf: _Shelf, tokens: list[int], kind: str, caches: list[Any]) -> None:
        self.shelf = shelf
        self.kind = kind
        self.tokens = entry.packed(tokens)
        self.bytes = sum(cache.nbytes for cache in caches)
        self._caches = [weakref.ref(cache) for cache in caches]

    def caches(self) -> list[Any] | None:
        """Return the caches; None if they are no longer in memory."""
        caches = [cache() for cache in self._caches]
        return None if any(cache is None for cache in caches) else caches


class _Shelf:
    """The entries of one model."""

    def __init__(self, name: str, about: dict[str, Any]) -> None:
        self.name = name
        self.about = about
        self.index = Index()
        self.lock = threading.Lock()  # for the index


class Disk:
    """The prompt cache on disk of one process.

    Args:
        kept: where the entries are.
        codec: see there.
        model_id: the name of the model for `mlxproxy cache ls`.
        versions: everything that entries depend on besides files and options.
        stop_seconds: how long a stop may take at most.
        busy: returns whether requests are being answered.
        say_off: called with the reason if a model's entries cannot be written.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        kept: store.Store,
        codec: Codec,
        model_id: str,
        versions: dict[str, str],
        stop_seconds: float,
        busy: Callable[[], bool],
        say_off: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = kept
        self._codec = codec
        self._model_id = model_id
        self._versions = versions
        self._stop_seconds = stop_seconds
        self._busy = busy
        self._say_off = say_off
        self._clock = clock
        self._shelves: dict[Key, _Shelf] = {}
        self._changed = threading.Condition()
        self._pending: list[_Pending] = []
        self._last = clock()
        self._writing = threading.Lock()  # held while an entry is written
        self._deadline: float | None = None  # once the process is asked to exit
        self._said: str | None = None

    # -- on the generation thread

    def fingerprint(self, key: Key, options: Any, shared: bool) -> str:
        """Return the name of the folder for a model.

        Args:
            options: those of the command line.
            shared: whether several machines serve it, each with a part of its cache.

        Raises:
            Unsupported: it has no entries.
        """
        if shared:
            raise Unsupported("several machines serve this model")
        quantized = ("kv_bits", "kv_group_size", "quantized_kv_start")
        try:
            return fingerprint(
                {
                    "format": entry.VERSION,
                    "versions": self._versions,
                    "model": [key[0], files(key[0])],
                    "adapter": files(key[1]),
                    "draft": files(key[2]),
                    "options": {name: getattr(options, name, None) for name in quantized},
                }
            )
        except NoFolder as error:
            raise Unsupported(f"{error} is not a folder") from None

    def open(self, key: Key, name: str, empty: list[Any]) -> None:
        """Find the entries of a model that has been loaded.

        Args:
            empty: caches as the model makes them for a new prompt.

        Raises:
            Unsupported: its caches cannot be written.
        """
        self._codec.check(empty)
        shelf = _Shelf(name, {"model": self._model_id, "path": key[0], "adapter": key[1]})
        damaged = []
        for stored in store.entries(self._store.root / name):
            try:
                with store.reading(stored.path) as file:
                    head = entry.read_head(file)
                if store.name_of(head.tokens) != stored.path.name:
                    raise entry.Damaged("it has the name of another one")
                shelf.index.add(stored.path.name, head.tokens, head.whole)
            except entry.Damaged as error:
                damaged.append(f"{stored.path.name}: {error}")
                store.delete(stored.path)
            except OSError:
                continue
        if damaged:
            logging.warning("Prompt cache: deleted %d damaged files (%s)", len(damaged), damaged[0])
        self._shelves[key] = shelf

    def close(self, key: Key) -> None:
        """Forget a model's entries, which stay on disk."""
        self._shelves.pop(key, None)

    def recall(self, key: Key, tokens: list[int], cached: int, insert: Callable[..., None]) -> bool:
        """Bring an entry back into memory if that spares computing many tokens.

        Args:
            cached: how many of the tokens are in memory.
            insert: inserts the entry into mlx-lm's cache; takes its tokens, caches and kind.

        Returns:
            Whether an entry was brought back.
        """
        self._last = self._clock()
        shelf = self._shelves.get(key)
        if shelf is None or not len(shelf.index) or len(tokens) < cached + LEAST_GAIN:
            return False
        with shelf.lock:
            match = shelf.index.longest(entry.packed(tokens), cached)
            known = match and shelf.index.tokens_of(match.name)
        if match is None:
            return False
        path = self._path(shelf, match.name)
        arrays: list[Any] = []
        try:
            with store.reading(path) as file:
                head = entry.read(
                    file, lambda kind, content: arrays.append(self._codec.array(kind, content))
                )
            if head.tokens != known:
                raise entry.Damaged("it holds another prompt")
            caches = self._codec.decode(head.caches, arrays)
        except Exception as error:
            with shelf.lock:
                shelf.index.discard(match.name)
            if isinstance(error, entry.Damaged):
                store.delete(path)
            if not isinstance(error, FileNotFoundError):  # else another process has evicted it
                self._say(f"{match.name} cannot be used: {_reason(error)}")
            return False
        store.used(path)
        insert(entry.unpacked(head.tokens), caches, head.kind)
        return True

    def inserted(self, key: Key, tokens: list[int], caches: list[Any], kind: str) -> None:
        """Remember an entry that mlx-lm has put into its cache; the arrays must be computed."""
        self._last = self._clock()
        shelf = self._shelves.get(key)
        # Images have negative tokens of their own, which mean nothing to another process.
        if shelf is None or len(tokens) < BLOCK or min(tokens) < 0:
            return
        pending = _Pending(shelf, tokens, kind, caches)
        with self._changed:
            self._pending.append(pending)
            del self._pending[:-PENDING]
            self._changed.notify()

    # -- on the writer's thread, and at the end

    def run(self) -> None:
        """Write entries whenever there is nothing else to do, until the process exits."""
        while True:
            with self._changed:
                while not self._pending:
                    self._changed.wait()
                quiet = self._clock() - self._last
            if quiet < IDLE_SECONDS or self._busy():
                time.sleep(max(LOOK_SECONDS, IDLE_SECONDS - quiet))
                continue
            with self._writing:
                if self._deadline is not None:
                    return
                self._write_newest()

    def finish(self) -> None:
        """Write what is not on disk yet, the newest first, while there is time."""
        begun = self._clock()
        with self._changed:
            waiting = sum(pending.bytes for pending in self._pending if pending.caches())
        allowed = STOP_SECONDS + waiting / GIGABYTE
        self._deadline = begun + min(allowed, self._stop_seconds)
        if not waiting or not self._writing.acquire(timeout=max(0.0, self._deadline - begun)):
            return
        written = [size for size in iter(self._write_newest, None) if size]
        if written:
            logging.info(
                "Prompt cache: %d prompts (%.0f MB) written to disk in %.2f s",
                len(written),
                sum(written) / 1e6,
                self._clock() - begun,
            )

    def _write_newest(self) -> int | None:
        """Write the newest of the entries that are not on disk.

        Returns:
            The bytes written, 0 if that was not necessary or not possible; None if there is no
            entry left, or no time.
        """
        with self._changed:
            if not self._pending or not self._in_time():
                return None
            pending = self._pending.pop()
        try:
            size = self._write(pending)
        except entry.Interrupted:
            return None
        except Exception as error:
            self._say(f"a prompt was not written: {_reason(error)}")
            return 0
        self._said = None if size else self._said
        return size

    def _write(self, pending: _Pending) -> int:
        shelf, caches = pending.shelf, pending.caches()
        if caches is None:
            return 0
        name, whole = store.name_of(pending.tokens), self._codec.is_whole(caches)
        with shelf.lock:
            if name in shelf.index or (not whole and shelf.index.covers(pending.tokens)):
                return 0
        self._codec.check(caches)
        values, kinds, arrays = self._codec.encode(caches)
        head = entry.Head(pending.tokens, pending.kind, whole, values, kinds)
        size = head.file_bytes()
        self._store.folder(shelf.name, shelf.about)
        evicted = self._store.make_room(size)
        path = self._path(shelf, name)
        with store.writing(path) as file:
            entry.write(file, head, map(memoryview, arrays), self._in_time)
        with shelf.lock:
            for old in (each.name for each in evicted if each.parent == path.parent):
                shelf.index.discard(old)
            shelf.index.add(name, pending.tokens, whole)
            shorter = [] if whole else shelf.index.beginnings(pending.tokens)
            for old in shorter:
                shelf.index.discard(old)
        for old in shorter:
            store.delete(self._path(shelf, old))
        return size

    def _in_time(self) -> bool:
        return self._deadline is None or self._clock() < self._deadline

    def _path(self, shelf: _Shelf, name: str) -> Path:
        return self._store.root / shelf.name / name

    def _say(self, what: str) -> None:
        """Log a failure once, however often it happens in a row."""
        reason = what.rpartition(": ")[2]
        if reason != self._said:
            self._said = reason
            logging.warning("Prompt cache: %s", what)

    # -- the feature

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Let no failure of this feature reach the generation thread."""
        try:
            yield
        except Unsupported as error:
            self._say_off(str(error))
        except Exception as error:
            self._say(f"failed: {_reason(error)}")


def arm(
    server: Any,
    caches: Any,
    mx: Any,
    versions: dict[str, str],
    options: dict[str, Any],
    busy: Callable[[], bool],
    say_off: Callable[[str], None],
) -> Disk:
    """Patch `mlx_lm.models.cache` and `mlx_lm.server`.

    Args:
        options: `folder`, `bytes`, `stop_seconds` and `model`: see engines/mlx_lm/prompt_disk.py.
        busy, say_off: see :class:`Disk`.

    Raises:
        Unexpected: prompts are cached in another way there.
    """
    gate.require(caches, CACHE_NAMES)
    gate.require(server, SERVER_NAMES)
    state = (None, None, 0)
    if caches.KVCache.from_state(state).state != state:
        raise gate.Unexpected("mlx_lm.models.cache.KVCache has another state")
    kept = store.Store(Path(options["folder"]), int(options["bytes"]))
    disk = Disk(
        kept,
        Codec(caches, mx),
        str(options["model"]),
        versions,
        float(options["stop_seconds"]),
        busy,
        say_off,
    )
    _arm_cache(disk, caches.LRUPromptCache)
    _arm_load(disk, server.ModelProvider, caches)
    _arm_stop(disk)

    def work() -> None:
        kept.sweep()
        disk.run()

    threading.Thread(target=work, name="prompt-cache", daemon=True).start()
    return disk


def _arm_cache(disk: Disk, cache: Any) -> None:
    nearest, insert = cache.fetch_nearest_cache, cache.insert_cache

    @functools.wraps(nearest)
    def fetch_nearest_cache(self: Any, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        found, rest = nearest(self, model, tokens)
        with disk.guarded():

            def put(whole: list[int], prompt_cache: list[Any], kind: str) -> None:
                insert(self, model, whole, prompt_cache, cache_type=kind)

            if disk.recall(model, tokens, len(tokens) - len(rest), put):
                found, rest = nearest(self, model, tokens)
        return found, rest

    @functools.wraps(insert)
    def insert_cache(
        self: Any,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        insert(self, model, tokens, prompt_cache, cache_type=cache_type)
        with disk.guarded():
            disk.inserted(model, tokens, prompt_cache, cache_type)

    cache.fetch_nearest_cache = fetch_nearest_cache
    cache.insert_cache = insert_cache


def _arm_load(disk: Disk, provider: Any, caches: Any) -> None:
    load = provider._load

    @functools.wraps(load)
    def load_and_open(
        self: Any,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> Any:
        key = (model_path, adapter_path, draft_model_path)
        shared = bool(getattr(self, "is_distributed", False))
        before = None
        with disk.guarded():
            disk.close(key)
            before = disk.fingerprint(key, self.cli_args, shared)
        result = load(self, model_path, adapter_path, draft_model_path)
        with disk.guarded():
            if before is not None:
                if disk.fingerprint(key, self.cli_args, shared) != before:
                    raise Unsupported("its files have changed while it was loaded")
                models = filter(None, (self.model, self.draft_model))
                empty = [each for model in models for each in caches.make_prompt_cache(model)]
                disk.open(key, before, empty)
        return result

    provider._load = load_and_open


def _arm_stop(disk: Disk) -> None:
    def terminate(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut this short
        with disk.guarded():
            disk.finish()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)


def _type_name(array: Any) -> str:
    return str(array.dtype).rpartition(".")[2].removesuffix("_")


def _reason(error: Exception) -> str:
    if isinstance(error, (entry.Damaged, store.NoRoom, Unsupported)):
        return str(error)
    return getattr(error, "strerror", None) or type(error).__name__
