"""Exported files in the engine itself, a prebuilt llama.cpp. `make test-engines` installs it; `make test` skips these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunescope

pytestmark = pytest.mark.filterwarnings("default")  # the engine's binding is not ours

PROMPT = "The history of the city of Vienna begins with"
STEPS = 64
# what is dropped -> how far one log-probability of the 20 most likely first tokens may be off; the dense model itself is 0.005 off
DROPS = {
    "": 0.02,
    "attn=3,7": 0.02,
    "mlp=4": 0.02,
    "attn=0": 0.02,  # block 0 must have heads: one of zeros
    "attn=5;mlp=5": 0.02,  # a whole block
    "attn=3,7,11,15,17,20,23,26": 0.02,
}


def by_llama_cpp(file: Path, ids: list[int]) -> list[dict[str, Any]]:
    """The engine's greedy tokens, each with the most likely ones and their log-probabilities; float32 keys and values, one thread."""
    engine = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed; `make test-engines` installs it")
    options = engine.CommonParams()
    options.model.path = str(file)
    options.n_ctx, options.n_parallel, options.warmup = 256, 1, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    asked = {"prompt": ids, "max_tokens": STEPS, "temperature": 0, "logprobs": 20, "ignore_eos": True, "cache_prompt": False}  # fmt: skip
    found = engine.Server(options).handle_completions(asked)
    found = found if isinstance(found, dict) else json.loads(found)
    content: list[dict[str, Any]] = found["choices"][0]["logprobs"]["content"]
    return content


@pytest.mark.parametrize("drop", DROPS)
def test_llama_cpp_writes_the_same_tokens(drop: str, tmp_path: Path) -> None:
    """The bundled model, against plain transformers with the sublayers dropped in memory. Would catch `deci` read otherwise than it is written:
    a block left as a whole, heads of another block, rotary halves in the wrong order."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed; `make test-engines` installs it")
    ours = prunescope.load("smollm2-135m", device="cpu", dtype="float32", drop=drop or None)
    folder = prunescope.export("smollm2-135m", engine="llama.cpp", drop=drop or None, device="cpu", dtype="float32", out=str(tmp_path / "out"))  # fmt: skip
    ids = ours.tokenizer(PROMPT)["input_ids"]
    theirs = by_llama_cpp(Path(folder) / "model.gguf", ids)
    with torch.no_grad():
        first = ours.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        text = ours.model.generate(
            torch.tensor([ids]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert [token["id"] for token in theirs] == text[0, len(ids) :].tolist()
    errors = [abs(token["logprob"] - first[token["id"]].item()) for token in theirs[0]["top_logprobs"]]
    assert len(errors) == 20 and max(errors) < DROPS[drop], max(errors)
