"""Exported folders in vLLM itself, on a CPU. vLLM pins an older transformers, so it lives in an environment of its own, whose Python is named by
PRUNESCOPE_VLLM_PYTHON; `make test-vllm` makes it and runs these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import YARN, tiny

import prunescope
from prunescope.errors import UserError
from prunescope.export.vllm_engine import Vllm

PYTHON = os.environ.get("PRUNESCOPE_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="PRUNESCOPE_VLLM_PYTHON names no Python with vllm")

PROMPT = "The history of the city of Vienna begins with"
STEPS, TOP = 64, 20
OFF = 1e-4  # of one log-probability, dense; what is dropped or pruned must stay within three times the dense model's error
KINDS = ["attn=1,4", "attn=0;mlp=5", "mlp=0,3", "block=2", "attn=0,3;mlp=1,4;block=2", "half", "half;attn=2"]
FAMILIES = {
    "llama": "DeciLMForCausalLM",
    "qwen2": "DeciLMForCausalLM",
    "mistral": "DeciLMForCausalLM",
    "qwen3": "PrunedQwen3ForCausalLM",
    "gemma3": "PrunedGemma3ForCausalLM",
    "gemma2": "PrunedGemma2ForCausalLM",
}
"""Family -> class of vLLM that runs it with half a block dropped."""


_running: list[Vllm] = []
_dense: dict[str, float] = {}  # family -> error of the dense model in the engine


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    for one in _running:
        one.close()


@pytest.fixture
def engine() -> Vllm:
    """One process for all, since vLLM takes ten seconds to import; another one where it has ended."""
    if not _running or not _running[-1].runs:
        _running.append(Vllm(PYTHON))
    return _running[-1]


def wide(family: str, folder: Path, **more: Any) -> str:
    """A tiny model whose heads are 64 wide: vLLM's attention on a CPU has no narrower ones, and its Qwen2 reads no width from the config."""
    return tiny(family, folder, **({"hidden_size": 256} if family == "qwen2" else {"head_dim": 64}) | more)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_writes_the_same_tokens(engine: Vllm, family: str, kind: str, tmp_path: Path) -> None:
    """Would catch a class that reads `block_configs` or the lists otherwise than they are written, weights that it has no place for, a norm of the wrong
    sublayer left out, and a branch that is added twice or lost where a sublayer is skipped. A dropped attention must have no cache."""
    model, drop = wide(family, tmp_path / "dense"), kind.removeprefix("half").removeprefix(";")
    if family not in _dense:
        plain = prunescope.load(model, device="cpu", dtype="float32")
        _dense[family], _ = compared(engine, plain, Path(model))
        assert _dense[family] < OFF
    if kind.startswith("half"):
        prunescope.sparsify(model, method="magnitude", sparsity=0.5, samples=2, seq_len=32, out=str(tmp_path / "half"), device="cpu", dtype="float32")  # fmt: skip
        model = str(tmp_path / "half")
    ours = prunescope.load(model, device="cpu", dtype="float32", drop=drop or None)
    folder = prunescope.export(model, engine="vllm", drop=drop or None, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    error, told = compared(engine, ours, folder)
    print(
        f"{family:8} {kind:26} {error:.1e}, dense {_dense[family]:.1e} {told.architecture} {told.attentions} {told.cache_bytes}"
    )
    assert error <= 3 * _dense[family], error
    halves = set(ours.dropped.attn) ^ set(ours.dropped.mlp)
    assert (told.architecture == FAMILIES[family]) == bool(halves)
    with_zeros = "DeciLM" in told.architecture and 0 in ours.dropped.attn  # its first block must have an attention
    assert told.attentions == 6 - len(ours.dropped.attn) + with_zeros


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama3", {}),  # rotary frequencies scaled one by one, tied head
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("qwen3", {"rope_parameters": YARN}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ],
)  # fmt: skip
def test_positions_and_windows(engine: Vllm, family: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Would catch positions that the class of no-op layers scales otherwise, and a window that is lost with it."""
    dense = wide(family, tmp_path / "dense", **more)
    ours = prunescope.load(dense, device="cpu", dtype="float32", drop="attn=2;mlp=4")
    folder = prunescope.export(dense, engine="vllm", drop="attn=2;mlp=4", device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    error, told = compared(engine, ours, folder)
    print(f"{family:8} {more} {error:.1e} {told}")
    assert error < OFF, error


@pytest.mark.parametrize("how", ["2:4", "healed", "healed 2:4"])
def test_checkpoints_write_the_same_tokens(engine: Vllm, how: str, tmp_path: Path) -> None:
    """Weights in a 2:4 pattern with an attention dropped, and a dropped model healed for a few steps. Would catch the weights of the dense model exported."""
    dense = wide("qwen3", tmp_path / "dense")
    made = {"device": "cpu", "dtype": "float32", "samples": 8, "overwrite": True}
    model, drop = dense, "attn=2"
    if "2:4" in how:
        model = str(tmp_path / "sparse")
        prunescope.sparsify(dense, method="magnitude", pattern="2:4", seq_len=32, out=model, **made)
    if "healed" in how:
        student = str(tmp_path / "student")
        prunescope.drop(model, target="attn", n=1, seq_len=32, calibration="self", out=student, **made)
        model, drop = str(tmp_path / "healed"), ""
        prunescope.heal(
            student,
            teacher=dense,
            new_tokens=24,
            steps=4,
            batch_size=2,
            held_out=2,
            learning_rate=1e-3,
            out=model,
            **made,
        )
    ours = prunescope.load(model, device="cpu", dtype="float32", drop=drop or None)
    folder = prunescope.export(model, engine="vllm", drop=drop or None, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    error, told = compared(engine, ours, folder)
    print(f"{how} {error:.1e} {told}")
    assert error < OFF and told.attentions == 5


@pytest.mark.parametrize("drop", ["", "attn=3,7,11,15,17,20,23,26", "attn=0,5;mlp=4"])
def test_bundled_model_writes_the_same_tokens(engine: Vllm, drop: str, tmp_path: Path) -> None:
    """The cache's bytes are the engine's own: 22 of 30 attentions."""
    ours = prunescope.load("smollm2-135m", device="cpu", dtype="float32", drop=drop or None)
    folder = prunescope.export("smollm2-135m", engine="vllm", drop=drop or None, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    error, told = compared(engine, ours, folder)
    print(f"bundled {drop:26} {error:.1e} {told}")
    assert error < OFF, error
    assert told.attentions == 30 - len(ours.dropped.attn) + (0 in ours.dropped.attn)


def test_check_runs_vllm_and_says_what_it_compared(tmp_path: Path) -> None:
    """`export --check` by another Python, with a class of the plugin."""
    how: dict[str, Any] = {"run_check": True, "engine_python": PYTHON, "device": "cpu", "dtype": "float32"}
    folder = prunescope.export(wide("qwen3", tmp_path / "dense"), engine="vllm", drop="attn=2", out=str(tmp_path / "out"), **how)  # fmt: skip
    assert "3 prompts x 64 greedy tokens equal" in (folder / "README.md").read_text("utf-8")


def test_speed_times_dense_and_exported_side_by_side(tmp_path: Path) -> None:
    """Would catch the wrong folder behind a name, and a cache that keeps what is dropped."""
    dense = wide("qwen3", tmp_path / "dense")
    result = prunescope.speed(
        [dense, "drop:attn=1,3"], engine="vllm", engine_python=PYTHON, length=16, max_new_tokens=8, repeats=2, device="cpu", dtype="float32",
        out=str(tmp_path / "run"),
    )  # fmt: skip
    first, second = result.table().to_pylist()
    assert second["cache_ratio"] == pytest.approx(4 / 6) and second["decode_tokens_per_s"] > 0
    gone = sum(v.nbytes for n, v in load_file(Path(dense) / "model.safetensors").items() if ".1.self_attn." in n or ".1.input_" in n)  # fmt: skip
    assert first["weight_bytes"] - second["weight_bytes"] == 2 * gone


def test_folder_that_vllm_refuses_is_one_line(engine: Vllm, tmp_path: Path) -> None:
    """Would catch an end of the engine that hangs, and one without its reason."""
    dense = Path(wide("llama", tmp_path / "dense"))
    (dense / "model.safetensors").write_bytes(bytes(64))
    with pytest.raises(UserError, match=r"^vllm ended with 1: .*Error.*$"):
        engine.load(dense, dtype="float32", context=64)
