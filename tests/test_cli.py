"""The command line as its users meet it: help, one line for every mistake, the demo."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunescope
from families import CONFIGS, tiny_folder, tiny_model, tiny_tokenizer
from prunescope.cli import COMMANDS, main


def test_the_public_surface_is_pinned() -> None:
    assert prunescope.__all__ == [
        "AdviseResult",
        "DemoResult",
        "DivergenceResult",
        "DropResult",
        "EvaluateResult",
        "GenerateResult",
        "HealResult",
        "LayerwiseResult",
        "McqResult",
        "RetrieveResult",
        "Run",
        "SparsifyResult",
        "SpeedResult",
        "SweepResult",
        "UserError",
        "advise",
        "demo",
        "divergence",
        "drop",
        "evaluate",
        "export",
        "generate",
        "heal",
        "layerwise",
        "load",
        "mcq",
        "open",
        "report",
        "retrieve",
        "sparsify",
        "speed",
        "sweep",
    ]
    assert list(COMMANDS) == [
        *(
            "demo",
            "drop",
            "sparsify",
            "heal",
            "export",
            "layerwise",
            "generate",
            "mcq",
            "divergence",
            "retrieve",
            "evaluate",
            "sweep",
            "advise",
            "speed",
            "report",
        ),
    ]
    assert all(getattr(prunescope, name).__doc__ for name in prunescope.__all__)


def test_import_and_help_load_no_torch() -> None:
    code = "import sys, prunescope, prunescope.cli; prunescope.cli.main(['--help'])"
    probe = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nassert not {{'torch', 'transformers', 'pyarrow', 'matplotlib'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_from_signature_and_docstring(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--overwrite" in text and "--config CONFIG" in text
    assert "_" not in "".join(word for word in text.split() if word.startswith("--")).replace("--print_config", "")


def test_print_config_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["layerwise", "some/model", "drop:attn=1", "--batch-size", "3", "--chat", "--print_config"])
    text = capsys.readouterr().out
    for line in ("dense: some/model", "target: drop:attn=1", "batch_size: 3", "chat: true", "lens: raw"):
        assert line in text


# --- every mistake: one line, exit 2, nothing written ------------------------------------------------------------------

Prepare = Callable[[Path], list[str]]


def model(folder: Path) -> str:
    return str(tiny_folder("llama", folder / "dense"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    path = Path(model(folder)) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    return str(path.parent)


def edit_config(folder: Path, **changes: object) -> str:
    path = Path(model(folder)) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(path.parent)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(folder: Path, *names: str) -> str:
    dense = model(folder)
    for name in names:
        (Path(dense) / name).unlink()
    return dense


def cut_weights(folder: Path) -> str:
    dense = model(folder)
    cut(Path(dense) / "model.safetensors")
    return dense


def file(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def other_vocabulary(folder: Path) -> str:
    import transformers

    config = CONFIGS["llama"]()
    config.vocab_size = 80
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "wide")
    tiny_tokenizer().save_pretrained(folder / "wide")
    return str(folder / "wide")


def other_tokenizer(folder: Path) -> str:
    """The same words under other ids."""
    target = tiny_folder("llama", folder / "other", seed=1)
    path = target / "tokenizer.json"
    path.write_text(path.read_text().replace('"w4":', '"SWAP":').replace('"w5":', '"w4":').replace('"SWAP":', '"w5":'))
    return str(target)


def pickled(folder: Path) -> str:
    dense = without(folder, "model.safetensors")
    torch.save({}, Path(dense) / "pytorch_model.bin")
    return dense


def newer_recipe(folder: Path) -> str:
    (folder / "r").mkdir()
    (folder / "r" / "prunescope.json").write_text('{"schema_version": 7}')
    return str(folder / "r")


def post_norm_opt(folder: Path) -> str:
    import transformers

    config = CONFIGS["opt"]()
    config.do_layer_norm_before = False
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "opt")
    tiny_tokenizer().save_pretrained(folder / "opt")
    return str(folder / "opt")


def encoder(folder: Path) -> str:
    import transformers

    transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(folder / "t5")
    return str(folder / "t5")


def sparse(folder: Path, *options: str, dense: str | None = None, words: int = 200) -> list[str]:
    text = file(folder, "words.txt", " ".join(f"w{4 + i % 50}" for i in range(words)))
    sizes = ["--calibration", text, "--samples", "4", "--seq-len", "16"]
    return ["sparsify", dense or model(folder), *sizes, *(options or ("--sparsity", "0.5"))]


def sharded(folder: Path, spoil: Callable[[Path], None]) -> str:
    tiny_model("llama").save_pretrained(folder / "dense", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder / "dense")
    spoil(sorted((folder / "dense").glob("*.safetensors"))[1])
    return str(folder / "dense")


def recipe(folder: Path) -> str:
    result = prunescope.drop(model(folder), n=1, samples=2, seq_len=8, device="cpu")
    result.save(folder / "recipe")
    return str(folder / "recipe")


MISTAKES: dict[str, tuple[Prepare, str]] = {
    "no command": (lambda f: [], "expected"),
    "unknown command": (lambda f: ["dorp"], "dorp"),
    "unknown option": (lambda f: ["drop", model(f), "--nn", "3"], "--nn"),
    "wrong choice": (lambda f: ["layerwise", model(f), "--lens", "blue"], "raw"),
    "not a number": (lambda f: ["drop", model(f), "--n", "many"], "many"),
    "unknown dtype": (lambda f: ["layerwise", model(f), "--dtype", "int8"], "float32"),
    "unknown device": (lambda f: ["layerwise", model(f), "--device", "cuda:9"], "--device cpu"),
    "nothing dropped": (lambda f: ["layerwise", model(f), "drop:"], "drops nothing"),
    "bad drop spec": (lambda f: ["layerwise", model(f), "drop:heads=2"], "cannot read 'heads=2'"),
    "layer out of range": (lambda f: ["layerwise", model(f), "drop:attn=1,6"], "layer 6 is out of range; the model has layers 0 to 5"),
    "too many to drop": (lambda f: ["drop", model(f), "--n", "7"], "choose 1 to 6"),
    "no such folder": (lambda f: ["layerwise", str(f / "none")], "no such folder"),
    "no such gguf": (lambda f: ["layerwise", str(f / "none.gguf")], "no such file"),
    "not a gguf": (lambda f: ["layerwise", file(f, "x.gguf", "GGUF? no")], "cannot be loaded"),
    "a file": (lambda f: ["layerwise", file(f, "x.txt", "hello")], "not a model folder"),
    "no config": (lambda f: ["layerwise", without(f, "config.json")], "no config.json"),
    "broken config": (lambda f: ["layerwise", (lambda d: (cut(Path(d) / "config.json"), d)[1])(model(f))], "cannot be loaded"),
    "no weights": (lambda f: ["layerwise", without(f, "model.safetensors")], "no .safetensors weights"),
    "pickled weights": (lambda f: ["layerwise", pickled(f)], "convert them to safetensors"),
    "truncated weights": (lambda f: ["layerwise", cut_weights(f)], "truncated"),
    "no tokenizer": (lambda f: ["layerwise", without(f, "tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "missing weight": (lambda f: ["layerwise", edit_weights(f, lambda w: w.__delitem__("model.layers.3.mlp.up_proj.weight"))], "model.layers.3.mlp.up_proj.weight"),  # type: ignore[func-returns-value]
    "NaN weight": (lambda f: ["layerwise", edit_weights(f, lambda w: w["model.layers.2.mlp.up_proj.weight"].view(-1)[5:6].fill_(float("nan")) and None)], "model.layers.2.mlp.up_proj.weight holds NaN"),  # type: ignore[func-returns-value]
    "infinite weight": (lambda f: ["drop", edit_weights(f, lambda w: w["model.norm.weight"][:1].fill_(float("inf")) and None)], "model.norm.weight holds NaN or infinite"),  # type: ignore[func-returns-value]
    "unknown architecture": (lambda f: ["layerwise", edit_config(f, model_type="hyena9")], "hyena9"),
    "post-norm architecture": (lambda f: ["layerwise", post_norm_opt(f)], "not supported"),
    "not a causal model": (lambda f: ["layerwise", encoder(f)], "no causal language model"),
    "no network": (lambda f: ["layerwise", "nobody/nothing"], "check the id and the network"),
    "no data set": (lambda f: ["drop", model(f), "--n", "1", "--calibration", "nobody/nothing"], "check the id and the network"),
    "wrong vocabulary": (lambda f: ["layerwise", model(f), other_vocabulary(f)], "compare models with the same vocabulary"),
    "newer checkpoint": (lambda f: ["layerwise", newer_recipe(f)], "upgrade prunescope"),
    "bad drop lists": (lambda f: ["layerwise", edit_config(f, drop_attn_list="all")], "drop_attn_list"),
    "no prompts file": (lambda f: ["layerwise", model(f), "--prompts", str(f / "none.jsonl")], "cannot be read"),
    "empty prompts file": (lambda f: ["layerwise", model(f), "--prompts", file(f, "p.jsonl", "\n\n")], "holds no prompt"),
    "bad prompt line": (lambda f: ["layerwise", model(f), "--prompts", file(f, "p.jsonl", '{"prompt": "w5"}\n{"text": 1}\n')], "line 2"),
    "prompts not JSON": (lambda f: ["layerwise", model(f), "--prompts", file(f, "p.jsonl", "w5 w6")], "line 1"),
    "prompt too long": (lambda f: ["layerwise", model(f), "--prompts", file(f, "p.txt", "w5 " * 70), "--max-new-tokens", "4"], "past the model's context of 64"),
    "no steps": (lambda f: ["layerwise", model(f), "--max-new-tokens", "0"], "at least one step"),
    "no batch": (lambda f: ["layerwise", model(f), "--batch-size", "0"], "at least 1"),
    "cold metrics": (lambda f: ["layerwise", model(f), "--prompts", file(f, "p.txt", "w5"), "--metric-temperature", "0"], "must be positive"),
    "negative seed": (lambda f: ["layerwise", model(f), "--seed", "-1"], "--seed -1"),
    "too little memory": (lambda f: ["layerwise", model(f), "--prompts", file(f, "p.txt", "w5"), "--max-new-tokens", "2", "--memory-mb", "1"], "needs at least"),
    "broken record": (lambda f: ["layerwise", (lambda d: (file(Path(d), "prunescope.json", '{"schema_version": 1}'), d)[1])(model(f))], "not a prunescope record"),
    "cold sampling": (lambda f: ["layerwise", model(f), "--temperature", "-1"], "cannot be negative"),
    "short text": (lambda f: ["drop", model(f), "--n", "1", "--calibration", file(f, "c.txt", "w5 w6")], "shorter than one sample"),
    "half a block": (lambda f: ["drop", model(f), "--n", "1", "--samples", "2", "--seq-len", "8", "--format", "compact"], "whole blocks"),
    "no network to prune": (lambda f: sparse(f, dense="nobody/nothing"), "check the id and the network"),
    "not a gguf to prune": (lambda f: sparse(f, dense=file(f, "x.gguf", "GGUF? no")), "cannot be loaded"),
    "nothing asked": (lambda f: ["sparsify", model(f)], "--sparsity 0.5, or --pattern 2:4"),
    "all weights": (lambda f: sparse(f, "--sparsity", "1"), "from 0 up to, not including, 1"),
    "negative sparsity": (lambda f: sparse(f, "--sparsity=-0.1"), "from 0 up to, not including, 1"),
    "hardly any sparsity": (lambda f: sparse(f, "--sparsity", "0.0001"), "nothing would be pruned"),
    "N:M that does not divide": (lambda f: sparse(f, "--pattern", "2:5"), "model.layers.0.self_attn.q_proj.weight has 32 inputs, which 5 does not divide"),
    "unknown pattern": (lambda f: sparse(f, "--pattern", "2x4"), "N:M such as 2:4"),
    "N is M": (lambda f: sparse(f, "--pattern", "4:4"), "0 < N < M"),
    "sparsity against pattern": (lambda f: sparse(f, "--pattern", "1:4", "--sparsity", "0.5"), "removes 0.75"),
    "no sparsity map": (lambda f: sparse(f, "--sparsity", "0.5", "--sparsity-map", str(f / "none.yaml")), "cannot be read"),
    "sparsity map matches nothing": (lambda f: sparse(f, "--sparsity", "0.5", "--sparsity-map", file(f, "m.yaml", "'*.experts.*': 0.5")), "'*.experts.*' matches no matrix"),
    "per cent in a sparsity map": (lambda f: sparse(f, "--sparsity", "0.5", "--sparsity-map", file(f, "m.yaml", "'*.up_proj': 70")), "sparsity 70"),
    "sparsity map of a list": (lambda f: sparse(f, "--sparsity", "0.5", "--sparsity-map", file(f, "m.yaml", "- 1")), "pattern: share"),
    "variant of another method": (lambda f: sparse(f, "--sparsity", "0.5", "--variant"), "one of wanda"),
    "wanda without text": (lambda f: ["sparsify", model(f), "--method", "wanda", "--sparsity", "0.5", "--calibration", "none"], "the others need a text"),
    "structured by pattern": (lambda f: sparse(f, "--method", "structured", "--pattern", "2:4"), "config.json holds one size"),
    "structured by block": (lambda f: sparse(f, "--method", "structured", "--sparsity", "0.5", "--allocation", "owl"), "config.json holds one size"),
    "no neuron to remove": (lambda f: sparse(f, "--method", "structured", "--sparsity", "0.01"), "would remove no neuron of 48"),
    "owl by pattern": (lambda f: sparse(f, "--pattern", "2:4", "--allocation", "owl"), "does not go with --pattern"),
    "owl too wide": (lambda f: sparse(f, "--sparsity", "0.05", "--allocation", "owl", "--owl-spread", "0.5"), "choose a smaller --owl-spread"),
    "short calibration text": (lambda f: sparse(f, "--sparsity", "0.5", words=9), "shorter than one sample of 16"),
    "no perplexity text": (lambda f: sparse(f, "--sparsity", "0.5", "--perplexity", str(f / "none.txt")), "no such file"),
    "empty perplexity text": (lambda f: sparse(f, "--sparsity", "0.5", "--perplexity", file(f, "e.txt", "")), "at least two"),
    "a shard is missing": (lambda f: sparse(f, dense=sharded(f, lambda p: p.unlink())), "model-00002-of-"),
    "a shard is truncated": (lambda f: sparse(f, dense=sharded(f, cut)), "it is truncated"),
    "a shard is empty": (lambda f: sparse(f, dense=sharded(f, lambda p: p.write_bytes(b""))), "cannot be read"),
    "NaN in a block": (lambda f: sparse(f, dense=edit_weights(f, lambda w: w["model.layers.2.mlp.up_proj.weight"].view(-1)[5:6].fill_(float("nan")) and None)), "model.layers.2.mlp.up_proj.weight holds NaN"),  # type: ignore[func-returns-value]
    "quantised weights": (lambda f: sparse(f, dense=edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4})), "quantised"),
    "config is a list": (lambda f: sparse(f, dense=(lambda d: (file(Path(d), "config.json", "[]"), d)[1])(model(f))), "config.json cannot be read"),
    "a recipe to prune": (lambda f: sparse(f, dense=recipe(f)), "no weights of its own"),
    "drop lists to prune": (lambda f: sparse(f, dense=edit_config(f, drop_attn_list=[1])), "drops sublayers"),
    "too narrow dtype": (lambda f: sparse(f, "--sparsity", "0.5", "--dtype", "bfloat16"), "--dtype float32"),
    "no damping": (lambda f: sparse(f, "--sparsity", "0.5", "--damping", "0"), "must be positive"),
    "one-token samples": (lambda f: sparse(f, "--sparsity", "0.5", "--seq-len", "1"), "at least two tokens"),
    "windows of nothing": (lambda f: sparse(f, "--sparsity", "0.5", "--perplexity-windows", "3"), "--perplexity FILE"),
    "generate without a target": (lambda f: ["generate", model(f)], "target"),
    "generate against nothing": (lambda f: ["generate", model(f), "drop:"], "drops nothing"),
    "generate with another vocabulary": (lambda f: ["generate", model(f), other_vocabulary(f)], "same vocabulary"),
    "generate with another tokenizer": (lambda f: ["generate", model(f), other_tokenizer(f)], "the tokenizers of"),
    "generate past the context": (lambda f: ["generate", model(f), "drop:attn=1", "--prompts", file(f, "p.txt", "w5 " * 60), "--max-new-tokens", "9"], "past the model's context of 64"),
    "unknown regime": (lambda f: ["generate", model(f), "drop:attn=1", "--regime", "forced"], "teacher-forced"),
    "generate without a chat template": (lambda f: ["generate", model(f), "drop:attn=1", "--chat"], "no chat template"),
    "cold sampling of both": (lambda f: ["generate", model(f), "drop:attn=1", "--temperature", "-1"], "cannot be negative"),
    "top-p of nothing": (lambda f: ["generate", model(f), "drop:attn=1", "--top-p", "0"], "--top-p"),
    "cold metrics of both": (lambda f: ["generate", model(f), "drop:attn=1", "--metric-temperature", "0"], "must be positive"),
    "no questions file": (lambda f: ["mcq", model(f), "drop:attn=1", "--questions", str(f / "none.jsonl")], "cannot be read"),
    "empty questions file": (lambda f: ["mcq", model(f), "drop:attn=1", "--questions", file(f, "q.jsonl", "\n")], "holds no question"),
    "no answer to a question": (lambda f: ["mcq", model(f), "drop:attn=1", "--questions", file(f, "q.jsonl", '{"question": "w5", "choices": ["w6", "w7"]}')], "no 'answer'"),
    "answer out of range": (lambda f: ["mcq", model(f), "drop:attn=1", "--questions", file(f, "q.jsonl", '{"question": "w5", "choices": ["w6", "w7"], "answer": 2}')], "out of range"),
    "duplicate options": (lambda f: ["mcq", model(f), "drop:attn=1", "--questions", file(f, "q.jsonl", '{"question": "w5", "choices": ["w6", "w6"], "answer": 0}')], "stands there twice"),
    "options of the same tokens": (lambda f: ["mcq", model(f), "drop:attn=1", "--questions", file(f, "q.jsonl", '{"question": "w5", "choices": ["w6", "w7"], "answer": 0}')], "are the same tokens"),
    "question past the context": (lambda f: ["mcq", model(f), "drop:attn=1", "--questions", file(f, "q.jsonl", '{"question": "' + "w5 " * 70 + '", "choices": ["w6", "w7"], "answer": 0}')], "past the context"),
    "shots without a folder": (lambda f: ["mcq", model(f), "drop:attn=1", "--shots", "2"], "needs a folder of MMLU CSV files"),
    "shots with the paper's template": (lambda f: ["mcq", model(f), "drop:attn=1", "--template", "paper", "--shots", "1"], "go with --template cue"),
    "no questions at all": (lambda f: ["mcq", model(f), "drop:attn=1", "--limit", "0"], "at least one question"),
    "no MMLU in the folder": (lambda f: ["mcq", model(f), "drop:attn=1", "--questions", str(f)], "no test/*_test.csv"),
    "mcq with another tokenizer": (lambda f: ["mcq", model(f), other_tokenizer(f)], "the tokenizers of"),
    "mcq against nothing": (lambda f: ["mcq", model(f), "drop: "], "drops nothing"),
    "bad config file": (lambda f: ["layerwise", "--config", str(f / "none.yaml")], "none.yaml"),
    "unknown key in config file": (lambda f: ["drop", model(f), "--config", file(f, "c.yaml", "sparsity: 0.5\n")], "sparsity"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    mistake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare, message = MISTAKES[mistake]
    argv = prepare(tmp_path)
    capfd.readouterr()
    gc.collect()  # results that held a temporary folder
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    assert main([*argv, "--out", str(out)] if argv and argv[0] in COMMANDS else argv) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("prunescope: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_sparsify_wants_a_place_that_is_not_the_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dense = model(tmp_path)
    assert main(["sparsify", dense, "--sparsity", "0.5"]) == 2
    assert main(["sparsify", dense, "--sparsity", "0.5", "--out", dense, "--overwrite"]) == 2
    said = capfd.readouterr().err
    assert "with --out DIR" in said and "is the model itself" in said


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for extra, message in (
        ([], "--overwrite"),
        (["--overwrite"], "not written by prunescope"),
        (["--resume"], "--overwrite"),
    ):
        assert main(["layerwise", model(tmp_path), "--out", str(tmp_path / "run"), *extra]) == 2
        assert message in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_no_space_on_the_disk(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before, and found while writing (a real file-size limit in a process of its own)."""
    dense = model(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000})())
        assert main(["layerwise", dense, "--out", str(tmp_path / "run")]) == 2
        assert (
            main(["drop", dense, "--n", "1", "--samples", "2", "--seq-len", "8", "--out", str(tmp_path / "run")]) == 2
        )
    assert "are free on this disk" in capfd.readouterr().err
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from prunescope.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = [
        "drop",
        dense,
        "--n",
        "1",
        "--samples",
        "2",
        "--seq-len",
        "8",
        "--format",
        "zeroed",
        "--out",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    pruning = [*sparse(tmp_path, dense=dense), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", limited, *pruning], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "free some" in done.stderr
    (tmp_path / "words.txt").unlink()
    done = subprocess.run([sys.executable, "-c", limited, *argv], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "free some" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_bug_of_ours_is_exit_1_with_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(COMMANDS, "demo", lambda out="x": broken())
    assert main(["demo"]) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err
    monkeypatch.setitem(COMMANDS, "demo", lambda out="x": (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["demo"]) == 1
    assert "interrupted; nothing was written" in capfd.readouterr().err


def test_a_complete_run_is_resumed_without_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [
        "layerwise",
        model(tmp_path),
        "--prompts",
        file(tmp_path, "p.txt", "w5 w6"),
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(argv) == 0
    stamp = (tmp_path / "run" / "run.json").stat().st_mtime_ns
    assert main([*argv, "--resume"]) == 0
    assert main([*argv, "--resume", "--lens", "final-norm"]) == 2
    file(tmp_path, "p.txt", "w9 w6")
    assert main([*argv, "--resume"]) == 2
    assert capfd.readouterr().err.count("made with other models, prompts or options") == 2
    assert (tmp_path / "run" / "run.json").stat().st_mtime_ns == stamp


def test_load_gives_an_ordinary_model_that_generates(tmp_path: Path) -> None:
    loaded = prunescope.load(model(tmp_path), drop="attn=0,2;mlp=1", device="cpu")
    ids = loaded.tokenizer("w5 w6 w7", return_tensors="pt")
    text = loaded.model.generate(**ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 7)
    assert repr(loaded).endswith("without attn=0,2;mlp=1>")
    assert len(repr(loaded)) < 500
    loaded.restore()
    with torch.no_grad():
        plain = tiny_model("llama")(**ids).logits
        assert torch.equal(loaded.model(**ids).logits, plain)
    loaded.drop("attn=1")
    with pytest.raises(prunescope.UserError, match="restore it first"):
        loaded.drop("attn=2")


def test_the_demo_on_a_tiny_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole path of the demo; `make demo` runs it on the bundled model."""
    module = sys.modules["prunescope.demo"]  # the name in the package is the function

    folder = tiny_folder("llama", tmp_path / "dense")
    patched = pytest.MonkeyPatch()
    patched.setattr(module, "_DROPPED", 2)
    patched.setattr(module, "_SHOWN_PROMPTS", ("mc-1",))
    found = module.run_demo(
        str(tmp_path / "demo"), model=str(folder), calibration=(4, 12), max_new_tokens=3, questions=False
    )
    patched.undo()
    assert len(found.sentences) == 3
    assert max(map(len, module._NEXT.splitlines())) <= 80  # a command that is broken over two lines cannot be copied
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "config.yaml",
        "demo.json",
        "drop-attn",
        "drop-mlp",
        "generate-attn",
        "generate-mlp",
        "layerwise",
        "layerwise-final-norm",
        "report.html",
        "summary.md",
    ]
    assert prunescope.open(tmp_path / "demo" / "layerwise").table().equals(found.table())
    assert found.summary == found.layerwise.summary
    page = (tmp_path / "demo" / "summary.md").read_text()
    assert all(sentence in page for sentence in found.sentences)
    for kind in ("attn", "mlp"):
        spec = found.drops[kind].spec
        assert len(spec.layers(kind)) == 2  # type: ignore[arg-type]
        assert prunescope.load(str(tmp_path / "demo" / f"drop-{kind}"), device="cpu").dropped == spec
    mean = prunescope.open(tmp_path / "demo" / "layerwise").info["summary_by_sublayer"]["attn"]["p"]["p_cos"]["mean"]
    assert f"{mean:.3f} in p" in found.sentences[1]
    told = json.loads((tmp_path / "demo" / "demo.json").read_text("utf-8"))
    written = {row["id"]: row for row in prunescope.open(tmp_path / "demo" / "generate-mlp").samples()}["mc-1"]
    assert [row["without 2 mlp"] for row in told["texts"]] == [
        prunescope.load(str(folder), device="cpu").tokenizer.decode(written["target_tokens"], skip_special_tokens=True)
    ]
    assert set(told["texts"][0]) == {"prompt", "dense", "without 2 attn", "without 2 mlp"}
    stages = {row["stage"]: row["seconds"] for row in told["stages"]}
    assert len(stages) == 8 and min(stages.values()) >= 0 < stages["every sublayer in turn"] < 600
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "--overwrite" in capfd.readouterr().err
