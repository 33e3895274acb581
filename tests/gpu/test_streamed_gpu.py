"""Models that stay on disk, compared by a GPU, against the same models in its memory. `make test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunescope
from families import tiny_folder
from prunescope.models import locking
from prunescope.models.blockwise import stream_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("command", ["layerwise", "generate", "divergence"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, "float32") for family in ("llama", "gemma2", "mixtral", "deepseek_v3")] + [("llama", "bfloat16")],
)
def test_streamed_as_in_memory(family: str, dtype: str, command: str, tmp_path: Path) -> None:
    """Would catch weights that are used before their copies have ended, buffers that are filled again too early, and, in bfloat16, a model that is opened
    with another attention than its blocks are run with."""
    dense, target = (str(tiny_folder(family, tmp_path / str(seed), seed)) for seed in (0, 1))
    rows = [{"prompt": f"w5 w{i} w7 w8 w9", "continuation": "w10 w11 w12 w13"} for i in range(6, 12)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "text.txt").write_text(" ".join(f"w{4 + (i * 7) % 59}" for i in range(100)), "utf-8")
    options: dict[str, Any] = {"continuations": str(tmp_path / "given.jsonl"), "batch_size": 4}
    if command == "divergence":
        options = {"text": str(tmp_path / "text.txt"), "context": 16, "scale": False}
    run = getattr(prunescope, command)
    held, streamed = (
        run(dense, target, stream=stream, device="cuda", dtype=dtype, **options).table() for stream in (False, True)
    )
    for name in {"kl_dense_target", "h_cos_dev", "dz_rms", "nll_target"} & set(held.column_names):
        ours, theirs = (torch.tensor(table[name].to_numpy()) for table in (held, streamed))
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4 if dtype == "float32" else 0.1, atol=1e-7 if dtype == "float32" else 1e-3
        )
    assert max(held["kl_dense_target"].to_pylist()) > 1e-6


@pytest.mark.parametrize("way", ["stays locked", "locked for a copy", "read"])
def test_weights_by_every_way(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch copies across two segments, which CUDA takes for one of memory that is not locked or refuses, pages that are unlocked before their copy
    has run, and segments that are locked twice."""
    monkeypatch.setattr(locking, "_SEGMENT", 2**13)
    monkeypatch.setattr(locking, "_FEW", 1)
    plain_copy, copied = locking.Mapped.copy, []

    def counted(*arguments: Any) -> Any:
        found = plain_copy(*arguments)
        copied.append(found[0])
        return found

    monkeypatch.setattr(locking.Mapped, "copy", counted)
    if way == "locked for a copy":
        monkeypatch.setattr(locking._Room, "take", lambda room, size: False)
    if way == "read":
        monkeypatch.setattr(locking.Mapped, "_resident", lambda mapped, low, size: False)
    folder = str(tiny_folder("llama", tmp_path / "model"))
    plain = stream_model(folder, tmp_path / "a", device="cpu", dtype="float32")
    ahead = stream_model(folder, tmp_path / "b", device="cuda", dtype="float32", prefetch=True)
    assert ahead.ahead is not None
    for layer in (0, 1, 2, 0, 3, 1, 2):
        with plain.block(layer), ahead.block(layer):
            pairs = zip(ahead.blocks[layer].named_parameters(), plain.blocks[layer].named_parameters(), strict=True)
            for (name, ours), (_, theirs) in pairs:
                assert ours.is_cuda and torch.equal(ours.cpu(), theirs), (layer, name)
    assert all(copied) if way != "read" else not any(copied)
    kept = [len(mapped.kept) for mapped in ahead.ahead._mapped.values() if mapped is not None]
    ahead.ahead.discard()
    passing = [len(mapped.passing) for mapped in ahead.ahead._mapped.values() if mapped is not None]
    assert bool(sum(kept)) == (way == "stays locked") and not sum(passing)
