"""Exported models against prunescope's own: what is written must compute the same function in other hands."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tiny import YARN, byte_tokenizer, space_tokenizer, tiny
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import prunescope
from families import tiny_folder, tiny_tokenizer
from prunescope.errors import UserError
from prunescope.export.card import card
from prunescope.export.check import TEXTS
from prunescope.export.parts import Needs
from prunescope.export.transformers import FAMILIES, write_folder
from prunescope.export.vllm_names import IN_PLUGIN
from prunescope.export.vllm_plugin import CONFIGS
from prunescope.jobs.options import LoadOptions
from prunescope.runs.folder import Run


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
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


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_no_op_folder_is_the_same_function(family: str, engine: str, tmp_path: Path) -> None:
    """Read by plain transformers through `block_configs` alone. Would catch blocks marked that are not dropped, blocks renumbered wrongly, and
    MLPs filled up in the wrong place."""
    dense = tiny(family, tmp_path / "dense")
    drop = "attn=0,3;mlp=1;block=4"
    ours = prunescope.load(dense, dtype="float32", drop=drop).model
    folder = prunescope.export(dense, engine=engine, drop=drop, dtype="float32", out=str(tmp_path / "out"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_no_op_folder_is_what_the_engines_read(engine: str, tmp_path: Path) -> None:
    """By the rules in the engines' own `nemotron_nas.py`: would catch an MLP width that SGLang rounds otherwise, weights that vLLM has no place for,
    and a first block without the norm that begins the residual stream."""
    dense = tiny("qwen2", tmp_path / "dense")
    folder = prunescope.export(dense, engine=engine, drop="attn=0,3;mlp=1;block=4", out=str(tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    blocks = config["block_configs"]
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    assert [block["attention"]["no_op"] for block in blocks] == [False, False, False, True, False]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, True, False, False, False]
    assert config["num_attention_heads"] // blocks[1]["attention"]["n_heads_in_group"] == config["num_key_value_heads"]
    ffn = blocks[0]["ffn"]
    weights = load_file(folder / "model.safetensors")
    width = weights["model.layers.0.mlp.up_proj.weight"].shape[0]
    if engine == "sglang":
        plain = int(2 * ffn["ffn_mult"] * config["hidden_size"] / 3)
        assert plain + (-plain) % 256 == width == 256
        assert not weights["model.layers.1.self_attn.o_proj.bias"].any()
    else:
        assert "ffn_mult" not in ffn and ffn["intermediate_size"] == width == 96
        assert "model.layers.1.self_attn.o_proj.bias" not in weights and config["qkv_bias"]
    left_out = ("model.layers.3.self_attn.", "model.layers.3.input_", "model.layers.1.mlp.", "model.layers.1.post_")
    assert not [name for name in weights if name.startswith(left_out)]
    assert not weights["model.layers.0.self_attn.o_proj.weight"].any()


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
def test_half_a_block_is_refused_where_the_engine_has_no_class(engine: str, family: str, tmp_path: Path) -> None:
    dense = tiny(family, tmp_path / "dense")
    with pytest.raises(UserError, match=r"whole blocks"):
        prunescope.export(dense, engine=engine, drop="attn=2", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_vllm_gets_the_class_of_the_plugin_where_its_own_has_no_no_ops(family: str, tmp_path: Path) -> None:
    """Would catch a name that the plugin does not register, and a folder that vLLM would take for the dense model."""
    folder = prunescope.export(tiny(family, tmp_path / "dense"), engine="vllm", drop="attn=0,2;mlp=1", out=str(tmp_path / "out"))  # fmt: skip
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (architecture,) = config["architectures"]
    kind = next(kind for kind in CONFIGS.values() if kind.model_type == config["model_type"])
    assert isinstance(kind(**config), type(prunescope.load(str(tmp_path / "dense")).model.config))
    assert IN_PLUGIN[config["model_type"].removeprefix("prunescope_")] == architecture
    assert (config["no_attention"], config["no_mlp"]) == ([0, 2], [1])
    weights = load_file(folder / "model.safetensors")
    assert not [name for name in weights if ".0.self_attn." in name or ".0.input_" in name or ".1.mlp." in name]
    assert "pip install --no-deps prunescope" in (folder / "README.md").read_text("utf-8")


def test_plugin_registers_what_the_entry_point_and_the_folders_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes are read, not imported: vLLM is not here. Would catch a class that is registered and is not there, and a family without a config."""
    registered = {}
    registry = SimpleNamespace(register_model=lambda name, place: registered.update({name: place}))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})  # what it adds is gone after the test
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    (point,) = project["entry-points"]["vllm.general_plugins"].items()
    EntryPoint(*point, "vllm.general_plugins").load()()
    assert set(registered) == set(IN_PLUGIN.values()) and CONFIGS.keys() == IN_PLUGIN.keys() == FAMILIES.keys()
    models = importlib.util.find_spec("prunescope.export.vllm_models")
    assert models is not None and models.origin is not None
    written = {
        node.name for node in ast.parse(Path(models.origin).read_text("utf-8")).body if isinstance(node, ast.ClassDef)
    }
    for name, place in registered.items():
        module, there = place.split(":")
        assert module == models.name and there == name and name in written
    for kind in CONFIGS.values():
        assert type(transformers.AutoConfig.for_model(kind.model_type)) is kind


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, "windows in some of its blocks only"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
    ],
)  # fmt: skip
def test_what_vllm_does_not_compute_is_refused(family: str, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Would catch a folder that vLLM refuses with a long trace, or runs with other positions."""
    dense = tiny(family, tmp_path / "dense", **more)
    with pytest.raises(UserError, match=rf"--for vllm: .*{message}; export it --for transformers"):
        prunescope.export(dense, engine="vllm", drop="attn=2", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("engine", "family", "more", "message"),
    [
        ("llama.cpp", "mistral", {"sliding_window": 8}, "its architecture deci has no sliding window"),
        ("llama.cpp", "llama", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "its architecture deci has no attention_factor of YaRN"),
        ("llama.cpp", "llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, "its architecture deci has no rope_type dynamic"),
        ("sglang", "mistral", {"sliding_window": 8}, "its class of no-op layers has no sliding window"),
        ("sglang", "llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, "its class of no-op layers has no rope_type dynamic"),
        ("sglang", "llama", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "its class of no-op layers has no attention_factor of YaRN"),
    ],
)  # fmt: skip
def test_positions_and_windows_that_no_op_layers_do_not_have_are_refused(
    engine: Any, family: str, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Would catch a file that the engine loads, and runs with other positions or without the window."""
    dense = tiny(family, tmp_path / "dense", **more)
    with pytest.raises(UserError, match=rf"--for {engine}: {message}; .*--for transformers"):
        prunescope.export(dense, engine=engine, drop="attn=2", out=str(tmp_path / "out"))


def test_yarn_is_written_for_llama_cpp(tmp_path: Path) -> None:
    """Would catch a context that is the stretched one, by which llama.cpp would stretch no more."""
    folder = prunescope.export(tiny("yarn", tmp_path / "dense"), engine="llama.cpp", drop="attn=2", out=str(tmp_path / "out"))  # fmt: skip
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    found = [fields[f"deci.rope.scaling.{name}"].contents() for name in ("type", "factor", "original_context_length")]
    assert found == ["yarn", 8.0, 32]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_whole_blocks_are_a_plain_folder(engine: str, tmp_path: Path) -> None:
    """The family's own class runs it: would catch code of ours where none is needed, and per-layer lists that are not cut."""
    dense = tiny("gemma3", tmp_path / "dense")
    folder = prunescope.export(dense, engine=engine, drop="block=1,2", dtype="float32", out=str(tmp_path / "out"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is transformers.Gemma3ForCausalLM and not list(folder.glob("*.py"))
    ids = torch.randint(4, 60, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = prunescope.load(dense, dtype="float32", drop="block=1,2").model(ids).logits
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-5, atol=1e-5)


def test_pattern_of_windows_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    dense = tiny("gemma3", tmp_path / "dense")
    with pytest.raises(UserError, match=r"pattern of sliding windows.*--for transformers"):
        prunescope.export(dense, engine="llama.cpp", drop="block=2", out=str(tmp_path / "out"))


def test_check_compares_with_prunescope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal and said so in the card; with another model in the folder exit 2 and nothing written."""
    import prunescope.jobs.export as job

    dense = tiny("llama", tmp_path / "dense")
    folder = prunescope.export(dense, engine="transformers", drop="attn=2", run_check=True, out=str(tmp_path / "out"))
    assert "3 prompts x 64 greedy tokens equal" in (folder / "README.md").read_text("utf-8")
    other = tiny("llama", tmp_path / "other", seed=1)

    def wrong(loaded: Any, place: Path) -> bool:
        loaded = prunescope.load(other, dtype="float32", drop="attn=2")
        return write_folder(loaded, place)

    monkeypatch.setattr(job, "write_folder", wrong)
    with pytest.raises(UserError, match=r"--check: the engine does not write what prunescope writes"):
        prunescope.export(dense, engine="transformers", drop="attn=2", run_check=True, out=str(tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()


def test_push_to_hub_uploads_the_finished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub in the place of HfApi: would catch an upload of another folder, or before it is complete, and an argument that HfApi does not have."""
    calls: list[tuple[str, Any]] = []
    create, upload = (inspect.signature(method) for method in (HfApi.create_repo, HfApi.upload_folder))

    class Stub:
        def create_repo(self, repository: str, **how: Any) -> None:
            create.bind(self, repository, **how)
            calls.append((repository, how))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
            upload.bind(self, repo_id=repo_id, folder_path=folder_path, commit_message=commit_message)
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return f"https://hub.test/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Stub)
    dense = tiny("llama", tmp_path / "dense")
    prunescope.export(
        dense, engine="transformers", drop="attn=2", push_to_hub="me/pruned", private=True, out=str(tmp_path / "out")
    )
    assert calls[0] == ("me/pruned", {"private": True, "exist_ok": True})
    assert {"README.md", "config.json", "model.safetensors", "modeling_pruned.py"} <= set(calls[1][1])

    for method in ("create_repo", "upload_folder"):  # the client's messages have several lines

        def refuse(self: Any, *_: Any, **__: Any) -> None:
            raise PermissionError("401 no token\n\nsee the documentation")

        monkeypatch.setattr(Stub, method, refuse)
        kept = tmp_path / method
        with pytest.raises(UserError) as error:
            prunescope.export(dense, engine="transformers", push_to_hub="me/pruned", out=str(kept))
        assert str(error.value) == (
            f"--push-to-hub me/pruned: 401 no token; the folder {kept} is complete: hf auth login, then hf upload me/pruned {kept}"
        )
        assert (kept / "README.md").is_file()
        monkeypatch.setattr(Stub, "create_repo", lambda *_, **__: None)


@pytest.mark.parametrize("name", ["pruned", "a/b/c", "me/pruned model", "me/-x"])
def test_repository_that_the_hub_cannot_have_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--push-to-hub .*; write OWNER/NAME$"):
        prunescope.export("no-model", engine="transformers", push_to_hub=name, out=str(tmp_path / "out"))


def test_card_has_recipe_and_measured_damage(tmp_path: Path) -> None:
    """Numbers of run folders, by the right column: would catch a median in the place of a mean, and a local path on the hub."""
    loaded = prunescope.load(tiny("llama", tmp_path / "dense"), drop="attn=2")
    kl = Run(
        tmp_path, {"command": "divergence", "summary": {"p": {"kl_dense_target": {"median": 0.5, "mean": 0.0625}}}}
    )
    tasks = {str(tmp_path / "pruned"): {"arc": {"value": 0.75, "n": 40}}}
    runs = [kl, Run(tmp_path, {"command": "evaluate", "summary": tasks})]
    text = card(loaded, "vllm", Needs(code=True), checked=None, runs=runs)
    assert "| attention sublayers dropped | [2] of 6 |" in text and "vllm serve . --trust-remote-code" in text
    assert "By `prunescope divergence`:\n\n| | |\n|---|---|\n| p kl_dense_target | 0.0625 |\n" in text
    assert "| pruned arc | 0.75 |" in text
    assert "0.5 |" not in text and str(tmp_path) not in text


def test_check_in_vllm_reads_what_its_python_prints(tmp_path: Path) -> None:
    """A script in the place of a Python with vllm, that prints what plain transformers writes; then one wrong token. Would catch tokens and
    log-probabilities that are not compared, and a prompt compared with another's text."""
    dense = tiny("llama", tmp_path / "dense")
    model = prunescope.load(dense, dtype="float32", drop="attn=2")
    answers = []
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            first = model.model(ids).logits[0, -1].log_softmax(-1)
        new = model.model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        times = {"prefill_s": 1.0, "decode_s": 1.0}
        answers.append({"tokens": new[0, ids.shape[1] :].tolist(), "first": {"7": first[7].item()}, **times})
    script, loaded, printed = tmp_path / "python", tmp_path / "loaded", tmp_path / "answers"
    loaded.write_text('{"cache_bytes": 1, "cache_dtype": "float32", "attentions": 5, "architecture": "one"}\n')
    script.write_text(
        f'#!/bin/sh\nif [ "$2" = -c ]; then echo vllm 0; else read -r _; cat {loaded}; read -r _; cat {printed}; fi\n'
    )
    script.chmod(0o755)
    how: dict[str, Any] = {"engine": "vllm", "drop": "attn=2", "run_check": True, "engine_python": str(script)}
    printed.write_text(json.dumps(answers) + "\n")
    folder = prunescope.export(dense, dtype="float32", out=str(tmp_path / "out"), **how)
    assert "checked in vllm 0: 3 prompts x 64 greedy tokens equal" in (folder / "README.md").read_text("utf-8")
    answers[1]["first"]["7"] += 0.5
    printed.write_text(json.dumps(answers) + "\n")
    with pytest.raises(UserError, match=r"off by 0\.5"):
        prunescope.export(dense, dtype="float32", out=str(tmp_path / "off"), **how)
    answers[2]["tokens"][63] += 1
    printed.write_text(json.dumps(answers) + "\n")
    with pytest.raises(UserError, match=r"token 64 of 64"):
        prunescope.export(dense, dtype="float32", out=str(tmp_path / "wrong"), **how)
    printed.write_text("")
    with pytest.raises(UserError, match=r"vllm ended with 0"):
        prunescope.export(dense, dtype="float32", out=str(tmp_path / "silent"), **how)
    with pytest.raises(
        UserError,
        match=rf"no prunescope, whose plugin runs PrunedQwen3ForCausalLM: {script} -m pip install --no-deps prunescope",
    ):
        prunescope.export(tiny("qwen3", tmp_path / "qwen3"), dtype="float32", out=str(tmp_path / "plugin"), **how)


def test_options_that_do_not_go_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "out")
    for how, message in (
        ({"engine": "sglang", "run_check": True}, "--check runs llama.cpp, transformers, vllm, not sglang"),
        ({"engine": "vllm", "engine_python": "/no/python"}, "give both or neither"),
        (
            {"engine": "vllm", "run_check": True, "engine_python": "/no/python"},
            "--engine-python /no/python: No such file",
        ),
        ({"engine": "transformers", "private": True}, "--push-to-hub"),
    ):
        with pytest.raises(UserError, match=message):
            prunescope.export("no-model", out=out, **how)  # type: ignore[arg-type]
    monkeypatch.setattr(sys.modules["prunescope.export.llama_cpp_engine"], "ENGINE", "no_such_engine")
    with pytest.raises(UserError, match=r"llama.cpp is not installed here: pip install"):
        prunescope.export("no-model", engine="llama.cpp", run_check=True, out=out)
    with pytest.raises(UserError, match=r"llama.cpp is not installed here: pip install"):
        prunescope.speed(["no-model"], engine="llama.cpp")
    for how, message in (
        ({"engine": "vllm", "engine_python": "/no/python"}, "--engine-python /no/python: No such file"),
        ({"engine": "llama.cpp", "engine_python": "/no/python"}, "--engine-python is for vllm alone"),
        ({"engine_python": "/no/python"}, "--engine-python is for --engine vllm"),
        ({"engine": "vllm", "sparse_kernels": True}, "vllm has none"),
    ):
        with pytest.raises(UserError, match=message):
            prunescope.speed(["no-model"], **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bytes", "spaces", "words"])
def test_gguf_tokenizer_is_that_of_the_folder(kind: str, tmp_path: Path) -> None:
    """Would catch texts at other ids, merges or scores in another order, and a tokenizer that llama.cpp would read otherwise written all the same."""
    tokenizer = {"bytes": byte_tokenizer, "spaces": space_tokenizer, "words": tiny_tokenizer}[kind]()
    folder = prunescope.export(tiny("llama", tmp_path / "dense", tokenizer), engine="llama.cpp", out=str(tmp_path / "out"))  # fmt: skip
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    found = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.ggml.")}
    if kind == "words":
        assert found == {"tokenizer.ggml.model": "none"}
        assert "has no tokenizer: its tokenizer is of type WordLevel" in (folder / "README.md").read_text("utf-8")
        return
    texts = found["tokenizer.ggml.tokens"]
    assert len(texts) == 320 and all(texts[i] == text for text, i in tokenizer.get_vocab().items())
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    if kind == "bytes":
        assert found["tokenizer.ggml.pre"] == "qwen2"
        assert [merge.split(" ") for merge in found["tokenizer.ggml.merges"]] == [list(merge) for merge in merges]
    else:
        scores = dict(zip(texts, found["tokenizer.ggml.scores"], strict=True))
        made = list(dict.fromkeys(left + right for left, right in merges))
        assert sorted(made, key=lambda text: -scores[text]) == made
        assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def test_packed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch integers of a quantised checkpoint written as if they were its weights, and a format in config.json that its weights no longer have."""
    dense = tiny("llama", tmp_path / "dense")
    load = LoadOptions.load

    def quantised(self: Any, ref: Any, **how: Any) -> Any:
        loaded = load(self, ref, **how)
        loaded.model.config.quantization_config = {"quant_method": "gptq"}
        return loaded

    monkeypatch.setattr(LoadOptions, "load", quantised)
    folder = prunescope.export(dense, engine="vllm", drop="attn=2", out=str(tmp_path / "floats"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text("utf-8"))

    def packed(self: Any, ref: Any, **how: Any) -> Any:
        loaded = quantised(self, ref, **how)
        part = loaded.model.model.layers[0].mlp.up_proj
        part.weight = torch.nn.Parameter(part.weight.to(torch.int8), requires_grad=False)
        return loaded

    monkeypatch.setattr(LoadOptions, "load", packed)
    with pytest.raises(UserError, match=r"quantised already, which --for llama\.cpp cannot work on; give --dequantise"):
        prunescope.export(dense, engine="llama.cpp", out=str(tmp_path / "out"))


def test_plugin_needs_none_of_our_packages() -> None:
    """`pip install --no-deps prunescope` is what vLLM's environment gets. Would catch an import that is not there, which vLLM reports in its log alone."""
    gone = ["accelerate", "datasets", "gguf", "jinja2", "jsonargparse", "matplotlib", "numba", "platformdirs", "pyarrow", "scipy"]  # fmt: skip
    script = f"import sys; sys.modules |= dict.fromkeys({gone}); from prunescope.export.vllm_plugin import CONFIGS; print(len(CONFIGS))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(CONFIGS)), done.stderr
