"""Weights that are fetched ahead, against the files read whole. The GPU's streams are played by stand-ins; `tests/gpu` has a real one."""

from __future__ import annotations

import sys
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

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 8 and address % locking._PAGE == size % locking._PAGE == 0 and size
        if not self.works:
            return 801
        if any(address < other + length and other < address + size for other, length in self.locked.items()):
            return 712
        self.locked[address] = size
        self.most = max(self.most, len(self.locked))
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0


@pytest.fixture(params=[True, False], ids=["locked", "read"])
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Pages:
    pages = Pages(request.param)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pages)
    monkeypatch.setattr(locking, "_FEW", 1)
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
    monkeypatch.setattr(prefetching, "_LOCKED", 2 * locking._PAGE)
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
    assert during == {1e-4} and sys.getswitchinterval() == usual
    assert "wait_stream" in played and "synchronize" in played and "record" in played
    assert ahead.ahead._pool is not None
    ahead.ahead._pool.shutdown()
    assert bool(pages.most) == pages.works and not pages.locked


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
    with pytest.raises(prefetching.UserError, match="became shorter"):
        streamed.ahead.take(1, names)
    streamed.ahead.discard()
    assert sys.getswitchinterval() > 1e-3  # as it was
    assert not pages.locked


def test_runs_hold_every_byte_once() -> None:
    """Tensors side by side, with gaps, and in two files. Would catch bytes at the cut of two pieces that are lost or copied twice."""
    page, size = locking._PAGE, 3 * locking._PAGE
    lengths = [(Path("a"), 100, 5 * page), (Path("a"), 100 + 5 * page, 17), (Path("a"), 117 + 5 * page, 9 * page), (Path("a"), 20 * page, 40), (Path("b"), 0, 4 * page)]  # fmt: skip
    tensors = [torch.zeros(length, dtype=torch.int32) for _, _, length in lengths]
    whole = locking.runs(
        [(file, offset, t) for (file, offset, _), t in zip(reversed(lengths), reversed(tensors), strict=True)]
    )
    assert [(run.file.name, run.low, run.high) for run in whole] == [("a", 100, 117 + 14 * page), ("a", 20 * page, 20 * page + 40), ("b", 0, 4 * page)]  # fmt: skip
    seen: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locking, "_FEW", 1)
        pieces = [piece for run in whole for piece in run.pages(size)]
    for run, of_pages in pieces:
        for offset, into in run.parts:
            into += torch.arange(offset, offset + len(into), dtype=torch.int32) + 1
        if of_pages:
            own = set(range(run.low // page, run.high // page))
            assert run.low % page == run.high % page == 0 and own and run.high - run.low <= size
            assert run.file.name != "a" or not own & seen
            seen |= own if run.file.name == "a" else set()
    for (_, offset, length), tensor in zip(lengths, tensors, strict=True):
        assert torch.equal(tensor, torch.arange(offset, offset + length, dtype=torch.int32) + 1)
    assert [of_pages for _, of_pages in whole[1].pages(size)] == [False]  # less than a page


def test_pages_that_are_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a disk that is read a page at a time, and a file that is read behind its end."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 64 + b"the end")
    mapped = locking.Mapped(file)
    assert bytes(mapped.bytes[256:259].tolist()) == b"\x00\x01\x02" and len(mapped.bytes) == 64 * 256 + 7
    page = locking._PAGE
    run = locking.runs([(file, 0, torch.empty(2 * page, dtype=torch.uint8))])[0]
    pages = Pages(True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pages)
    monkeypatch.setattr(mapped, "_resident", lambda low, high: False)
    assert mapped.copy(run, None) is None and not pages.locked
    assert mapped.copy(locking.Run(file, 0, 5 * page, ()), None) is None
    monkeypatch.undo()
    assert mapped._resident(0, 2 * page) == (locking._LIBC is not None)
    with file.open("r+b") as shorter:
        shorter.truncate(page)
    assert mapped.copy(run, None) is None
