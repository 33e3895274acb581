"""The next block's weights while the one before it runs.

On a GPU pieces of the files that are in the system's cache are copied from there (`prunescope.models.locking`), and several threads read the others
into small pinned buffers, from where they are copied; all on a stream of its own. On a CPU weights
stay in their mapped files, so that a thread only asks the system to read what is not in its cache.

The thread that runs the model is busy in Python most of the time, and Python lets a thread that wants to go on wait for 5 ms: a reader, which
is back from the system after one, would spend its time so. While weights are fetched it waits for 0.1 ms at most.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.models.locking import Locked, Mapped, Run, release, runs
from prunescope.models.shards import DTYPES, Stored, read_header

__all__ = ["Ahead"]

_PIECE = 2**24  # bytes that are read at a time: 30 GB/s of an H200's machine, 26 with half as much
_THREADS = 16  # 24 read no more
_LOCKERS = 4  # threads that lock: 36 GB/s, 21 with one, 41 with sixteen
_SLOTS = 2  # pinned buffers of a thread: one is filled while the other is copied
_SWITCH = 1e-4  # seconds after which Python lets another thread go on; 5e-3 by default


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a weight are."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Ahead:
    """Fetches weights of one block ahead.

    Args:
        weights: accelerate's map of weights on disk; what it holds otherwise than as plain bytes of a file is left to it.
        device: where the weights shall be.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self.weights, self.device, self.copying = weights, device, device.type == "cuda"
        self.begun: int | None = None
        self._headers: dict[str, dict[str, Stored]] = {}
        self._found: dict[str, Tensor] = {}
        self._copying: Future[list[Locked]] | None = None  # from locked pages
        self._tasks: list[Future[None]] = []  # reading the rest, of which there is none before the former is done
        self._releasing: Future[None] | None = None
        self._mapped: dict[Path, Mapped | None] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lockers = ThreadPoolExecutor(_LOCKERS, "prunescope-lock")
        self._mapping_lock = threading.Lock()
        self._copies: Any = None  # the stream of the copies to a GPU
        self._rings: list[Any] = []

    def begin(self, layer: int, names: Sequence[str]) -> None:
        """Start to fetch the weights of block ``layer``; returns at once."""
        if self.begun is not None:
            self.discard()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS if self.copying else 1, "prunescope-ahead")
        places = {name: place for name in names if (place := self._place(name)) is not None}
        self.begun = layer
        if self.copying:
            self._begin_copies(places)
        else:
            self._tasks = [self._pool.submit(_warm, list(places.values()))]

    def take(self, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """What was fetched of block ``layer`` by the model's names, in the dtypes of the file; nothing on a CPU, where weights stay in their files.

        Args:
            names: what is fetched now, if the block was not begun.
        """
        if self.begun != layer:
            if not self.copying:
                self.discard()
                return {}
            self.begin(layer, names)
        locked = [] if self._copying is None else self._copying.result()
        for task in self._tasks:
            task.result()
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        if locked:
            assert self._pool is not None
            self._released()
            self._releasing = self._pool.submit(release, locked)
        found = self._found
        self._forget()
        return found

    def discard(self) -> None:
        """Forget what was begun."""
        if self._copying is not None:
            with suppress(Exception):
                release(self._copying.result())
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(Exception):
                if not task.cancelled():
                    task.result()
        if self._copies is not None and self._found:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        self._released()
        self._forget()

    def close(self) -> None:
        """Forget what was begun, and unlock all pages; nothing is fetched afterwards."""
        self.discard()
        for mapped in self._mapped.values():
            if mapped is not None:
                mapped.close()
        self._mapped.clear()

    def _released(self) -> None:
        if self._releasing is not None:
            self._releasing.result()
            self._releasing = None

    def _forget(self) -> None:
        self._found, self._copying, self._tasks, self.begun = {}, None, [], None

    def _place(self, name: str) -> _Place | None:
        entry = getattr(self.weights, "index", {}).get(name)
        if not isinstance(entry, Mapping):
            return None
        file = entry.get("safetensors_file")
        if file is None:
            return None
        if file not in self._headers:
            try:
                self._headers[file] = read_header(Path(file), str(file))
            except UserError:
                self._headers[file] = {}
        stored = self._headers[file].get(entry.get("weight_name", name))
        if stored is None or stored.dtype not in DTYPES:
            return None
        return _Place(stored.file, stored.offset, DTYPES[stored.dtype], stored.shape)

    def _begin_copies(self, places: Mapping[str, _Place]) -> None:
        assert self._pool is not None
        if self._copies is None:
            copies = torch.cuda.Stream(self.device)
            self._rings = [_Ring(copies) for _ in range(_THREADS)]
            self._copies = copies  # last: the memory of the rings may not be there
        # the buffers may stand where tensors stood that work on the current stream still reads
        self._found = {n: torch.empty(p.shape, dtype=p.dtype, device=self.device) for n, p in places.items()}
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        bytes_of = {name: found.view(-1).view(torch.uint8) for name, found in self._found.items()}
        whole = runs([(place.file, place.offset, bytes_of[name]) for name, place in places.items()])
        pieces = [piece for every in whole for piece in every.segments()]
        self._copying = self._pool.submit(
            self._copy, [list(same) for _, same in groupby(pieces, lambda run: run.segment)]
        )

    def _copy(self, segments: Sequence[Sequence[Run]]) -> list[Locked]:
        """Copy what can be locked, and let the rest be read. Returns what is to be released."""
        assert self._pool is not None
        locked: list[Locked] = []  # by all threads, also by one that fails
        begun = [self._lockers.submit(self._copy_segment, pieces, locked) for pieces in segments]
        wait(begun)
        try:
            missing = [run for task in begun for run in task.result()]
        except BaseException:
            release(locked)
            raise
        work = [
            (run.file, begin + low, into[low:high])
            for run in missing
            for begin, into in run.parts
            for low, high in _pieces(len(into))
        ]
        shares = ((ring, work[i :: len(self._rings)]) for i, ring in enumerate(self._rings))
        self._tasks = [self._pool.submit(ring.copy, share) for ring, share in shares if share]
        return locked

    def _copy_segment(self, pieces: Sequence[Run], locked: list[Locked]) -> list[Run]:
        """Copy runs of one segment. Adds to ``locked`` what is to be released, and returns those that were not copied."""
        missing: list[Run] = []
        with _TURNS.often():
            for run in pieces:
                mapped = self._mapping(run.file)
                copied, held = (False, None) if mapped is None else mapped.copy(run, self._copies)
                if held is not None:
                    locked.append(held)
                if not copied:
                    missing.append(run)
        return missing

    def _mapping(self, file: Path) -> Mapped | None:
        with self._mapping_lock:
            if file not in self._mapped:
                try:
                    self._mapped[file] = Mapped(file)
                except (OSError, ValueError):
                    self._mapped[file] = None
            return self._mapped[file]


class _Ring:
    """A thread that copies, and its pinned buffers."""

    def __init__(self, copies: Any) -> None:
        self.copies = copies
        self.slots: list[Tensor] = []
        self.next = 0

    def copy(self, work: Sequence[tuple[Path, int, Tensor]]) -> None:
        """Read pieces of files from where they begin, and start to copy each to where it shall be."""
        with _TURNS.often(), torch.cuda.stream(self.copies), ExitStack() as files:
            opened: dict[Path, Any] = {}
            for file, offset, into in work:
                if file not in opened:
                    opened[file] = files.enter_context(file.open("rb", buffering=0))
                self._read(opened[file], offset, into)

    def _read(self, file: Any, offset: int, into: Tensor) -> None:
        if not self.slots:
            self.slots = [_pinned(_PIECE) for _ in range(_SLOTS)]
            self.views = [memoryview(slot.numpy()) for slot in self.slots]  # type: ignore[arg-type]
            self.done = [torch.cuda.Event() for _ in range(_SLOTS)]
        slot, view, event = self.slots[self.next], self.views[self.next], self.done[self.next]
        self.next = (self.next + 1) % _SLOTS
        event.synchronize()  # what was there before is copied
        _read(file, offset, view[: len(into)])
        into.copy_(slot[: len(into)], non_blocking=True)
        event.record(self.copies)


class _Turns:
    """How often Python's threads take turns, for the whole process: more often while anything is fetched."""

    def __init__(self) -> None:
        self.lock, self.fetching, self.usual = threading.Lock(), 0, 0.0

    @contextmanager
    def often(self) -> Iterator[None]:
        with self.lock:
            self.fetching += 1
            if self.fetching == 1:
                self.usual = sys.getswitchinterval()
                sys.setswitchinterval(min(self.usual, _SWITCH))
        try:
            yield
        finally:
            with self.lock:
                self.fetching -= 1
                if not self.fetching:
                    sys.setswitchinterval(self.usual)


_TURNS = _Turns()


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + _PIECE, nbytes)) for low in range(0, nbytes, _PIECE))


def _read(bare: Any, offset: int, into: memoryview) -> None:
    bare.seek(offset)
    done = 0
    while done < len(into):
        count = bare.readinto(into[done:])
        if not count:
            raise UserError(f"{bare.name} became shorter while it was read; fetch the model again")
        done += count


def _warm(places: Sequence[_Place]) -> None:
    """Ask the system to read these bytes into its cache, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for place in places:
        with suppress(OSError), place.file.open("rb", buffering=0) as bare:
            for low, high in _pieces(place.nbytes):
                os.posix_fadvise(bare.fileno(), place.offset + low, high - low, os.POSIX_FADV_WILLNEED)
