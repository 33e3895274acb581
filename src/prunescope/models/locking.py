"""Bytes of a file to a GPU, from where the system has them in memory: their pages are locked while the copy runs, and no processor touches them.

Copies from pinned memory run at the full rate of the bus, but first a thread must read the file into that memory, and a machine's processors copy at
half that rate. A file that is in the system's cache, as one in a file system in memory always is, can be mapped and its pages be locked
(`cudaHostRegister`, read-only), which takes less time than the copy and ends with it. What is not in the cache is read: see `prunescope.models.prefetching`.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Locked", "Mapped", "Run", "release", "runs"]

_PAGE = mmap.PAGESIZE
_FEW = 2**18  # bytes for which locking is not worth its while
_READ_ONLY = 8  # cudaHostRegisterReadOnly: the pages are not written to; where that is unknown, registering fails
_LIBC: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Run:
    """Bytes of a file from ``low`` to ``high``, and the tensors of bytes on the device that parts of it belong in, each with where it begins in the file."""

    file: Path
    low: int
    high: int
    parts: tuple[tuple[int, Tensor], ...]

    def pages(self, size: int) -> Iterator[tuple[Run, bool]]:
        """It in pieces of up to ``size`` bytes, and of each whether it is whole pages: no page belongs to two of those."""
        low, high = -(-self.low // _PAGE) * _PAGE, (self.high // _PAGE) * _PAGE
        if high - low < _FEW:
            yield self, False
            return
        for edge in (self.within(self.low, low), self.within(high, self.high)):
            if edge.parts:
                yield edge, False
        for begin in range(low, high, size):
            yield self.within(begin, min(begin + size, high)), True

    def within(self, low: int, high: int) -> Run:
        """The part of it from ``low`` to ``high``."""
        parts = []
        for begin, into in self.parts:
            first, last = max(low, begin), min(high, begin + len(into))
            if first < last:
                parts.append((first, into[first - begin : last - begin]))
        return Run(self.file, low, high, tuple(parts))


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


@dataclass(frozen=True)
class Locked:
    """Pages that are locked until the copies before ``copied`` have run."""

    address: int
    copied: Any
    mapping: Mapped  # which must outlive it


def release(locked: Sequence[Locked]) -> None:
    """Wait for the copies, and unlock the pages."""
    for pages in locked:
        pages.copied.synchronize()
        failed = int(torch.cuda.cudart().cudaHostUnregister(pages.address))
        if failed:
            raise RuntimeError(f"pages that were copied from could not be unlocked (CUDA error {failed})")


class Mapped:
    """A file in the address space, to read from.

    Raises:
        OSError, ValueError: it cannot be mapped.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb", buffering=0) as bare:
            self.whole = mmap.mmap(bare.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self.whole)
        self.address = _address(self.whole)
        held = (ctypes.c_char * self.size).from_address(self.address)  # a buffer that torch takes; nothing writes to it
        self.bytes = torch.frombuffer(held, dtype=torch.uint8)

    def copy(self, run: Run, stream: Any) -> Locked | None:
        """Lock the pages of a run that is whole pages, and start to copy them.

        Returns:
            What is to be released, or None where a page is not in the system's cache or cannot be locked, and nothing was copied.
        """
        if run.high > min(self.size, run.file.stat().st_size) or not self._resident(run.low, run.high):
            return None  # what was cut off a file is not there to be locked
        address = self.address + run.low
        if int(torch.cuda.cudart().cudaHostRegister(address, run.high - run.low, _READ_ONLY)):
            return None
        locked = Locked(address, torch.cuda.Event(), self)
        try:
            with torch.cuda.stream(stream):
                for begin, into in run.parts:
                    into.copy_(self.bytes[begin : begin + len(into)], non_blocking=True)
        finally:
            locked.copied.record(stream)
        return locked

    def _resident(self, low: int, high: int) -> bool:
        """Whether these pages are in memory. Locking others would read them one after the other, at a fraction of a disk's rate."""
        if _LIBC is None:
            return False
        pages = (ctypes.c_ubyte * ((high - low) // _PAGE))()
        told = _LIBC.mincore(ctypes.c_void_p(self.address + low), ctypes.c_size_t(high - low), pages)
        return told == 0 and bytes(pages).count(0) == 0


def _address(whole: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(whole, dtype=np.uint8).ctypes.data)
