"""`heal` as a command: what is written, from every form of a pruned model, and what an interrupted run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

import prunescope
from families import characters_folder
from prunescope.cli import main
from prunescope.models.loading import load_model

SMALL: dict[str, Any] = {
    **{"samples": 40, "new_tokens": 8, "held_out": 8, "steps": 5, "batch_size": 8, "check_every": 2},
    **{"learning_rate": 0.001, "device": "cpu"},
}


@pytest.fixture(scope="module")
def dense_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return characters_folder(tmp_path_factory.mktemp("heal") / "dense")


def words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("form", ["recipe", "zeroed", "compact", "drop:"])
def test_what_is_dropped_stays_dropped(form: str, dense_path: Path, tmp_path: Path) -> None:
    """Branches that come back with the weights of the dense model, layers under wrong numbers, a record that names other ones."""
    dense, target = str(dense_path), str(tmp_path / "target")
    options: dict[str, Any] = {"target": "block" if form == "compact" else "attn", "n": 2, "samples": 2, "seq_len": 8}
    if form == "drop:":
        target = "drop:attn=1;mlp=3"
    else:
        prunescope.drop(dense, **options, out=target, format=form, device="cpu")  # type: ignore[arg-type]
    healed = prunescope.heal(target, teacher=dense, out=str(tmp_path / "healed"), **SMALL)
    before = (
        prunescope.load(dense, drop=target[5:], device="cpu") if form == "drop:" else load_model(target, device="cpu")
    )
    after = load_model(tmp_path / "healed", device="cpu")
    assert after.dropped == before.dropped and after.dropped
    assert after.layer_map == before.layer_map
    assert healed.record["format"] == ("compact" if form == "compact" else "zeroed")
    assert healed.record["kl"]["written"] == pytest.approx(healed.record["kl"]["best"], rel=1e-4)
    assert healed.record["kl"]["best"] < healed.record["kl"]["before"]
    curves = pq.read_table(tmp_path / "healed" / "curves.parquet")
    assert curves["step"].to_pylist() == [1, 2, 3, 4, 5] and curves["held_out_kl"].null_count == 2
    assert (tmp_path / "healed" / "figures" / "healing.png").is_file() and not list(
        (tmp_path / "healed").glob("part-*")
    )


@pytest.mark.parametrize(("pattern", "lora"), [("2:4", None), ("0.6", None), ("2:4", 4)])
def test_every_zero_of_a_sparse_model_is_in_the_files(
    pattern: str, lora: int | None, dense_path: Path, tmp_path: Path
) -> None:
    """Read with safetensors alone. 2:4 that is no longer 2:4 runs on no sparse kernel."""
    goal: dict[str, Any] = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    prunescope.sparsify(
        str(dense_path), method="magnitude", calibration="none", out=str(tmp_path / "sparse"), device="cpu", **goal
    )
    found = prunescope.heal(
        str(tmp_path / "sparse"), teacher=str(dense_path), out=str(tmp_path / "healed"), lora=lora, **SMALL
    )
    before, after = (
        {k: v for file in (tmp_path / name).glob("*.safetensors") for k, v in load_file(file).items()}
        for name in ("sparse", "healed")
    )
    matrices = [name for name in before if "layers." in name and before[name].dim() == 2]
    assert set(before) == set(after) and len(matrices) == 35
    for name in matrices:
        assert bool((after[name] == 0)[before[name] == 0].all()), name
        assert not bool((after[name] == before[name])[before[name] != 0].all()), name
    assert found.record["pruned_before"][-1]["method"] == "magnitude"
    assert found.summary["kl"]["written"] < found.summary["kl"]["before"]


def test_a_killed_run_goes_on_with_the_same_curve(dense_path: Path, tmp_path: Path) -> None:
    """SIGKILL from outside, whatever was being written; then --resume."""
    options = SMALL | {"teacher": str(dense_path), "steps": 60, "patience": 999, "new_tokens": 4}
    argv = ["heal", "drop:attn=1", *words(options)]
    job = subprocess.Popen(
        [sys.executable, "-m", "prunescope", *argv, "--out", str(tmp_path / "cut")],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    state = tmp_path / "cut.partial" / "part-state.safetensors"
    deadline = time.monotonic() + 120
    while not state.is_file() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert state.is_file() and not (tmp_path / "cut").exists()
    assert main([*argv, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    curves = [pq.read_table(tmp_path / name / "curves.parquet").drop_columns("seconds") for name in ("whole", "cut")]
    assert curves[0].equals(curves[1]) and curves[0].num_rows == 60
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_an_interrupted_run_is_not_overwritten_nor_made_twice(
    dense_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import prunescope.prune.heal as engine

    argv = ["heal", "drop:attn=1", *words(SMALL | {"teacher": str(dense_path)}), "--out", str(tmp_path / "cut")]
    step = engine._step

    def stopping(*args: Any) -> Any:
        if args[6] == 3:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_step", stopping)
        assert main(argv) == 1
    assert "interrupted; continue with --resume" in capfd.readouterr().err
    assert main(argv) == 2
    assert "continue it with --resume" in capfd.readouterr().err
    assert main([*argv, "--resume", "--batch-size", "5"]) == 2
    assert "begun with other" in capfd.readouterr().err
    assert main([*argv, "--resume"]) == 0
    capfd.readouterr()
    assert main([*argv, "--resume"]) == 0
    assert "complete already" in capfd.readouterr().err
    assert main([*argv, "--resume", "--steps", "7"]) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"on_policy": 1.5}, "--on-policy 1.5: it must be from 0 to 1"),
        ({"learning_rate": 0}, "--learning-rate 0.0: it must be positive"),
        ({"steps": 0}, "--steps 0: it must be at least 1"),
        ({"lora": 0}, "--lora 0: it must be at least 1"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16"),
        ({"held_out": 40}, "none is left to train on"),
        ({"traces": ","}, "a comma too many"),
        ({"learning_rate": 1e30, "warmup": 0, "clip": 0}, "lower --learning-rate"),
    ],
)
def test_bad_options_are_one_line(
    more: dict[str, Any], said: str, dense_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["heal", "drop:attn=1", *words(SMALL | {"teacher": dense_path} | more), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capfd.readouterr().err.strip().split("\n")[-1]
    assert said in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["quant:int8", "drop:attn=99", "nowhere/at/all"])
def test_targets_that_cannot_be_healed(
    target: str, dense_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["heal", target, *words(SMALL | {"teacher": dense_path}), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert capfd.readouterr().err.count("prunescope: ") == 1 and not list(tmp_path.iterdir())


def test_target_and_teacher_must_go_together(
    dense_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The dense model as its own target was trained for nothing. Streams of other widths ended in a RuntimeError of torch, those of a deeper target in
    a KeyError. ``--out`` on a link to the target or the teacher replaced what it leads to."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(dense_path, hidden_size=48, head_dim=12, num_hidden_layers=6)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(dense_path).save_pretrained(tmp_path / "other")
    prunescope.drop(
        str(dense_path), n=1, samples=2, seq_len=8, out=str(tmp_path / "ours"), format="recipe", device="cpu"
    )
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    before = sorted(tmp_path.iterdir())
    for target, more, said in (
        (dense_path, {}, "is the teacher itself"),
        (tmp_path / "other", {"reconstruct": 1}, "has 6 blocks of width 48"),
        (tmp_path / "ours", {"out": tmp_path / "link", "overwrite": "true"}, "is the target itself"),
        (
            "drop:attn=1",
            {"teacher": tmp_path / "ours", "out": tmp_path / "link", "overwrite": "true"},
            "is the teacher itself",
        ),
    ):
        options = SMALL | {"teacher": dense_path, "out": tmp_path / "out"} | more
        assert main(["heal", str(target), *words(options)]) == 2
        assert said in capfd.readouterr().err.strip().split("\n")[-1]
        assert sorted(tmp_path.iterdir()) == before
    changed = load_model(dense_path, device="cpu")
    changed.identity["adapter"] = "merged in memory"  # the target would be without it
    with pytest.raises(prunescope.UserError, match="the teacher in memory is another model"):
        prunescope.heal("drop:attn=1", teacher=changed, **SMALL)


@pytest.mark.parametrize("more", [{"embeddings": True}, {"lora": 16}])
def test_the_disk_is_asked_for_all_that_lies_there_at_a_time(
    more: dict[str, Any], dense_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two states beside each other are more than twice what was asked for: a disk that filled up at a check took the run with it."""
    import prunescope.jobs.options as jobs
    import prunescope.prune.heal as engine

    asked: list[int] = []
    seen: list[int] = []
    save = engine.save_file

    def watched(tensors: Any, file: Path, **how: Any) -> None:
        save(tensors, file, **how)
        seen.append(sum(path.stat().st_size for path in (tmp_path / "out.partial").iterdir()))

    monkeypatch.setattr(jobs, "require_space", lambda out, needed: asked.append(needed))
    monkeypatch.setattr(engine, "save_file", watched)
    monkeypatch.setattr(
        "prunescope.jobs.heal.checkpoint_bytes", lambda *_: 0
    )  # with room for a tokenizer, more than all of this
    prunescope.heal("drop:attn=1", teacher=str(dense_path), out=str(tmp_path / "out"), **(SMALL | more))
    assert len(seen) > 4 and asked[0] == pytest.approx(max(seen), rel=0.2)


def test_out_is_asked_for_and_the_record_says_how(dense_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["heal", "drop:attn=1", "--teacher", str(dense_path)]) == 2
    assert "--out DIR" in capfd.readouterr().err
    found = prunescope.heal("drop:attn=1", teacher=str(dense_path), on_policy=0.5, **SMALL)
    assert json.loads((found.folder / "prunescope.json").read_text("utf-8")) == json.loads(json.dumps(found.record))
    assert found.table()["on_policy"].to_pylist() == [False, True, False, True, False]
    assert {"teacher", "base", "traces", "config", "versions", "key"} <= set(found.record)


def test_dense_pruned_and_healed_stand_side_by_side(
    dense_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the terminal, in summary.md and on the page; the difference of healed and pruned is of the items themselves, not of two differences
    from the dense model with their own intervals."""
    dense, healed, run = str(dense_path), str(tmp_path / "healed"), tmp_path / "scores"
    prunescope.heal("drop:attn=1", teacher=dense, out=healed, **SMALL)
    found = prunescope.evaluate(
        [dense, "drop:attn=1", healed], tasks="reversal-mc,brackets-mc", limit=12, shots=1, device="cpu", out=str(run)
    )
    said = capsys.readouterr().out
    assert "against the model before it" in said and "3 - 2" in said
    scores: dict[str, dict[str, list[float]]] = {}
    for row in found.table().to_pylist():
        scores.setdefault(row["model"], {}).setdefault(row["task"], []).append(row["score"])
    steps = found.info["paired_with_previous"]
    assert list(steps) == [healed]
    for task, entry in steps[healed].items():
        after, before = scores[healed][task], scores["drop:attn=1"][task]
        assert entry["difference"] == pytest.approx(sum(after) / 12 - sum(before) / 12)
        assert entry["wrong_to_right"] == sum(a > b for a, b in zip(after, before, strict=True))
        assert entry["right_to_wrong"] == sum(a < b for a, b in zip(after, before, strict=True))
    assert "## Against the model before it" in (run / "summary.md").read_text("utf-8")
    prunescope.report([str(run), healed], out=str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "Differences from the model before it" in page and 'id="scores"' in page and "held-out KL" in page
