"""Exported folders in vLLM itself, on a CPU. vLLM pins an older transformers, so it lives in an environment of its own, whose Python is named by
PRUNESCOPE_VLLM_PYTHON; `make test-vllm` makes it and runs these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

import prunescope
from prunescope.export.vllm_engine import Vllm

PYTHON = os.environ.get("PRUNESCOPE_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="PRUNESCOPE_VLLM_PYTHON names no Python with vllm")

HEADS = {"head_dim": 64}  # its attention on a CPU has no narrower ones
PROMPT = "The history of the city of Vienna begins with"
STEPS, TOP = 64, 20
OFF = 5e-6  # of one log-probability, dense; what is dropped or pruned must not make it worse
KINDS = ["", "attn=1,4", "attn=0;mlp=5", "mlp=0,3", "block=2", "attn=0,3;mlp=1,4;block=2", "half", "half;attn=2"]
FAMILIES = {
    "llama": "DeciLMForCausalLM",
    "qwen2": "DeciLMForCausalLM",
    "mistral": "DeciLMForCausalLM",
    "qwen3": "PrunedQwen3ForCausalLM",
    "gemma3": "PrunedGemma3ForCausalLM",
    "gemma2": "PrunedGemma2ForCausalLM",
}
"""Family -> class of vLLM that runs it with half a block dropped."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Vllm]:
    """One process for all: vLLM takes ten seconds to import."""
    with Vllm(PYTHON) as found:
        yield found


def compared(engine: Vllm, ours: Any, folder: Path) -> tuple[float, Any]:
    """The largest error of a log-probability of the first token, once all greedy tokens are equal, and what vLLM says of the folder; plain
    transformers are the reference."""
    ids = ours.tokenizer(PROMPT)["input_ids"]
    told = engine.load(folder, dtype="float32", context=len(ids) + STEPS, top=TOP)
    theirs = engine.write([ids], STEPS, TOP)[0]
    with torch.no_grad():
        text = ours.model.generate(torch.tensor([ids]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
        first = ours.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert list(theirs.tokens) == text[0, len(ids) :].tolist()
    assert len(theirs.first) >= TOP
    return max(abs(value - first[i].item()) for i, value in theirs.first.items()), told


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_writes_the_same_tokens(
    engine: Vllm, family: str, kind: str, tmp_path: Path, record_property: Any
) -> None:
    """Would catch a class that reads `block_configs` or the lists otherwise than they are written, weights that it has no place for, a norm of the wrong
    sublayer left out, and a branch that is added twice or lost where a sublayer is skipped. A dropped attention must have no cache."""
    model, drop = tiny(family, tmp_path / "dense", **HEADS), kind.removeprefix("half").removeprefix(";")
    if kind.startswith("half"):
        prunescope.sparsify(model, method="magnitude", sparsity=0.5, samples=2, seq_len=32, out=str(tmp_path / "half"), device="cpu", dtype="float32")  # fmt: skip
        model = str(tmp_path / "half")
    ours = prunescope.load(model, device="cpu", dtype="float32", drop=drop or None)
    folder = prunescope.export(model, engine="vllm", drop=drop or None, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    error, told = compared(engine, ours, folder)
    record_property("error", error)
    print(f"{family:8} {kind:26} {error:.1e} {told.architecture} {told.attentions} {told.cache_bytes}")
    assert error < OFF, error
    halves = set(ours.dropped.attn) ^ set(ours.dropped.mlp)
    assert (told.architecture == FAMILIES[family]) == bool(halves)
    with_zeros = "DeciLM" in told.architecture and 0 in ours.dropped.attn  # its first block must have an attention
    assert told.attentions == 6 - len(ours.dropped.attn) + with_zeros


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama3", {}),  # rotary frequencies scaled one by one, tied head
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ],
)  # fmt: skip
def test_positions_and_windows(engine: Vllm, family: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Would catch positions that the class of no-op layers scales otherwise, and a window that is lost with it."""
    dense = tiny(family, tmp_path / "dense", **HEADS | more)
    ours = prunescope.load(dense, device="cpu", dtype="float32", drop="attn=2;mlp=4")
    folder = prunescope.export(dense, engine="vllm", drop="attn=2;mlp=4", device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    error, told = compared(engine, ours, folder)
    print(f"{family:8} {more} {error:.1e} {told}")
    assert error < OFF, error
