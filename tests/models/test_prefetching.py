"""Weights that are fetched ahead, against the files read whole. The GPU's streams are played by stand-ins; `tests/gpu` has a real one."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_folder
from prunescope.models import locking, prefetching
from prunescope.models.blockwise import stream_model


class Stands:
    """A stream or an event that has nothing to wait for, and says what was asked of it."""

    said: list[str] = []  # noqa: RUF012 (of all of them)

    def __init__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.said.append(name)


class Pages:
    """CUDA's table of locked pages, which refuses those that are locked already."""

    def __init__(self, works: bool) -> None:
        self.works, self.locked, self.most = works, dict[int, int](), 0
        self.one = threading.Lock()  # of the four that lock

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 8 and address % mmap.PAGESIZE == 0 and size
        if not self.works:
            return 801
        with self.one:
            if any(address < other + length and other < address + size for other, length in self.locked.items()):
                return 712
            self.locked[address] = size
            self.most = max(self.most, len(self.locked))
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        with self.one:
            del self.locked[address]
        return 0


@pytest.fixture(params=[2**40, 20000, 0, None], ids=["stays-locked", "some-stays", "locked", "read"])
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Pages:
    pages = Pages(request.param is not None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pages)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(locking, "_ROOM", locking._Room())
    monkeypatch.setattr(locking, "_FEW", 1)
    monkeypatch.setattr(locking, "_SEGMENT", 2 * mmap.PAGESIZE)
    monkeypatch.setattr(locking, "machine_bytes", lambda: 2 * (request.param or 0))
    return pages


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        yield

    for name, value in {"Stream": Stands, "Event": Stands, "stream": on, "current_stream": Stands}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(prefetching, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(prefetching, "_PIECE", 1000)  # so that weights come in many pieces
    Stands.said.clear()
    return Stands.said


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("mixtral", "float32"), ("llama", "bfloat16")])
def test_blocks_that_were_fetched_ahead(
    family: str, dtype: str, tmp_path: Path, played: list[str], pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral's experts are fused into files of their own first. Would catch a piece at the wrong place, a buffer that is filled again too early, and
    a block that gets another one's weights, also where blocks are taken out of order; and pages that are locked twice, or never released."""
    folder = str(tiny_folder(family, tmp_path / "model"))
    plain = stream_model(folder, tmp_path / "a", device="cpu", dtype=dtype)
    ahead = stream_model(folder, tmp_path / "b", device="cpu", dtype=dtype, prefetch=True)
    assert ahead.ahead is not None
    ahead.ahead.copying = True
    fetched, usual, during = 0, sys.getswitchinterval(), set[float]()
    read = prefetching._read

    def reading(*args: Any) -> None:
        during.add(round(sys.getswitchinterval(), 6))
        read(*args)

    monkeypatch.setattr(prefetching, "_read", reading)
    for layer in (0, 1, 2, 5, 3, 4, 0, 1):
        began = ahead.ahead.begun == layer
        fetched += began
        with plain.block(layer), ahead.block(layer):
            for (name, ours), (_, theirs) in zip(
                ahead.blocks[layer].named_parameters(), plain.blocks[layer].named_parameters(), strict=True
            ):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (layer, name)
    assert fetched == 4  # of the others the weights are fetched when they are asked for
    ahead.ahead.discard()
    assert during == (set() if pages.works else {1e-4}) and sys.getswitchinterval() == usual
    passing = not pages.works or locking.machine_bytes() < 2**40
    assert "wait_stream" in played and ("synchronize" in played) == ("record" in played) == passing
    room = locking.machine_bytes() // 2
    assert locking._ROOM.taken == sum(pages.locked.values()) <= room and bool(pages.most) == pages.works
    assert bool(pages.locked) == (pages.works and room > 0)
    ahead.close()
    assert not pages.locked and not locking._ROOM.taken


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path, played: list[str], pages: Pages) -> None:
    """Would catch a block that runs on what was in the buffer before, a process that is killed for pages which are gone, and pages that stay locked."""
    folder = tiny_folder("llama", tmp_path / "model")
    streamed = stream_model(str(folder), tmp_path / "a", device="cpu", prefetch=True)
    assert streamed.ahead is not None
    streamed.ahead.copying = True
    with streamed.block(0):
        pass
    streamed.ahead.discard()
    streamed.ahead._headers.clear()
    names = [name for name, _ in streamed.blocks[1].named_parameters(prefix=streamed.names[1])]
    streamed.ahead._place(names[0])  # reads the header
    file = next(folder.glob("*.safetensors"))
    with file.open("r+b") as shorter:
        shorter.truncate(file.stat().st_size // 4)
    streamed.ahead.begin(1, names)
    with pytest.raises(prefetching.UserError, match=r"became shorter|was changed"):
        streamed.ahead.take(1, names)
    streamed.ahead.discard()
    assert sys.getswitchinterval() > 1e-3  # as it was
    assert locking._ROOM.taken == sum(pages.locked.values())
    streamed.close()


def test_runs_hold_every_byte_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors side by side, with gaps, and in two files. Would catch bytes at the cut of two pieces that are lost or copied twice."""
    monkeypatch.setattr(locking, "_SEGMENT", 1000)
    places = [("a", 100, 5000), ("a", 5100, 17), ("a", 5117, 9000), ("a", 20000, 40), ("b", 0, 4000)]
    tensors = [torch.zeros(length, dtype=torch.int32) for _, _, length in places]
    given = [(Path(file), offset, tensor) for (file, offset, _), tensor in zip(places, tensors, strict=True)]
    whole = locking.runs(given[::-1])
    assert [(str(run.file), run.low, run.high) for run in whole] == [("a", 100, 14117), ("a", 20000, 20040), ("b", 0, 4000)]  # fmt: skip
    for run in whole:
        for piece in run.segments():
            assert piece.low // 1000 == (piece.high - 1) // 1000
            for offset, into in piece.parts:
                assert piece.low <= offset and offset + len(into) <= piece.high
                into += torch.arange(offset, offset + len(into), dtype=torch.int32) + 1
    for (_, offset, length), tensor in zip(places, tensors, strict=True):
        assert torch.equal(tensor, torch.arange(offset, offset + length, dtype=torch.int32) + 1)


def test_what_is_not_in_memory(tmp_path: Path, pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a disk that is read a page at a time, and a process that is killed since it copies from behind the end of a file."""
    file = tmp_path / "weights"
    size = 4 * mmap.PAGESIZE
    file.write_bytes(bytes(range(256)) * (size // 256) + b"the end")
    mapped = locking.Mapped(file)
    assert mapped.bytes[256:259].tolist() == [0, 1, 2] and len(mapped.bytes) == size + 7
    assert mapped._resident(0, len(mapped.bytes)) == (locking._LIBC is not None)
    run = locking.runs([(file, 0, torch.empty(size // 2, dtype=torch.uint8))])[0]
    monkeypatch.setattr(locking, "_FEW", size)
    assert mapped.copy(run, None) == (False, None)  # not worth a segment
    monkeypatch.setattr(locking, "_FEW", 1)
    monkeypatch.setattr(mapped, "_resident", lambda low, size: False)
    assert mapped.copy(run, None) == (False, None) and not pages.locked and not mapped.passing
    with file.open("r+b") as shorter:
        shorter.truncate(mmap.PAGESIZE)
    with pytest.raises(locking.UserError, match="was changed"):
        mapped.copy(run, None)


@pytest.mark.skipif(locking._LIBC is None, reason="only Linux says what is in memory")
def test_pages_of_somebody_elses_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mincore` calls all of them resident, and so a model store that is cold. Would catch that it is believed."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(3 * mmap.PAGESIZE))
    mapped, asked = locking.Mapped(file), []
    monkeypatch.setattr(locking.os, "access", lambda path, mode: False)
    monkeypatch.setattr(locking.os, "geteuid", lambda: file.stat().st_uid + 1)

    def cold(fd: int, buffers: Any, offset: int, flags: int) -> int:
        asked.append((offset, flags))
        raise BlockingIOError

    monkeypatch.setattr(locking.os, "preadv", cold)
    assert not mapped._resident(0, 3 * mmap.PAGESIZE) and asked == [(0, locking.os.RWF_NOWAIT)]
    monkeypatch.setattr(locking.os, "preadv", lambda *_: 1)
    assert mapped._resident(0, 3 * mmap.PAGESIZE)


def test_copies_that_fail_or_are_not_waited_for_leave_nothing_locked(
    tmp_path: Path, played: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch pages that stay locked after an error, and when a block is left by one while the next is fetched."""
    pages = Pages(True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pages)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(locking, "_FEW", 1)
    monkeypatch.setattr(locking, "_ROOM", locking._Room())
    monkeypatch.setattr(locking, "machine_bytes", lambda: 0)
    file = tmp_path / "weights"
    file.write_bytes(bytes(5000))
    mapped = locking.Mapped(file)
    with pytest.raises(RuntimeError):
        mapped.copy(locking.Run(file, 0, 5000, ((0, torch.empty(5000, 3, dtype=torch.uint8)),)), None)
    assert not pages.locked and not mapped.passing
    whole = locking.Run(file, 0, 5000, ((0, torch.empty(5000, dtype=torch.uint8)),))
    assert mapped.copy(whole, None)[0] and pages.locked
    mapped.close()
    assert not pages.locked
    streamed = stream_model(str(tiny_folder("llama", tmp_path / "model")), tmp_path / "a", device="cpu", prefetch=True)
    assert streamed.ahead is not None
    streamed.ahead.copying = True
    with pytest.raises(KeyboardInterrupt), streamed.block(0):
        raise KeyboardInterrupt
    assert streamed.ahead.begun is None and not pages.locked
    streamed.close()


def test_what_is_read_is_dealt_out_evenly(tmp_path: Path, played: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a block that one thread reads while the others have nothing to do."""
    shares: list[int] = []
    copy = prefetching._Ring.copy

    def counted(self: Any, work: Any) -> None:
        shares.append(sum(len(into) for _, _, into in work))
        copy(self, work)

    monkeypatch.setattr(prefetching._Ring, "copy", counted)
    streamed = stream_model(str(tiny_folder("llama", tmp_path / "model")), tmp_path / "a", device="cpu", prefetch=True)
    assert streamed.ahead is not None
    streamed.ahead.copying = True
    with streamed.block(len(streamed.blocks) - 1):
        size = sum(p.numel() * p.element_size() for p in streamed.blocks[-1].parameters())
    assert sum(shares) == size and max(shares) <= 3000 and len(shares) == 16
    streamed.close()
