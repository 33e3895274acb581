"""Exported models against prunescope's own: what is written must compute the same function in other hands."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

import prunescope
from families import tiny_folder
from prunescope.errors import UserError


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("drop", ["attn=0,2;mlp=1,5", "attn=3,4;mlp=3"])
def test_plain_transformers_writes_the_same_tokens(family: str, drop: str, tmp_path: Path) -> None:
    """Would catch a wrong sublayer left out, and a cache whose count of tokens is lost with the attention of block 0."""
    dense = str(tiny_folder(family, tmp_path / "dense"))
    ours = prunescope.load(dense, dtype="float32", drop=drop).model
    folder = prunescope.export(dense, engine="transformers", drop=drop, dtype="float32", out=str(tmp_path / "out"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
        texts = [
            m.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
            for m in (ours, theirs)
        ]
    assert texts[0].equal(texts[1])


def test_transformers_folder_is_never_the_dense_model(tmp_path: Path) -> None:
    """Would catch a folder that loads without its modelling file, with random weights where sublayers are gone."""
    dense = str(tiny_folder("llama", tmp_path / "dense"))
    folder = prunescope.export(dense, engine="transformers", drop="attn=1", out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_has_no_heads_where_attention_is_dropped(family: str, tmp_path: Path) -> None:
    """Would catch arrays out of step with the blocks, weights of dropped sublayers, and query rows in transformers' order."""
    dense = str(tiny_folder(family, tmp_path / "dense"))
    config = json.loads((tmp_path / "dense" / "config.json").read_text("utf-8"))
    config |= {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config), "utf-8")
    folder = prunescope.export(dense, engine="llama.cpp", drop="attn=0,2,3;mlp=3,4", out=str(tmp_path / "out"))
    reader = gguf.GGUFReader(folder / "model.gguf")
    assert reader.fields["deci.attention.head_count"].contents() == [1, 4, 0, 4, 4]
    assert reader.fields["deci.feed_forward_length"].contents()[3] == 32
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert "blk.2.attn_q.weight" not in tensors and not tensors["blk.0.attn_q.weight"].any()
    query = prunescope.load(dense, dtype="float32").model.model.layers[5].self_attn.q_proj.weight.detach().numpy()
    assert ("blk.4.attn_q.bias" in tensors) == (family == "qwen2")
    rows = [8 * head + half * 4 + pair for head in range(4) for pair in range(4) for half in range(2)]
    np.testing.assert_array_equal(tensors["blk.4.attn_q.weight"], query[rows])


def test_what_llama_cpp_cannot_run_is_refused(tmp_path: Path) -> None:
    """Would catch a file that llama.cpp loads and computes wrongly: `deci` has no norm of queries and keys."""
    dense = str(tiny_folder("qwen3", tmp_path / "dense"))
    with pytest.raises(UserError, match=r"qwen3.*--for transformers"):
        prunescope.export(dense, engine="llama.cpp", drop="attn=2", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
