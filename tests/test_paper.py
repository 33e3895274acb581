"""The paper's command lines as real scripts on tiny models: folders found, flags refused, lines that say what the run says."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch

import prunescope
from families import tiny_folder
from prunescope.compare.metrics import compare_hidden
from prunescope.paper import against_target, checkpoint_folder, generation_lines, transition_lines
from test_mcq import letters_folder

PAPER = Path(__file__).resolve().parents[1] / "paper"
SCRIPTS = sorted(PAPER.rglob("*.py"))


def script(name: str, *flags: object, code: int | None = None) -> None:
    """Run a script of `paper/` in this process; ``code`` is the exit code it must end with, None for a plain end."""
    before, ended = sys.argv, None
    sys.argv = [name, *map(str, flags)]
    try:
        runpy.run_path(str(PAPER / name), run_name="__main__")
    except SystemExit as error:
        ended = error.code
    finally:
        sys.argv = before
    assert ended == code


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{4 + i % 50}" for i in range(300)))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("w5 w9 w17\nw8 w11\n")
    return path


def drop_into(root: Path, dense: Path, words: Path, target_layer: str = "attn", n: int = 2, **flags: object) -> None:
    method = "block_drop" if target_layer == "all" else "layer_drop"
    more = [item for key, value in flags.items() for item in (f"--{key}", value)]
    script(
        "inter-layer/compress.py", "--stage", "prune", "--model_name_or_path", dense, "--prune_method", method, "--target_layer", target_layer,
        "--drop_n", n, "--dropped_root_path", root, "--dataset", words, "--n_calibration_samples", 4, "--cutoff_len", 16, *more,
    )  # fmt: skip


def analysis(name: str, *flags: object, code: int | None = None) -> None:
    script(f"representation-analysis/{name}.py", *flags, code=code)


def log_values(text: str, label: str) -> dict[str, list[float]]:
    """Line name -> values, of the lines of one label."""
    found: dict[str, list[float]] = {}
    for layer, name, value in re.findall(rf"^(\d+) {re.escape(label)} ([^:]+): +(\S+)$", text, re.MULTILINE):
        found.setdefault(f"{layer} {name}", []).append(float(value))
    return found


# --- the chain ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_layer", ["attn", "mlp", "all"])
def test_the_chain_of_the_readme_drops_something(
    target_layer: str, tmp_path: Path, dense_folder: Path, words: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compress.py, then transition_layerwise_compare.py in dropped mode: would catch a folder that is not found and a drop of nothing."""
    monkeypatch.chdir(tmp_path)
    drop_into(tmp_path / "drops", dense_folder, words, target_layer)
    common = ["--analysis_mode", "dropped", "--model_name", dense_folder, "--dropped_root_path", "drops", "--target_layer", target_layer, "--drop_n", 2, "--max_length", 5, "--prompts", prompts]  # fmt: skip
    analysis("transition_layerwise_compare", *common)
    log = (tmp_path / "cosine_logs" / "layerwise_dropped" / "temp0.5" / "log-cosine.txt").read_text()
    run = prunescope.open(tmp_path / "cosine_logs" / "layerwise_dropped" / "temp0.5" / "run")
    config = json.loads((checkpoint_folder("drops", "dense", target_layer, 2) / "config.json").read_text())
    lists = {kind: config[f"drop_{kind}_list"] for kind in ("attn", "mlp")}
    assert [len(lists[kind] or []) for kind in ("attn", "mlp")] == {"attn": [2, 0], "mlp": [0, 2], "all": [2, 2]}[
        target_layer
    ]
    assert f"drop_attn_list: {lists['attn'] or []}" in log
    assert run.info["config"]["metric_temperature"] == 0.5 == run.info["config"]["temperature"]
    for kind, layers in lists.items():
        for layer in layers or []:
            rows = run.table().filter(
                pc.and_(pc.equal(run.table()["layer"], layer), pc.equal(run.table()["sublayer"], kind))
            )
            first = rows.filter(pc.equal(rows["step"], 0)).to_pylist()
            values = log_values(log, f"dropped_{kind}_step0")
            assert values[f"{layer} emb sim"] == [round(row["h_cos"], 4) for row in first]
            assert values[f"{layer} REAL_KL"] == [pytest.approx(row["kl_dense_target"], abs=6e-7) for row in first]
            assert values[f"{layer} KL_estimate"] == [pytest.approx(row["kl_est"], abs=6e-7) for row in first]
            assert all(value < 1 for value in values[f"{layer} emb sim"]), "something was dropped"
    kept = {re.split(r" (?:dropped_)?", line)[0] for line in log.splitlines() if "emb sim" in line}
    assert kept == {str(layer) for layers in lists.values() for layer in layers or []}, "only what is dropped is logged"


def test_generation_and_options_of_a_dropped_model(
    tmp_path: Path, words: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other two scripts: log lines equal the run folders beside them."""
    monkeypatch.chdir(tmp_path)
    folder = letters_folder(tmp_path / "tiny", whole_words=True)
    drop_into(tmp_path / "drops", folder, words, model_tag="Org/tiny")
    common = ["--model_name", folder, "--dropped_root_path", "drops", "--model_tag", "Org/tiny", "--drop_n", 2, "--max_length", 6, "--temperature", 0]  # fmt: skip
    analysis("compare_generation_metrics", *common, "--prompts", prompts, "--prompt_idx", 1)
    place = tmp_path / "cosine_logs" / "attn" / "temp0.0"
    log = (place / "log_dropped_drop2-final.txt").read_text()
    run = prunescope.open(place / "run_dropped_drop2-final")
    free = run.table().filter(pc.equal(run.table()["regime"], "free-running"))
    flat = json.loads(re.search(r"kl_divergence_flat: (.*)", log)[1])  # type: ignore[index]
    assert flat == pytest.approx(free["kl_dense_target"].to_pylist())
    assert flat[0] > 0
    assert json.loads(re.search(r"top5_l1: (.*)", log)[1]) == pytest.approx(
        [5 * x for x in free["dz_top5_l1"].to_pylist()]
    )  # type: ignore[index]
    assert "w8 w11" in log and "w5 w9" not in log
    assert "analysis_temperature: 1.0" in log
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "w1 w2", "choices": ["w3", "w4", "w5"], "answer": 1}\n')
    analysis("compare_mcq_subspace_metrics", *common, "--questions", questions)
    place = tmp_path / "cosine_logs" / "attn_dropped_temp0.0"
    log = (place / "log_drop2-default-subspace.txt").read_text()
    whole, options = prunescope.open(place / "run_drop2-default-subspace").table().to_pylist()
    assert f"Global KL: [{whole['kl_dense_target']}]" in log
    assert f"Subspace KL: [{options['kl_dense_target']}]" in log
    assert "SUBSPACE (a/b/c)" in log
    assert len(re.findall(r"\| orig=", log)) == 30 + 3


def test_a_pruned_model_sees_its_history(
    tmp_path: Path, dense_folder: Path, words: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Target equal to the dense model: 1.0 at every step. The paper's code loses the target's keys and values behind step 0."""
    monkeypatch.chdir(tmp_path)
    common = [
        "--analysis_mode",
        "pruned",
        "--model_name",
        dense_folder,
        "--max_length",
        6,
        "--prompts",
        prompts,
        "--temperature",
        1,
    ]
    analysis("transition_layerwise_compare", *common, "--pruned_model_name", dense_folder, "--log_dir", "same")
    log = (tmp_path / "same" / "layerwise_pruned" / "temp1.0" / "log-cosine.txt").read_text()
    for name in ("emb sim", "head sim", "vocab sim"):
        values = re.findall(rf"^\d+ (?:attn|mlp)_step(\d+) {name}: +(\S+)$", log, re.MULTILINE)
        assert {value for _, value in values} == {"1.0000"}
        assert {int(step) for step, _ in values} == set(range(6))
        assert len(values) >= 6 * 12
    script("intra-layer/main.py", "--model", dense_folder, "--prune_method", "wanda", "--sparsity_ratio", 0.5, "--sparsity_type", "2:4", "--save", "out",
           "--save_model", "pruned", "--nsamples", 4, "--seqlen", 16, "--calibration", words)  # fmt: skip
    assert (tmp_path / "out" / "log_wanda.txt").read_text() == "method\tactual_sparsity\tppl_test\nwanda\t0.5000\t-\n"
    analysis("transition_layerwise_compare", *common, "--pruned_model_name", "pruned")
    place = tmp_path / "cosine_logs" / "layerwise_pruned" / "temp1.0"
    log = (place / "log-cosine.txt").read_text()
    rows = prunescope.open(place / "run").table().to_pylist()
    row = next(row for row in rows if (row["layer"], row["sublayer"], row["step"]) == (3, "mlp", 2))
    values = log_values(log, "mlp_step2")
    assert values["3 REAL_KL"][0] == pytest.approx(row["kl_target_dense"], abs=6e-7)
    assert values["3 1-cos_estimate"][0] == pytest.approx(row["p_cos_dev_est_target"], abs=6e-7)
    assert values["3 H_orth_rel"][0] == pytest.approx(row["h_orth_rel"], abs=6e-7)
    analysis("compare_generation_metrics", *common, "--pruned_model_name", "pruned")
    assert (tmp_path / "cosine_logs" / "attn" / "temp1.0" / "log_pruned_drop8-final.txt").is_file()


def test_a_script_runs_on_its_own_from_any_folder(tmp_path: Path, dense_folder: Path, prompts: Path) -> None:
    command = [sys.executable, PAPER / "representation-analysis" / "transition_layerwise_compare.py", "--model_name", dense_folder, "--max_length", "2", "--prompts", prompts]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert done.returncode == 0, done.stderr
    assert "5 dropped_mlp_step1 vocab sim:" in done.stdout, "drop_n 0: every sublayer in turn"
    assert (tmp_path / "cosine_logs" / "layerwise_dropped" / "temp0.5" / "run" / "run.json").is_file()


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_what_is_refused(
    tmp_path: Path, dense_folder: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2: lists that disagree with --drop_n would otherwise be compared as something else."""
    monkeypatch.chdir(tmp_path)
    drop_into(tmp_path / "drops", dense_folder, words)
    folder = checkpoint_folder("drops", "dense", "attn", 2)
    folder.parent.rename(folder.parent.with_name("dense-layer_drop_attn-discrete-drop3"))
    layers, generation = "transition_layerwise_compare", "compare_generation_metrics"
    base = ["--model_name", dense_folder, "--dropped_root_path", "drops"]
    for name, flags, message in (
        (layers, [*base, "--drop_n", 3], "drops 2 attn sublayers"),
        (layers, [*base, "--drop_n", 4], "make it with paper/inter-layer/compress.py"),
        (layers, [*base, "--drop_n", 3, "--target_layer", "mlp"], "dense-layer_drop_mlp-discrete-drop3"),
        (layers, ["--model_name", dense_folder, "--drop_n", 3], "--dropped_root_path"),
        (layers, ["--model_name", dense_folder, "--analysis_mode", "pruned"], "--pruned_model_name"),
        (layers, [*base, "--prompt_idx", 1], "prompts 0 to 0"),
        (layers, [], "--model_name"),
        (generation, [*base, "--drop_n", 0], "nothing is dropped"),
    ):
        capsys.readouterr()
        analysis(name, *flags, code=2)
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len([line for line in lines if line.startswith("prunescope: ")]) == 1
        assert message in lines[-1]
    pruning = ["--model", dense_folder, "--save_model", "p", "--calibration", words]
    for flags, message in (
        ([*pruning, "--prune_method", "wanda", "--sparsity_type", "2:4", "--sparsity_ratio", 0.6], "give 0.5"),
        (
            [*pruning, "--prune_method", "wanda", "--sparsity_type", "structured", "--sparsity_ratio", 0.5],
            "does not go with",
        ),
        (
            [*pruning, "--prune_method", "magnitude", "--sparsity_type", "unstructured", "--eval_zero_shot"],
            "lm-evaluation-harness",
        ),
        (["--model", dense_folder, "--prune_method", "magnitude", "--sparsity_type", "unstructured"], "--save_model"),
    ):
        script("intra-layer/main.py", *flags, code=2)
        assert message in capsys.readouterr().err
    script("inter-layer/compress.py", "--model_name_or_path", dense_folder, "--drop_n", 2, "--dataset", words, code=2)
    assert "no place for the checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "cosine_logs").exists() and not (tmp_path / "p").exists()


def test_published_lists_of_booleans_and_nulls_are_read(tmp_path: Path) -> None:
    from prunescope.paper import read_drop_lists

    folder = checkpoint_folder(tmp_path, "m", "attn", 2)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"drop_attn_list": [false, true, true], "drop_mlp_list": null}')
    args = Namespace(
        model_name="org/m",
        model_tag=None,
        model_postfix=None,
        dropped_root_path=tmp_path,
        target_layer="attn",
        drop_n=2,
    )
    assert read_drop_lists(args) == {"attn": [1, 2], "mlp": []}


def test_pruning_methods_of_the_flags(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dense = tiny_folder("llama", tmp_path / "dense")
    for method, kind in (("magnitude", "unstructured"), ("neuron_partition", "structured")):
        script("intra-layer/main.py", "--model", dense, "--prune_method", method, "--sparsity_ratio", 0.5, "--sparsity_type", kind, "--save", method,
               "--save_model", f"{method}/model", "--nsamples", 4, "--seqlen", 16, "--calibration", words, "--perplexity", words)  # fmt: skip
        name, sparsity, perplexity = (tmp_path / method / f"log_{method}.txt").read_text().splitlines()[1].split("\t")
        assert (name, sparsity) == (method, "0.5000")
        assert float(perplexity) > 1
    assert json.loads((tmp_path / "neuron_partition" / "model" / "config.json").read_text())["intermediate_size"] == 24


# --- lines -------------------------------------------------------------------------------------------------------------


def test_the_base_changes_as_computed_directly() -> None:
    """alpha, parallel and orthogonal part of the way back relative to the target, from those relative to the dense vector."""
    x, y = (torch.randn(5, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    ours, back = compare_hidden(x, y), compare_hidden(y, x)
    for i in range(5):
        alpha, orth = against_target(ours["h_alpha"][i].item(), ours["h_orth_rel"][i].item())
        assert alpha == pytest.approx(back["h_alpha"][i].item(), rel=1e-9)
        assert orth == pytest.approx(back["h_orth_rel"][i].item(), rel=1e-9)


def test_a_change_along_the_vector_has_no_ratio() -> None:
    row: dict[str, Any] = dict.fromkeys(["h_cos", "z_cos", "p_cos"], 1.0) | {"layer": 3}
    row |= dict.fromkeys(
        [
            "kl_dense_target",
            "kl_est",
            "kl_target_dense",
            "kl_est_target",
            "p_cos_dev",
            "p_cos_dev_est",
            "p_cos_dev_est_target",
        ],
        0.0,
    )
    row |= dict.fromkeys(["var_uniform", "z_cos_dev", "h_cos_dev", "z_alpha", "z_orth_rel", "h_orth_rel"], 0.0) | {
        "h_alpha": 0.5
    }
    lines = "\n".join(transition_lines(row, "attn_step0", dropped=False))
    assert "3 attn_step0 H_ratio_of_means:    inf" in lines
    assert "3 attn_step0 Z_ratio_of_means:    nan" in lines
    assert len(lines.splitlines()) == 8 + 2 * 7


def test_generation_lines_are_scaled_as_in_the_papers_code(dense_folder: Path, prompts: Path) -> None:
    found = prunescope.generate(
        str(dense_folder), "drop:attn=2", prompts=str(prompts), max_new_tokens=4, device="cpu", metric_temperature=0.5
    )
    lines = generation_lines(found.table(), 0, "dropped", 0.5)
    values = dict(line.split(": ", 1) for line in lines if ": " in line)
    rows = [row for row in found.table().to_pylist() if row["prompt"] == 0 and row["regime"] == "free-running"]
    assert json.loads(values["uniform_var"]) == pytest.approx([row["var_uniform"] / 0.5 for row in rows])
    assert json.loads(values["kl_estimates"]) == pytest.approx([row["var_p"] / 0.5 for row in rows])
    mean = sum(5 * row["dz_top5_l1"] for row in rows) / len(rows)
    assert float(values["summary_top5_l1_mean"]) == pytest.approx(mean, abs=1e-6)
    assert not any(math.isnan(x) for x in json.loads(values["prob_cos_sim_flat"]))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
