"""Unfinished run folders of an earlier version are continued, not refused: what names them is written out here as it was at commit 1896f08.

Whether a folder is continued hangs on a hash of what the run is made from. A field more in an option or in a model's description would change
every hash, and each run that is under way would have to start anew; the other tests would not notice, since they stop and resume the same code.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

import prunescope
from families import characters_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    characters_folder(folder / "model")
    (folder / "prompts.txt").write_text("cat\n", "utf-8")
    row = {"question": "2 + 2", "choices": ["3", "4"], "answer": 1}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    return folder


def identity(model: Path) -> dict[str, str]:
    """What a model was called: its reference and a hash of its weights (relative names, sizes and bytes of the files)."""
    info = prunescope.generate(
        str(model), "drop:attn=1", prompts=str(model.parent / "prompts.txt"), max_new_tokens=1
    ).info
    return {key: info["models"]["dense"][key] for key in ("source", "content_hash")}


@pytest.fixture(scope="module")
def named(place: Path) -> dict[str, str]:
    found = identity(place / "model")
    assert found["source"] == str(place / "model")
    assert found["content_hash"].startswith("sha256:") and len(found["content_hash"]) == 7 + 64
    return found


def described(named: dict[str, str]) -> dict[str, Any]:
    """The tiny model as it was described, in this order."""
    with safe_open(Path(named["source"]) / "model.safetensors", "pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    return {
        **named, "architecture": "LlamaForCausalLM", "blocks": 5, "hidden_size": 32, "vocab_size": 100, "parameters": parameters,
        "dtype": "float32", "sparsity": 0.0, "drop_attn_list": [], "drop_mlp_list": [],
    }  # fmt: skip


def signs(text: str) -> list[int]:
    """The tokens of a text: a sign each, after five others."""
    return [4 if sign == "\n" else ord(sign) - 27 for sign in text]


GREEDY = "Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)"


@pytest.mark.parametrize("command", ["layerwise", "generate", "mcq"])
def test_the_key_of_a_comparison(command: str, place: Path, named: dict[str, str]) -> None:
    """Would catch another description of a model, another order or number of settings, another form of what is sampled."""
    dense, drop = str(place / "model"), "drop:attn=1"
    prompts = {"prompts": str(place / "prompts.txt"), "max_new_tokens": 2, "batch_size": 1}
    if command == "layerwise":
        found = prunescope.layerwise(dense, drop, **prompts).info["key"]
        inputs, settings = [signs("cat")], f"(2, {GREEDY}, True, 1, 'raw', 1.0)"
    elif command == "generate":
        found = prunescope.generate(dense, drop, **prompts).info["key"]
        inputs, settings = [signs("cat")], f"('generate', 2, {GREEDY}, True, 'both', 1, 1.0)"
    else:
        found = prunescope.mcq(dense, drop, questions=str(place / "questions.jsonl"), batch_size=1).info["key"]
        asked = signs("2 + 2\nA. 3\nB. 4\nAnswer:")
        inputs, settings = [[asked, [signs(" A"), signs(" B")], 1]], "('mcq', 1, 1.0)"
    text = f"({described(named)!r}, {'attn=1'!r}, {inputs!r}, {settings})"
    assert found == hashlib.sha256(text.encode()).hexdigest()


def evaluate_key(named: dict[str, str], label: str) -> str:
    scoring = {
        "limit": 3, "shots": 1, "seed": 0, "allow_code_execution": False, "max_new_tokens": None, "data": None,
    }  # fmt: skip
    parts = [named | {"dropped": ""}, [label], ["reversal-mc", "arithmetic-mc"], "torch.float32", scoring]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def test_an_unfinished_evaluation_goes_on(place: Path, named: dict[str, str], tmp_path: Path) -> None:
    """The first task as an earlier version left it, with scores that the model does not reach: they stay, so the part was read and not made again."""
    dense = str(place / "model")
    options: dict[str, Any] = {"tasks": "reversal-mc,arithmetic-mc", "limit": 3, "shots": 1}
    whole = prunescope.evaluate([dense], **options).table().to_pylist()
    left = tmp_path / "run.partial"
    left.mkdir()
    (left / ".unfinished").touch()
    (left / "part-state.json").write_text(json.dumps({"key": evaluate_key(named, dense), "texts": []}), "utf-8")
    rows = [
        {k: v for k, v in row.items() if k != "model"} | {"score": 0.125}
        for row in whole
        if row["task"] == "reversal-mc"
    ]
    columns = ("task", "kind", "item", "key", "metric", "score", "prediction", "gold")
    schema = pa.schema([(name, {"item": pa.int32(), "score": pa.float64()}.get(name, pa.string())) for name in columns])
    score = {
        "metric": "acc", "kind": "choice", "value": 0.125, "stderr": 0.1, "ci95": [0.0, 0.5], "n": 3, "chance": 0.25, "shots": 1, "note": None,
    }  # fmt: skip
    notes = {"scores": {"reversal-mc": score}, "model": named | {"dropped": ""}}
    table = pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata({"prunescope": json.dumps(notes)})
    pq.write_table(table, left / "part-00000.parquet")
    found = prunescope.evaluate([dense], **options, out=str(tmp_path / "run"), resume=True).table().to_pylist()
    changed = [row | ({"score": 0.125} if row["task"] == "reversal-mc" else {}) for row in whole]
    assert found == changed and found != whole


def test_the_key_of_a_sparsified_checkpoint(place: Path, named: dict[str, str], tmp_path: Path) -> None:
    """Would catch an option that is new and stands in the key with its default: give it a value that leaves it out."""
    out = tmp_path / "sparse"
    prunescope.sparsify(str(place / "model"), method="magnitude", sparsity=0.5, calibration="none", out=str(out))
    config = {
        "method": "magnitude", "sparsity": 0.5, "pattern": None, "variant": False, "allocation": "uniform", "owl_spread": 0.08,
        "owl_threshold": 5.0, "block_size": 128, "damping": 0.01, "samples": None, "seq_len": None, "batch_size": None, "seed": 0,
        "perplexity_windows": None, "dtype": "auto", "device": "auto", "revision": None, "trust_remote_code": False,
    }  # fmt: skip
    content = {
        "config": config, "map": {}, "model": named, "dtype": "torch.float32", "device": "cpu", "calibration": None, "windows": None,
        "versions": {name: version(name) for name in ("prunescope", "torch", "transformers")},
    }  # fmt: skip
    text = json.dumps(content, sort_keys=True)
    assert json.loads((out / "prunescope.json").read_text("utf-8"))["key"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_summary_under_its_old_name(tmp_path: Path) -> None:
    """A sweep of 0.1 says `foretells`, where 0.2 says `predicts`."""
    folder = tmp_path / "old"
    folder.mkdir()
    best = {"all generative": [{"column": "kl_dense_target", "spearman": 0.9, "count": 5}]}
    info = {"schema_version": 1, "command": "sweep", "complete": True, "summary": {"foretells": best}}
    (folder / "run.json").write_text(json.dumps(info), "utf-8")
    pq.write_table(pa.table({"point": ["dense"]}), folder / "sweep.parquet")
    assert prunescope.open(folder).summary == {"predicts": best}
