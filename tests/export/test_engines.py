"""Exported files in the engine itself, a prebuilt llama.cpp. `make test-engines` installs it; `make test` skips these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA_SPLIT, QWEN_SPLIT, byte_tokenizer, space_tokenizer, tiny

import prunescope
from prunescope.errors import UserError
from prunescope.export.llama_cpp_engine import LlamaCpp

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed; `make test-engines` installs it")
pytestmark = pytest.mark.filterwarnings("default")  # the engine's binding is not ours

PROMPT = "The history of the city of Vienna begins with"
STEPS, TOP = 64, 20
ERROR = 0.001  # of one log-probability of the bundled model; dense it is 0.0002 off
TINY_ERROR = 0.02  # of a random tiny model, whose logits are far apart; dense up to 0.01 off
DROPS = [
    "",
    "attn=3,7",
    "mlp=4",
    "attn=0",  # block 0 must have heads: one of zeros
    "attn=5;mlp=5",  # a whole block
    "attn=3,7,11,15,17,20,23,26",
    "mlp=0;attn=0,2",  # the loss of its first MLP destroys it
]
TINY = {
    "llama": ["", "attn=1,4", "mlp=0,3", "block=2", "attn=0;mlp=5;block=2"],
    "llama3": ["", "attn=2;mlp=3"],  # rotary frequencies scaled one by one, tied head
    "yarn": ["", "attn=2;mlp=3"],
    "qwen2": ["", "attn=1,4", "mlp=0,3", "block=2", "attn=0;mlp=5;block=2"],
    "mistral": ["", "attn=1,4", "mlp=0,3", "block=2"],
    "qwen3": ["", "block=2", "block=0,5"],
    "gemma3": ["", "block=2-3", "block=0-1,4-5"],  # every second block with a window of 8
}
WEIGHTS: dict[str, dict[str, Any]] = {"half": {"sparsity": 0.5}, "two_four": {"pattern": "2:4"}}


def compared(ours: Any, file: Path) -> float:
    """The largest error of a log-probability of the first token, once all greedy tokens are equal; plain transformers are the reference."""
    ids = ours.tokenizer(PROMPT)["input_ids"]
    with LlamaCpp(file, context=len(ids) + STEPS + 1) as engine:
        assert engine.tokenize(PROMPT) == ids
        never = engine.never_written()
        theirs = engine.write(ids, STEPS, TOP)
    with torch.no_grad():
        text = ours.model.generate(
            torch.tensor([ids]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=never
        )  # fmt: skip
        assert list(theirs.tokens) == text[0, len(ids) :].tolist()
        step = min(theirs.logprobs)  # 0, but where the first token is a part of a character
        row = ours.model(text[:, : len(ids) + step]).logits[0, -1]
    row[never] = -torch.inf
    first = row.log_softmax(-1)
    errors = [abs(value - first[i].item()) for i, value in theirs.logprobs[step].items() if i not in never]
    assert len(errors) > 10
    return max(errors)


@pytest.mark.parametrize("drop", DROPS)
def test_bundled_model_writes_the_same_tokens(drop: str, tmp_path: Path) -> None:
    """Against plain transformers with the sublayers dropped in memory. Would catch `deci` read otherwise than it is written: a block left as a
    whole, heads of another block, rotary halves in the wrong order."""
    ours = prunescope.load("smollm2-135m", device="cpu", dtype="float32", drop=drop or None)
    folder = prunescope.export("smollm2-135m", engine="llama.cpp", drop=drop or None, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    error = compared(ours, Path(folder) / "model.gguf")
    assert error < ERROR, error


@pytest.mark.parametrize(("family", "drop"), [(family, drop) for family, drops in TINY.items() for drop in drops])
def test_every_family_writes_the_same_tokens(family: str, drop: str, tmp_path: Path) -> None:
    """Would catch norms without Gemma's 1, a window or rotary base in the wrong block, biases or head norms left out, blocks renumbered wrongly."""
    dense = tiny(family, tmp_path / "dense")
    ours = prunescope.load(dense, device="cpu", dtype="float32", drop=drop or None)
    folder = prunescope.export(dense, engine="llama.cpp", drop=drop or None, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    error = compared(ours, folder / "model.gguf")
    assert error < TINY_ERROR, error


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "qwen3", "gemma3"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_pruned_weights_write_the_same_tokens(family: str, weights: str, tmp_path: Path) -> None:
    """Half of the weights gone, and 2:4; where the family allows it an attention as well. Would catch zeros that are lost or moved with the rows."""
    dense, sparse = tiny(family, tmp_path / "dense"), str(tmp_path / "sparse")
    prunescope.sparsify(dense, method="magnitude", out=sparse, device="cpu", dtype="float32", **WEIGHTS[weights])
    drop = None if family in ("qwen3", "gemma3") else "attn=2"
    ours = prunescope.load(sparse, device="cpu", dtype="float32", drop=drop)
    folder = prunescope.export(sparse, engine="llama.cpp", drop=drop, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    assert compared(ours, folder / "model.gguf") < TINY_ERROR


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_zeroed_runs_where_half_a_block_cannot_be_left_out(family: str, tmp_path: Path) -> None:
    """What the refusal of these families advises must work."""
    dense, zeroed = tiny(family, tmp_path / "dense"), str(tmp_path / "zeroed")
    prunescope.drop(dense, target="attn", n=2, format="zeroed", out=zeroed, device="cpu", dtype="float32", samples=2, seq_len=16, calibration="self")  # fmt: skip
    ours = prunescope.load(zeroed, device="cpu", dtype="float32")
    folder = prunescope.export(zeroed, engine="llama.cpp", device="cpu", dtype="float32", out=str(tmp_path / "out"))
    assert compared(ours, folder / "model.gguf") < TINY_ERROR


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe", "gpt-2", "spm"])
def test_engine_reads_text_as_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Would catch merges in another order, a split by another rule, and spaces or bytes that are read otherwise."""
    splits = {"qwen2": QWEN_SPLIT, "llama-bpe": LLAMA_SPLIT, "gpt-2": None}
    tokenizer = space_tokenizer() if kind == "spm" else byte_tokenizer(splits[kind])
    folder = prunescope.export(tiny("llama", tmp_path / "dense", tokenizer), engine="llama.cpp", device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    texts = [
        "The history of Vienna's  rivers, 12345 BC.\n\n  they'll   see", "naïve café ☃ 漢字 \t tabs\n", " leading, trailing ",
        "def mean(values):\n    return total / len(values)\n",
    ]  # fmt: skip
    with LlamaCpp(folder / "model.gguf", context=64) as engine:
        for text in texts:
            assert engine.tokenize(text) == tokenizer(text)["input_ids"]


def test_check_fails_where_the_file_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with one attention more than the model: would catch a check that compares nothing."""
    import prunescope.jobs.export as job

    dense = tiny("llama", tmp_path / "dense")
    write = job.write_gguf

    def wrong(loaded: Any, path: Path) -> str | None:
        dropped = loaded.dropped
        loaded.restore()
        found = write(loaded, path)
        loaded.drop(dropped)
        return found

    monkeypatch.setattr(job, "write_gguf", wrong)
    with pytest.raises(UserError, match="--check"):
        prunescope.export(dense, engine="llama.cpp", drop="attn=2", run_check=True, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_check_says_what_it_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tiny("qwen2", tmp_path / "dense")
    folder = prunescope.export(dense, engine="llama.cpp", drop="attn=2", run_check=True, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    assert "3 prompts x 64 greedy tokens equal" in capsys.readouterr().err
    assert "3 texts read as the same tokens" in (folder / "README.md").read_text("utf-8")


def test_speed_times_dense_and_exported_side_by_side(tmp_path: Path) -> None:
    """Cache bytes are the engine's own: 4 of 6 attentions. Would catch the wrong file behind a name, and a cache that keeps what is dropped."""
    dense = tiny("llama", tmp_path / "dense")
    result = prunescope.speed([dense, "drop:attn=1,3"], engine="llama.cpp", length=16, max_new_tokens=8, repeats=2, device="cpu", dtype="float32", out=str(tmp_path / "run"))  # fmt: skip
    first, second = result.table().to_pylist()
    assert second["cache_ratio"] == pytest.approx(4 / 6, abs=0.1)  # the log has two decimals of a MiB
    assert second["weight_bytes"] < first["weight_bytes"] and first["decode_tokens_per_s"] > 0
    assert prunescope.open(str(tmp_path / "run")).table().num_rows == 2


def test_file_that_the_engine_refuses_is_one_line(tmp_path: Path) -> None:
    """Would catch an abort of the engine that ends our process or hangs."""
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"llama.cpp ended with"):
        LlamaCpp(file, context=8)
