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
from prunescope.models import prefetching
from prunescope.models.blockwise import stream_model


class Stands:
    """A stream or an event that has nothing to wait for, and says what was asked of it."""

    said: list[str] = []  # noqa: RUF012 (of all of them)

    def __init__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.said.append(name)


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
    family: str, dtype: str, tmp_path: Path, played: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral's experts are fused into files of their own first. Would catch a piece at the wrong place, a buffer that is filled again too early, and
    a block that gets another one's weights, also where blocks are taken out of order."""
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


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path, played: list[str]) -> None:
    """Would catch a block that runs on what was in the buffer before."""
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
