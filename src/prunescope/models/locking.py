"""Bytes of a file to a GPU, from where the system has them in memory: their pages are locked, and no processor touches them.

Copies from pinned memory run at the full rate of the bus, but first a thread must read the file into that memory, and a machine's processors copy at
half that rate. A file that is in the system's cache, as one in a file system in memory always is, can be mapped and its pages be locked
(`cudaHostRegister`, read-only). What is not in the cache is read: see `prunescope.models.prefetching`.

Locking takes about as long as the copy, and other calls of CUDA wait for it. So pages stay locked, up to half of the machine's memory for the process; further segments are unlocked as soon
as they are copied.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.models.fitting import machine_bytes

__all__ = ["Locked", "Mapped", "Run", "release", "runs"]

_FEW = 2**20  # bytes for which no segment is locked
_SEGMENT = 2**27  # bytes of a file that are locked at a time
_READ_ONLY = 8  # cudaHostRegisterReadOnly: the pages are not written to; where that is unknown, registering fails
_LIBC: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Run:
    """Bytes of a file from ``low`` to ``high``, and the tensors of bytes on the device that parts of it belong in, each with where it begins in the file."""

    file: Path
    low: int
    high: int
    parts: tuple[tuple[int, Tensor], ...]

    @property
    def segment(self) -> tuple[Path, int]:
        """The file, and the number of the segment of it in which the run begins."""
        return self.file, self.low // _SEGMENT

    def segments(self) -> Iterator[Run]:
        """It in pieces, each of which lies in one segment of the file."""
        low = self.low
        while low < self.high:
            high = min((low // _SEGMENT + 1) * _SEGMENT, self.high)
            cuts = ((begin, max(low, begin), min(high, begin + len(into)), into) for begin, into in self.parts)
            parts = tuple(
                (first, into[first - begin : last - begin]) for begin, first, last, into in cuts if first < last
            )
            yield Run(self.file, low, high, parts)
            low = high


def runs(places: Sequence[tuple[Path, int, Tensor]]) -> list[Run]:
    """Stretches of files without a gap, of tensors of bytes on the device that belong to ``(file, offset)``."""
    found: list[Run] = []
    for file, offset, into in sorted(places, key=lambda place: (str(place[0]), place[1])):
        last = found[-1] if found else None
        if last is not None and (last.file, last.high) == (file, offset):
            found[-1] = Run(file, last.low, offset + len(into), (*last.parts, (offset, into)))
        else:
            found.append(Run(file, offset, offset + len(into), ((offset, into),)))
    return found


class _Room:
    """How many bytes may stay locked, in the whole process."""

    def __init__(self) -> None:
        self.lock, self.taken = threading.RLock(), 0  # which a collector that runs meanwhile may take again

    def take(self, size: int) -> bool:
        with self.lock:
            fits: bool = self.taken + size <= machine_bytes() // 2
            self.taken += size * fits
            return fits

    def give(self, size: int) -> None:
        with self.lock:
            self.taken -= size


_ROOM = _Room()


@dataclass(frozen=True)
class Locked:
    """A segment that is unlocked when the copies before ``copied`` have run and nothing else is copied from it."""

    mapped: Mapped
    address: int
    copied: Any


def release(locked: Sequence[Locked]) -> None:
    """Wait for the copies, and unlock."""
    for one in locked:
        one.copied.synchronize()
        one.mapped.done(one.address)


class Mapped:
    """A file in the address space, to copy from.

    Raises:
        OSError, ValueError: it cannot be mapped.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb", buffering=0) as bare:
            whole = mmap.mmap(bare.fileno(), 0, access=mmap.ACCESS_READ)
            self.state = _state(os.fstat(bare.fileno()))
        self.size = len(whole)
        self.address = _address(whole)
        held = (ctypes.c_char * self.size).from_address(self.address)  # a buffer that torch takes; nothing writes to it
        self.bytes = torch.frombuffer(held, dtype=torch.uint8)
        self.lock = threading.Lock()
        self.refused = False  # its pages, by the driver or the file system
        self.kept: dict[int, int] = {}  # segments that stay locked, by their addresses, and their sizes
        self.passing: dict[int, int] = {}  # those that do not, and how many copies wait
        # called at the latest when nothing uses it
        self.close = weakref.finalize(self, _unlocked, whole, self.kept, self.passing)

    def copy(self, run: Run, stream: Any) -> tuple[bool, Locked | None]:
        """Start to copy a run within one segment, with its pages locked. Runs within a segment must not be begun by two threads at once.

        Returns:
            Whether it is copied, which it is not where pages are not in the system's cache or cannot be locked, or for a few bytes; and what is to be
            released afterwards, if anything is.

        Raises:
            UserError: the file is another one than was mapped.
        """
        if run.high - run.low < _FEW:
            return False, None
        self._same()
        low = run.segment[1] * _SEGMENT
        address = self.address + low
        with torch.cuda.stream(stream):  # and on its device
            if address not in self.kept and not self._locked(address, low):
                return False, None
            stays = address in self.kept
            try:
                for begin, into in run.parts:
                    into.copy_(self.bytes[begin : begin + len(into)], non_blocking=True)
                copied = None if stays else torch.cuda.Event()
                if copied is not None:
                    copied.record(stream)
            except BaseException:
                if not stays:
                    torch.cuda.synchronize()
                    self.done(address)
                raise
        return True, None if stays else Locked(self, address, copied)

    def done(self, address: int) -> None:
        """A copy from a segment that does not stay locked has run."""
        with self.lock:
            self.passing[address] -= 1
            if not self.passing[address]:
                del self.passing[address]
                _unlock(address)

    def _same(self) -> None:
        """What is locked stays as it was; the file must too, since some of it may be read."""
        try:
            same = _state(self.file.stat()) == self.state
        except OSError:
            same = False
        if not same:
            raise UserError(f"{self.file} was changed while it was read; begin again")

    def _locked(self, address: int, low: int) -> bool:
        """Lock the segment that begins at ``low``, or let one more copy use it that is locked for others."""
        with self.lock:
            new = address not in self.passing
            self.passing[address] = self.passing.get(address, 0) + 1
        if not new:
            return True
        size = min(_SEGMENT, self.size - low)
        locked = not self.refused and self._resident(low, size)
        if locked:
            locked = int(torch.cuda.cudart().cudaHostRegister(address, size, _READ_ONLY)) == 0
            self.refused = not locked
        if locked and _ROOM.take(size):
            self.kept[address] = size
        if not locked or address in self.kept:
            del self.passing[address]
        return locked

    def _resident(self, low: int, size: int) -> bool:
        """Whether these pages are in memory. Locking others would read them one after the other, at a fraction of a disk's rate."""
        if _LIBC is None:
            return False
        if not (os.access(self.file, os.W_OK) or self.file.stat().st_uid == os.geteuid()):
            return self._reads_at_once(low, size)  # of such a file `mincore` calls all pages resident
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        told = _LIBC.mincore(ctypes.c_void_p(self.address + low), ctypes.c_size_t(size), pages)
        return told == 0 and bytes(pages).count(0) == 0

    def _reads_at_once(self, low: int, size: int) -> bool:
        """The same, by a byte of every 2 MB."""
        try:
            with self.file.open("rb", buffering=0) as bare:
                for offset in range(low, low + size, 2**21):
                    os.preadv(bare.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
        except OSError:  # it would have to wait, or cannot be asked
            return False
        return True


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _address(whole: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(whole, dtype=np.uint8).ctypes.data)


def _unlock(address: int) -> None:
    failed = int(torch.cuda.cudart().cudaHostUnregister(address))
    if failed:
        raise RuntimeError(f"pages that were copied from could not be unlocked (CUDA error {failed})")


def _unlocked(whole: mmap.mmap, kept: dict[int, int], passing: dict[int, int]) -> None:
    """Unlock what is locked of a mapping (``whole`` lives until then) that nothing uses any more. Raises for the first that fails when all are done."""
    if kept or passing:
        torch.cuda.synchronize()
    errors: list[RuntimeError] = []
    for address in (*kept, *passing):
        try:
            _unlock(address)
        except RuntimeError as error:
            errors.append(error)
    _ROOM.give(sum(kept.values()))
    kept.clear()
    passing.clear()
    if errors:
        raise errors[0]
