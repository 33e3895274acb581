"""Every format that a checkpoint may be quantised in, with every command that compares or scores, as DENSE and as TARGET.

Numbers are held against the package's own model in plain transformers, and the two directions against each other: exchanging DENSE and TARGET exchanges
the two KLs and the two sides, and nothing else.
"""

from __future__ import annotations

import copy
import json
import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import transformers
from test_loading import mxfp4_folder
from test_packed import FORMATS, wide  # noqa: F401  (a fixture)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import families
import prunescope
from prunescope.errors import UserError
from prunescope.models.loading import load_model
from prunescope.models.references import bundled_file
from prunescope.sweep.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own
HOW: dict[str, Any] = {"device": "cpu", "dtype": "float32", "seed": 0}
QUICK = (
    "bitsandbytes 4",
    "torchao int4",
    "compressed-tensors W8A16",
    "gguf",
)  # in `make test`; all in `make test-quant`
NAMES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.quant]) for name in (*FORMATS, "mxfp4", "gguf")]
ALONE = ("bitsandbytes 8",)  # what a token gives depends on those beside it, see docs/quantised.md


@cache
def gguf_content() -> bytes:
    """Of `gguf_file`, which takes seconds to write."""
    with TemporaryDirectory() as folder:
        return gguf_file(Path(folder) / "model.gguf").read_bytes()


def gguf_file(file: Path) -> Path:
    """The bundled model cut down to three blocks of width 128, its matrices in Q5_0, as a GGUF file."""
    q5, f32 = gguf.GGMLQuantizationType.Q5_0, gguf.GGMLQuantizationType.F32
    sizes = {
        "block_count": 3,
        "embedding_length": 128,
        "feed_forward_length": 256,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
    }
    limits = {
        "ffn_down": (128, 256),
        "ffn_gate": (256, 128),
        "ffn_up": (256, 128),
        "attn_k": (64, 128),
        "attn_v": (64, 128),
    }
    reader, writer = gguf.GGUFReader(bundled_file()), gguf.GGUFWriter(file, "llama")
    signs = list(bytes_to_unicode().values())
    words = {  # one token a byte, so that the tokenizer is made in no time
        "tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *signs, "\u0120a"], "token_type": [3] * 3 + [1] * 257, "merges": ["\u0120 a"],
    }  # fmt: skip
    sizes |= {"vocab_size": 260}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            value = sizes.get(field.name.removeprefix("llama."))
            if value is None:
                value = words.get(field.name.removeprefix("tokenizer.ggml."), field.contents())
            writer.add_key_value(field.name, value, *[*field.types, None][:2])
    for tensor in reader.tensors:
        pieces = tensor.name.split(".")
        if pieces[0] == "blk" and int(pieces[1]) >= 3:
            continue
        whole = gguf.dequantize(tensor.data, tensor.tensor_type)
        if whole.ndim == 1:
            data, kind = whole[:128].astype(np.float32), f32
        elif pieces[0] == "blk":
            rows, width = limits.get(pieces[2], (128, 128))
            data, kind = gguf.quantize(np.ascontiguousarray(whole[:rows, :width]), q5), q5
        else:
            data, kind = np.ascontiguousarray(whole[:260, :128], dtype=np.float32), f32
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def plain_transformers(ref: str) -> Any:
    """The model as transformers and the format's own package load it."""
    place = Path(ref)
    how = {"gguf_file": place.name} if place.suffix == ".gguf" else {}
    where = place.parent if how else place
    return transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **how).eval()


def spelling_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character, of the 60 that questions and sums are written in, so that options differ in a vocabulary of 64."""
    signs = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *dict.fromkeys("0123456789 +-=:\n.,?ABCDEQ" + "abcdefghijklmnopqrstuvwxyz"),
    ]
    inner = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    assert len(signs) <= families.VOCAB
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def pair(request: pytest.FixtureRequest, wide: Path, tmp_path: Path) -> tuple[str, str, str]:  # noqa: F811
    """The format's name, the plain model, and a checkpoint of it in that format."""
    name: str = request.param
    if name in ("gptq", "awq") and "GPTQMODEL" not in os.environ:
        pytest.importorskip("gptqmodel", reason="gptqmodel is not installed; `make test-quant` installs it")
    folder, dense = tmp_path / "packed", wide
    if name in ("mxfp4", "gguf"):  # the dense model is made of the packed one
        if name == "gguf":
            folder = tmp_path / "packed.gguf"
            folder.write_bytes(gguf_content())
        else:
            mxfp4_folder(folder)
        dense = other_of(str(folder), tmp_path / "plain")
    else:
        folder.mkdir()
        FORMATS[name](dense, folder)
    for place in (dense, folder):
        if name == "gguf":
            load_model(folder, device="cpu").tokenizer.save_pretrained(dense)
        else:
            spelling_tokenizer().save_pretrained(place)
    return name, str(dense), str(folder)


def other_of(packed: str, folder: Path) -> Path:
    """A plain model of the numbers that ``packed`` stands for, the last matrix of every block by some percent larger."""
    opened = plain_transformers(packed)
    config = copy.deepcopy(opened.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(opened.state_dict())
    with torch.no_grad():
        for number, layer in enumerate(plain.model.layers):
            down = layer.mlp.experts.down_proj if hasattr(layer.mlp, "experts") else layer.mlp.down_proj.weight
            down.mul_(1 + 0.1 * (number + 1))
    plain.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Prompts, questions, a collection."""
    (tmp_path / "prompts.txt").write_text("w5 w6 w7\nw8 w9\n", "utf-8")
    asked = [{"question": f"w{i} w7", "choices": ["w10", "w11", "w12"], "answer": i % 3} for i in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked), "utf-8")
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [{"_id": f"{name[0]}{i}", "text": f"w{4 + 3 * i} w{20 + i} w{9 + i}"} for i in range(4)]
        (beir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tc1\t1\nq2\tc2\t1\n", "utf-8")
    return {
        "writing": {"prompts": str(tmp_path / "prompts.txt"), "max_new_tokens": 3},
        "questions": str(tmp_path / "questions.jsonl"),
        "corpus": str(beir),
        "scoring": {"tasks": "arithmetic-mc", "limit": 2, "shots": 0},
    }


def columns(table: Any, *names: str) -> list[np.ndarray]:
    return [np.asarray(table[name].to_pylist(), float) for name in names]


def close(a: Any, b: Any, name: str) -> None:
    """Sums over a vocabulary of 64 in float32, from states in half precision where the format multiplies in it."""
    assert np.allclose(a, b, rtol=2e-2, atol=2e-4), (name, a, b)


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_mcq_and_generate_both_ways(pair: tuple[str, str, str], files: dict[str, Any]) -> None:
    """KL at the answer by plain transformers with the package's own model. Catches a base that is swapped, packed bytes read as numbers by one of the two
    commands, and a checkpoint that can be TARGET only."""
    name, dense, packed = pair
    there = prunescope.mcq(dense, packed, questions=files["questions"], **HOW)
    back = prunescope.mcq(packed, dense, questions=files["questions"], **HOW)
    rows, other = (found.table().filter(pc.equal(found.table()["space"], "global")) for found in (there, back))
    theirs = {ref: plain_transformers(ref) for ref in (dense, packed)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    expected = []
    for row in there.samples():
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        with torch.no_grad():
            p, q = (theirs[ref](ids).logits[0, -1].double().log_softmax(-1) for ref in (dense, packed))
        expected.append((p.exp() * (p - q)).sum().item())
    (kl, reverse), (kl_back, reverse_back) = (columns(t, "kl_dense_target", "kl_target_dense") for t in (rows, other))
    assert kl.min() > 0
    if name not in ALONE:
        close(kl, expected, name)
        close(kl, reverse_back, name)
        close(reverse, kl_back, name)
    alike = prunescope.layerwise(packed, packed, **files["writing"], **HOW).table()
    for column in ("h_orth_rel", "z_cos_dev", "kl_dense_target"):
        assert np.abs(columns(alike, column)[0]).max() < 1e-6, column
    for ours, target in ((dense, packed), (packed, dense), (packed, packed)):
        written = prunescope.generate(ours, target, **files["writing"], **HOW)
        mean = written.summary["p"]["kl_dense_target"]["mean"]
        assert np.isfinite(mean) and (mean == 0) == (ours == target)
        with torch.no_grad():  # what DENSE writes is what its own generate writes
            prompt = written.samples()[0]["prompt_tokens"]
            text = theirs[ours].generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0, len(prompt) :]
        if name not in ALONE:
            assert written.samples()[0]["dense_tokens"] == text.tolist()


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_retrieve_and_evaluate_both_ways(pair: tuple[str, str, str], files: dict[str, Any]) -> None:
    """Measures and scores belong to the model, not to its place. Catches a side that is loaded as the other."""
    name, dense, packed = pair
    there, back = (
        prunescope.retrieve(*refs, corpus=files["corpus"], depth=4, recall_at="1,2", **HOW).table()
        for refs in ((dense, packed), (packed, dense))
    )
    if name not in ALONE:
        for ours, theirs in (("dense", "target"), ("target", "dense")):
            close(*columns(there, f"ndcg_10_{ours}"), *columns(back, f"ndcg_10_{theirs}"), name)
    assert np.all(columns(there, "h_cos_dev")[0] > 0)
    first, second = (
        prunescope.evaluate(list(refs), **files["scoring"], **HOW).table()
        for refs in ((dense, packed), (packed, dense))
    )
    assert {(r["model"], r["item"]): r for r in first.to_pylist()}.keys() == {
        (r["model"], r["item"]): r for r in second.to_pylist()
    }.keys()
    for ref in (dense, packed):
        scores = [t.filter(pc.equal(t["model"], ref))["score"].to_pylist() for t in (first, second)]
        assert scores[0] == scores[1] and len(scores[0]) == 2


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_sweep_and_speed(pair: tuple[str, str, str], files: dict[str, Any], tmp_path: Path) -> None:
    """Dropping from a packed model, with its own bytes; --quant only where its weights are plain, else one line that names the way out.
    Catches packed weights that are rounded once more, and bytes that are those of floats."""
    _, dense, packed = pair
    few: Any = {"samples": 2, "seq_len": 16, "cache": False, **files["scoring"], **files["writing"], **HOW}
    swept = prunescope.sweep(packed, target="attn", n="1", **few)
    table = swept.table()
    size = dict(zip(table["point"].to_pylist(), table["bytes"].to_pylist(), strict=True))
    assert 0 < size["attn-001"] < size["dense"] and swept.summary["kl"]["attn-001"] > 0
    is_packed = load_model(packed, device="cpu").describe().get("quantisation", {}).get("packed", False)
    if is_packed:
        assert size["dense"] < Storage(load_model(dense, device="cpu")).bytes()
        with pytest.raises(UserError, match="--dequantise"):
            prunescope.sweep(packed, quant="int8", **few)
    opened = prunescope.sweep(packed, quant="int8", dequantise=True, **few)
    assert opened.summary["kl"]["quant-int8"] > 0
    timed = prunescope.speed([packed, dense], batch_size="1", length=8, max_new_tokens=4, repeats=1, **HOW).table()
    memory = dict(zip(timed["model"].to_pylist(), timed["memory_bytes"].to_pylist(), strict=True))
    assert memory[packed] > 0 and (memory[packed] < memory[dense]) == is_packed
