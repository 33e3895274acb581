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

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from test_mcq import letters_folder

import prunescope
from families import tiny_folder, tiny_model
from prunescope.compare.metrics import COLUMNS, compare_hidden
from prunescope.errors import UserError
from prunescope.paper.folders import checkpoint_folder
from prunescope.paper.log_lines import against_target, generation_lines, option_lines, transition_lines

PAPER = Path(__file__).resolve().parents[2] / "paper"
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


def refused(name: str, *flags: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a script ends with, exit code 2."""
    capsys.readouterr()
    script(name, *flags, code=2)
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len([line for line in said if line.startswith("prunescope: ")]) == 1
    assert said[-1].startswith("prunescope: ") and "Traceback" not in "".join(said)
    return said[-1]


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
    assert re.findall(r"=== Prompt .*\n.*", log) == ["=== Prompt 2 ===\nw8 w11"], "its number in the file"
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
    layers, generation, options = "transition_layerwise_compare", "compare_generation_metrics", "compare_mcq_subspace_metrics"  # fmt: skip
    base = ["--model_name", dense_folder, "--dropped_root_path", "drops"]
    for name, flags, message in (
        (layers, [*base, "--drop_n", 3], "drops 2 attn sublayers"),
        (layers, [*base, "--drop_n", 4], "make it with paper/inter-layer/compress.py"),
        (layers, [*base, "--drop_n", 3, "--target_layer", "mlp"], "dense-layer_drop_mlp-discrete-drop3"),
        (layers, ["--model_name", dense_folder, "--drop_n", 3], "--dropped_root_path"),
        (layers, ["--model_name", dense_folder, "--analysis_mode", "pruned"], "--pruned_model_name"),
        (layers, [*base, "--prompt_idx", 1], "prompts 0 to 0"),
        (layers, [], "--model_name"),
        (layers, [*base, "--dropn", 1], "unrecognized arguments: --dropn"),
        (layers, [*base, "--drop_n", "many"], "invalid int value"),
        (generation, [*base, "--drop_n", 0], "nothing is dropped"),
        (options, [*base, "--drop_n", 0], "nothing is dropped"),
        (options, [*base, "--drop_n", 3, "--prompts", words], "unrecognized arguments: --prompts"),
        (options, ["--model_name", dense_folder, "--analysis_mode", "pruned"], "--pruned_model_name"),
    ):
        assert message in refused(f"representation-analysis/{name}.py", *flags, capsys=capsys)
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
        assert message in refused("intra-layer/main.py", *flags, capsys=capsys)
    dropping = ["--model_name_or_path", dense_folder, "--drop_n", 2, "--dataset", words]
    for flags, message in (
        (dropping, "no place for the checkpoint"),
        ([*dropping, "--output_dir", "o", "--layer_drop_method", "post_dropping"], "--only_update_config False"),
        ([*dropping, "--output_dir", "o", "--layer_drop_norm", "maybe"], "give True or False"),
        ([*dropping, "--output_dir", "o", "--layer_drop_method", "consecutive"], "whole blocks"),
    ):
        assert message in refused("inter-layer/compress.py", *flags, capsys=capsys)
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "cosine_logs").exists() and not (tmp_path / "p").exists()


def test_published_lists_of_booleans_and_nulls_are_read(tmp_path: Path) -> None:
    from prunescope.paper.folders import read_drop_lists

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


def written(folder: Path, attn: list[int]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"drop_attn_list": attn, "drop_mlp_list": []}))


def test_the_first_folder_that_exists_is_taken_and_never_one_outside_the_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tag, else postfix, name, last part of the name. An absolute model name, joined as a path, would lead out of the root."""
    from prunescope.paper.folders import read_drop_lists

    root, model = tmp_path / "drops", tmp_path / "models" / "m"
    flags: dict[str, Any] = {"model_name": str(model), "model_tag": None, "model_postfix": None}
    flags |= {"dropped_root_path": root, "target_layer": "attn", "drop_n": 1}
    written(checkpoint_folder(model.parent, "m", "attn", 1), [9])  # beside the model, not under the root
    with pytest.raises(UserError, match=re.escape(str(root))):
        read_drop_lists(Namespace(**flags))
    for layer, tag in enumerate(("m", str(model), "org/m")):  # the later, the more it counts
        written(checkpoint_folder(root, tag, "attn", 1), [layer])
        assert (checkpoint_folder(root, tag, "attn", 1)).is_relative_to(root)
        postfix = "org/m" if tag == "org/m" else None
        assert read_drop_lists(Namespace(**flags | {"model_postfix": postfix}))["attn"] == [layer]
    assert read_drop_lists(Namespace(**flags | {"model_postfix": "nobody/else"}))["attn"] == [1], "the name comes next"
    with pytest.raises(UserError, match="mine-layer_drop_attn"):
        read_drop_lists(Namespace(**flags | {"model_tag": "mine"}))  # a tag that is given is not guessed at


def test_every_way_to_drop_has_a_folder_of_its_own(
    tmp_path: Path, dense_folder: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Joint and consecutive drops must not take the place of the discrete blocks, which the analysis reads as what they say they are."""
    monkeypatch.chdir(tmp_path)
    drop_into(tmp_path / "d", dense_folder, words, "all")
    before = checkpoint_folder("d", "dense", "all", 2).joinpath("prunescope.json").read_text()
    drop_into(tmp_path / "d", dense_folder, words, "all", prune_method="layer_drop")
    drop_into(tmp_path / "d", dense_folder, words, "all", block_drop_method="consecutive")
    found = sorted(str(path.parent.parent.relative_to("d")) for path in Path("d").rglob("prunescope.json"))
    assert found == [
        "block_drop/dense-block_drop-all-consecutive-drop2",
        "block_drop/dense-block_drop-all-discrete-drop2",
        "dense-layer_drop_all-discrete-drop2",
    ]
    assert checkpoint_folder("d", "dense", "all", 2).joinpath("prunescope.json").read_text() == before
    capsys.readouterr()
    drop_into(tmp_path / "e", dense_folder, words, similarity_cache_file="none.pt", logging_steps=10)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ignored")]
    assert said == ["ignored, since they decide nothing here: --stage, --similarity_cache_file, --logging_steps"]


def test_zeroed_weights_are_analysed_like_lists(
    tmp_path: Path, dense_folder: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--only_update_config False writes no lists into config.json, for it loads as an ordinary model: they stand in prunescope.json."""
    from prunescope.paper.folders import read_drop_lists

    monkeypatch.chdir(tmp_path)
    flags: dict[str, Any] = {"model_name": "dense", "model_tag": None, "model_postfix": None, "target_layer": "attn"}
    lists = []
    for root, lists_only in (("lists", "True"), ("weights", "False")):
        drop_into(tmp_path / root, dense_folder, words, only_update_config=lists_only)
        lists.append(read_drop_lists(Namespace(**flags, dropped_root_path=root, drop_n=2)))
    assert lists[0] == lists[1]
    assert list(Path("weights").rglob("*.safetensors")) and not list(Path("lists").rglob("*.safetensors"))


LINES = (  # name, column (dropped mode, pruned mode), decimals
    *(
        (name, column, column, 4)
        for name, column in (("emb sim", "h_cos"), ("head sim", "z_cos"), ("vocab sim", "p_cos"))
    ),
    ("REAL_KL", "kl_dense_target", "kl_target_dense", 6),
    ("KL_estimate", "kl_est", "kl_est_target", 6),
    ("REAL(1-cos)", "p_cos_dev", "p_cos_dev", 6),
    ("1-cos_estimate", "p_cos_dev_est", "p_cos_dev_est_target", 6),
    ("Uniform_Var", "var_uniform", "var_uniform", 6),
    ("Z_real(1-cos)", "z_cos_dev", "z_cos_dev", 6),
    ("H_real(1-cos)", "h_cos_dev", "h_cos_dev", 6),
)


@pytest.mark.parametrize("mode", ["dropped", "pruned"])
def test_every_line_of_every_prompt_says_what_the_run_says(
    mode: str, tmp_path: Path, dense_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 22 lines at all places of two prompts. Would catch a block under the wrong prompt, a column of the other mode, a wrong base."""
    monkeypatch.chdir(tmp_path)
    flags: list[object] = ["--pruned_model_name", tiny_folder("llama", tmp_path / "other", seed=5)]
    if mode == "dropped":
        written(checkpoint_folder("d", "dense", "attn", 2), [4, 1])
        flags = ["--dropped_root_path", "d", "--drop_n", 2]
    analysis(
        "transition_layerwise_compare",
        "--analysis_mode",
        mode,
        "--model_name",
        dense_folder,
        "--max_length",
        3,
        "--prompts",
        prompts,
        *flags,
    )
    place = tmp_path / "cosine_logs" / f"layerwise_{mode}" / "temp0.5"
    run = prunescope.open(place / "run")
    assert run.info["config"]["prompts"] == str(prompts), "the run can be made again"
    blocks = (place / "log-cosine.txt").read_text().split("\n=== Prompt ")
    assert blocks[0] == f"=== Layerwise Sublayer Metrics Log ({mode}) ===\n"
    assert [block.splitlines()[1] for block in blocks[1:]] == ["w5 w9 w17", "w8 w11"]
    for prompt, block in enumerate(blocks[1:]):
        assert f"--- Dense Model Output ---\n{run.samples()[prompt]['dense']}\n" in block
        assert ("drop_attn_list: [1, 4] | drop_mlp_list: []" in block) == (mode == "dropped")
        rows = [row for row in run.table().to_pylist() if row["prompt"] == prompt]
        if mode == "dropped":
            rows = [row for row in rows if row["sublayer"] == "attn" and row["layer"] in (1, 4)]
        expected = []
        for row in rows:
            name = f"{row['layer']} {'dropped_' if mode == 'dropped' else ''}{row['sublayer']}_step{row['step']}"
            expected += [(f"{name} {line}", row[columns[mode == "pruned"]]) for line, *columns, _ in LINES]
            for space in "zh":
                alpha, orth = row[f"{space}_alpha"], row[f"{space}_orth_rel"]
                if mode == "dropped":  # <X, Y> / |Y|^2 - 1, and |X across Y| |Y| = |Y across X| |X|
                    length = math.hypot(1 + alpha, orth)
                    alpha, orth = (1 + alpha) / length**2 - 1, orth / length**2
                ratios = ("para_perp(mean)", "para_perp(median)", "ratio_of_means")
                expected += [(f"{name} {space.upper()}_{ratio}", abs(alpha) / orth) for ratio in ratios]
                expected += [
                    (f"{name} {space.upper()}_para_rel", abs(alpha)),
                    (f"{name} {space.upper()}_orth_rel", orth),
                ]
                expected += [(f"{name} alpha_{space}_mean", alpha)]
        lines = dict(re.findall(r"^(\d+ \w+_step\d+ [^:]+): +(\S+)$", block, re.MULTILINE))
        assert len(lines) == len(rows) * 22
        assert set(lines) == {name for name, _ in expected}
        for name, value in expected:
            assert float(lines[name]) == pytest.approx(value, abs=6e-5 if "sim" in name else 6e-7, rel=1e-6), name
            assert len(lines[name].partition(".")[2]) == (4 if "sim" in name else 6)


def test_options_are_logged_at_the_temperature_of_their_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """log p of " a", " b", ... at T = 0.5 as plain transformers gives it, with the blocks in the order of the paper's code; pruned mode.

    Would catch log-likelihoods of T = 1 (which the table holds) beside most likely tokens at T = 0.5.
    """
    monkeypatch.chdir(tmp_path)
    dense, pruned = (letters_folder(tmp_path / name, whole_words=True) for name in ("dense", "pruned"))
    tiny_model("llama", seed=3).save_pretrained(pruned)
    (tmp_path / "q.jsonl").write_text(
        '{"question": "w1 w2", "choices": ["w3", "w4", "w5"], "answer": 1}\n{"question": "w7", "choices": ["w4", "w5"], "answer": 0}\n'
    )
    analysis("compare_mcq_subspace_metrics", "--analysis_mode", "pruned", "--model_name", dense, "--pruned_model_name", pruned, "--questions", "q.jsonl", "--mode", "mine")  # fmt: skip
    log = (tmp_path / "cosine_logs" / "attn_pruned_temp0.5" / "log_drop8-mine-subspace.txt").read_text()
    heads = ["GLOBAL", "TOP TOKENS (Original vs Dropped)", "TOP TOKENS [", "SUBSPACE (a/b", "SUBWORD PROBABILITIES"]
    places = [[match.start() for match in re.finditer(re.escape(f"===== {head}"), log)] for head in heads]
    assert [len(found) for found in places] == [2] * 5 and log.count("compare_mode: pruned") == 2
    assert sorted(place for found in places for place in found) == [found[i] for i in (0, 1) for found in places]
    models = [prunescope.load(str(folder), device="cpu") for folder in (dense, pruned)]
    samples = prunescope.open(tmp_path / "cosine_logs" / "attn_pruned_temp0.5" / "run_drop8-mine-subspace").samples()
    for sample, block in zip(samples, log.split("===== SUBWORD PROBABILITIES")[1:], strict=True):
        said = re.findall(r"^ ([a-d]) +\| orig=(\S+) \| drop=(\S+)$", block, re.MULTILINE)
        ids = torch.tensor([models[0].tokenizer(sample["text"])["input_ids"]])
        with torch.no_grad():
            z = [loaded.model(input_ids=ids).logits[0, -1].double() for loaded in models]
        expected = [[(x / 0.5).log_softmax(-1)[token].item() for x in z] for token in sample["option_tokens"]]
        assert [letter for letter, *_ in said] == list("abc")[: len(expected)]
        assert [[float(x), float(y)] for _, x, y in said] == [pytest.approx(pair, abs=2e-5) for pair in expected]


def test_options_of_several_tokens_keep_their_sequence_likelihoods() -> None:
    whole = {"loglik_dense": [-3.0, -5.0], "loglik_target": [-4.0, -2.0], "gold": 0, "nll_dense": math.nan}
    whole |= {"nll_target": math.nan, "z_cos": 1.0, "p_cos": 1.0, "kl_dense_target": 0.0}
    sample: dict[str, Any] = {"option_strings": [" a", " b"], "option_tokens": None, "top_dense": []}
    lines = option_lines(sample, whole, whole, 0.5)
    assert lines[-2:] == [
        " a         | orig=-3.000000 | drop=-4.000000",
        " b         | orig=-5.000000 | drop=-2.000000",
    ]
    assert "Subspace token ids: None" in lines


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
    for _ in range(2):  # the paper's prune.sh gives one folder to both; a second run replaces it
        script("intra-layer/main.py", "--model", dense, "--prune_method", "magnitude", "--sparsity_ratio", 0.5, "--sparsity_type", "2:4", "--save", "same",
               "--save_model", "same")  # fmt: skip
        assert {"log_magnitude.txt", "config.json", "prunescope.json"} <= {file.name for file in Path("same").iterdir()}


# --- lines -------------------------------------------------------------------------------------------------------------


def test_the_base_changes_as_computed_directly() -> None:
    """alpha, parallel and orthogonal part of the way back relative to the target, from those relative to the dense vector."""
    x, y = (torch.randn(5, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    ours, back = compare_hidden(x, y), compare_hidden(y, x)
    alpha, orth = against_target(ours["h_alpha"].numpy(), ours["h_orth_rel"].numpy())
    assert alpha == pytest.approx(back["h_alpha"].numpy(), rel=1e-9)
    assert orth == pytest.approx(back["h_orth_rel"].numpy(), rel=1e-9)
    projected = ((x - y) * y).sum(-1) / (y * y).sum(-1)  # by hand, so that both could not be wrong together
    rest = (x - y) - projected[:, None] * y
    assert alpha == pytest.approx(projected.numpy(), rel=1e-9)
    assert orth == pytest.approx((rest.norm(dim=-1) / y.norm(dim=-1)).numpy(), rel=1e-9)


def one_place(**changes: float) -> pa.Table:
    """A row of a layerwise table in which nothing moved, but for ``changes``."""
    row = dict.fromkeys(COLUMNS, 0.0) | dict.fromkeys(["h_cos", "z_cos", "p_cos"], 1.0) | changes
    return pa.Table.from_pylist([{"layer": 3, "sublayer": "attn", "step": 0, **row}])


def test_a_change_along_the_vector_has_no_ratio() -> None:
    """Warnings are errors here: would catch a division that warns, or one that stops the script."""
    lines = list(transition_lines(one_place(h_alpha=0.5, h_para_rel=0.5), dropped=False))
    assert "3 attn_step0 H_ratio_of_means:    inf" in lines
    assert "3 attn_step0 Z_ratio_of_means:    nan" in lines
    assert len(lines) == 8 + 2 * 7 + 2
    gone = list(transition_lines(one_place(h_alpha=-1.0), dropped=True))  # the dropped stream is the zero vector
    assert "3 dropped_attn_step0 alpha_h_mean:    nan" in gone


def test_generation_lines_are_scaled_as_in_the_papers_code(dense_folder: Path, prompts: Path) -> None:
    found = prunescope.generate(
        str(dense_folder), "drop:attn=2", prompts=str(prompts), max_new_tokens=4, device="cpu", metric_temperature=0.5
    )
    lines = generation_lines(found.table(), 0, "dropped", 0.5)
    values = dict(line.split(": ", 1) for line in lines if ": " in line)
    rows = [row for row in found.table().to_pylist() if row["prompt"] == 0 and row["regime"] == "free-running"]
    assert json.loads(values["uniform_var"]) == pytest.approx([row["var_uniform"] / 0.5 for row in rows])
    assert json.loads(values["kl_estimates"]) == pytest.approx([row["var_p"] / 0.5 for row in rows])
    assert json.loads(values["global_l1"]) == [[pytest.approx(row["dz_l1"])] for row in rows], (
        "one list a step, as there"
    )
    mean = sum(5 * row["dz_top5_l1"] for row in rows) / len(rows)
    assert float(values["summary_top5_l1_mean"]) == pytest.approx(mean, abs=1e-6)
    assert not any(math.isnan(x) for x in json.loads(values["prob_cos_sim_flat"]))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_the_shell_scripts_run_from_any_folder(tmp_path: Path, dense_folder: Path, words: Path) -> None:
    """Relative paths are those of the caller, and the folder is the one that the analysis looks for."""
    environment = {**os.environ, "PYTHON": sys.executable, "MODEL": "dense", "DROP_N": "1", "DATASET": words.name, "SAMPLES": "4", "CUTOFF_LEN": "16"}  # fmt: skip
    command = ["bash", str(PAPER / "inter-layer" / "scripts" / "dropping" / "block_drop.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / checkpoint_folder("results_prune", "dense", "all", 1) / "config.json").read_text())
    assert config["drop_attn_list"] == config["drop_mlp_list"] and len(config["drop_attn_list"]) == 1
