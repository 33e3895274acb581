"""Models that stay on disk, compared by a GPU, against the same models in its memory. `make test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunescope
from families import tiny_folder

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
