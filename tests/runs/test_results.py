"""Run folders: complete or not there; summaries against numpy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors import SafetensorError

import prunescope
from families import tiny_folder
from prunescope.compare.metrics import COLUMNS, H_COLUMNS
from prunescope.errors import UserError
from prunescope.runs.folder import check_free, require_space, staged, write_json
from prunescope.runs.summary import summarise

PROMPTS = '{"prompt": "w5 w6 w7", "id": "a", "kind": "test"}\n{"prompt": "w9"}\n{"prompt": "w4 w8"}\n'


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawing takes most of a run's time: one run for all tests that only read it or break a copy."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "prompts.jsonl").write_text(PROMPTS)
    prunescope.layerwise(
        str(tiny_folder("llama", folder / "dense")), out=str(folder / "run"), prompts=str(folder / "prompts.jsonl"), max_new_tokens=4, batch_size=2
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def run(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "run"))


def test_a_run_holds_what_the_spec_says(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {"run.json", "layerwise.parquet", "samples.jsonl", "figures", "config.yaml"}
    opened = prunescope.open(run)
    info, table = opened.info, opened.table()
    assert {
        "schema_version",
        "command",
        "config",
        "seed",
        "versions",
        "device",
        "models",
        "noise_floor",
        "summary",
        "wall_time_s",
        "peak_memory_bytes",
    } <= set(info)
    assert info["models"]["dense"]["content_hash"].startswith("sha256:") and info["models"]["dense"]["blocks"] == 6
    assert {"prompt", "step", "position", "layer", "sublayer", *COLUMNS} <= set(table.column_names)
    assert len(table) == 12 * info["steps"]
    assert [row["id"] for row in opened.samples()] == ["a", "1", "2"]
    assert opened.samples()[0]["text"] == "w5 w6 w7"
    assert opened.summary["h"]["h_cos"]["mean"] == pytest.approx(table["h_cos"].to_numpy().mean())
    assert set(opened.noise_floor) and all(value >= 0 for value in opened.noise_floor.values())
    figures = {path.name for path in (run / "figures").iterdir()}
    for stem in (
        "fig04_cosine_by_layer_attn",
        "fig06_truth_and_estimate_mlp",
        "fig14_p_cos_dev_attn",
        "fig17_kl_dense_target_mlp",
    ):
        assert {f"{stem}.svg", f"{stem}.png"} <= figures


def test_reading_a_run_needs_no_torch(run: Path) -> None:
    code = f"import sys, prunescope; prunescope.open({str(run)!r}).table(); import prunescope.report.figures.layerwise; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_saved_config_runs_again_and_gives_the_same_rows(run: Path, tmp_path: Path) -> None:
    from prunescope.cli import main

    assert main(["layerwise", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert prunescope.open(tmp_path / "again").table().equals(prunescope.open(run).table())


def test_results_in_memory_save_to_the_same_run(dense_folder: Path, prompts: Path, tmp_path: Path, run: Path) -> None:
    result = prunescope.layerwise(str(dense_folder), prompts=str(prompts), max_new_tokens=4, batch_size=2)
    saved = result.save(tmp_path / "saved")
    assert saved.table().equals(prunescope.open(run).table()) and result.table().equals(saved.table())
    assert result.summary == saved.summary
    with pytest.raises(UserError, match="--overwrite"):
        result.save(tmp_path / "saved")
    result.save(tmp_path / "saved", overwrite=True)


# --- damaged, newer, half-written --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "not a finished run"),
        (lambda run: (run / "run.json").write_text("{"), "cannot be read"),
        (lambda run: (run / "run.json").write_text('{"schema_version": 9, "command": "layerwise"}'), "newer"),
        (lambda run: (run / "layerwise.parquet").unlink(), "lacks the table"),
        (lambda run: (run / "layerwise.parquet").write_bytes(b"PAR1 cut off"), "damaged"),
    ],
)
def test_damaged_runs_are_refused_in_one_line(run: Path, damage: object, message: str) -> None:
    damage(run)  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as error:
        prunescope.open(run).table()
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        prunescope.open(tmp_path / "nothing")
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(UserError, match="not a finished run"):
        prunescope.open(tmp_path / "x.partial")


def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "run") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_finished_parts_outlive_a_failure_and_must_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "run") as folder:  # noqa: PT012
        (folder / "part-00000.parquet").write_text("x")
        raise KeyboardInterrupt
    assert (tmp_path / "run.partial" / "part-00000.parquet").exists() and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--resume or start over"):
        check_free(tmp_path / "run")
    with staged(tmp_path / "run", resume=True) as folder:
        assert (folder / "part-00000.parquet").exists()
    with pytest.raises(UserError, match="contradict"):
        check_free(tmp_path / "run", overwrite=True, resume=True)


def test_a_run_cut_off_between_two_renames_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="exists"):
        check_free(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").exists()
    (tmp_path / "run.old").mkdir()
    (tmp_path / "run.old" / "x").write_text("left over")
    with staged(tmp_path / "run", overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert (tmp_path / "run" / "new").exists()


def test_a_folder_of_the_users_that_is_called_partial_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="was not written by prunescope"), staged(tmp_path / "run"):
        raise AssertionError
    assert (tmp_path / "run.partial" / "thesis.txt").exists()


def test_a_mistake_found_late_leaves_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="overflow"), staged(tmp_path / "run") as folder:  # noqa: PT012
        (folder / "part-state.json").write_text("{}")
        raise UserError("overflow")
    assert not list(tmp_path.iterdir())


def test_the_summary_is_of_what_the_target_changes(dense_folder: Path, prompts: Path) -> None:
    """One changed sublayer of twelve: averaging in eleven perfect cosines would hide it."""
    result = prunescope.layerwise(str(dense_folder), "drop:attn=1", prompts=str(prompts), max_new_tokens=3)
    rows = [row for row in result.table().to_pylist() if row["layer"] == 1 and row["sublayer"] == "attn"]
    assert result.info["changed_layers"] == {"attn": [1], "mlp": []}
    assert result.summary["h"]["h_cos"]["mean"] == pytest.approx(np.mean([row["h_cos"] for row in rows]))


def test_overwrite_replaces_ours_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="not written by prunescope"):
        check_free(tmp_path / "thesis", overwrite=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(RuntimeError), staged(tmp_path / "run", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "run" / "run.json").exists(), "the old run stays until the new one is complete"
    with staged(tmp_path / "run", overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "thesis"]


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path) -> None:
    import errno

    with pytest.raises(UserError, match="free some space"):
        require_space(tmp_path / "run", 2**60)
    with pytest.raises(UserError, match="free some space"), staged(tmp_path / "run"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match="free some space"), staged(tmp_path / "run"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), staged(tmp_path / "run"):  # of something else
        raise SafetensorError("Error while serializing: I/O error: Is a directory (os error 21)")
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
import prunescope.compare.layerwise as module
real = module._columns
def slow(*a, **k):
    print("batch", flush=True)
    if {hang}: time.sleep(60)
    return real(*a, **k)
module._columns = slow
from prunescope.cli import main
sys.exit(main({argv!r}))
"""


def test_killed_at_any_moment_a_run_leaves_nothing_that_looks_complete(
    dense_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """SIGKILL in the second batch: no RUN; what is there says partial, and --resume gives the rows of an undisturbed run."""
    argv = ["layerwise", str(dense_folder), "--prompts", str(prompts), "--max-new-tokens", "4", "--batch-size", "1"]
    out = tmp_path / "run"
    second = f"len(list(__import__('pathlib').Path({f'{out}.partial'!r}).glob('part-*.parquet'))) == 1"
    code = KILLED.replace("{hang}", second).replace("{argv!r}", repr([*argv, "--out", str(out)]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process, so that sums are added in the same order
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)  # type: ignore[call-overload]
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["batch\n"] * 3  # the noise floor is the first
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert (tmp_path / "run.partial" / "part-00000.parquet").exists()
    from prunescope.cli import main

    assert main([*argv, "--out", str(out)]) == 2
    assert main([*argv, "--out", str(out), "--resume", "--lens", "final-norm"]) == 2, (
        "other options cannot be continued"
    )
    assert main([*argv, "--out", str(out), "--resume"]) == 0
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert prunescope.open(out).table().equals(prunescope.open(tmp_path / "whole").table())
    assert not (tmp_path / "run.partial").exists()


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_a_killed_drop_leaves_no_checkpoint(dense_folder: Path, tmp_path: Path, delay: float) -> None:
    code = f"""
import sys
import prunescope.models.saving as module
real = module._save_plain
def announce(*a):
    real(*a)
    print("saved", flush=True)
    __import__("time").sleep(60)
module._save_plain = announce
from prunescope.cli import main
main(["drop", {str(dense_folder)!r}, "--n", "1", "--samples", "2", "--seq-len", "8", "--format", "zeroed", "--out", {str(tmp_path / "out")!r}])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    while "saved" not in process.stdout.readline():
        pass
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()


# --- summaries ---------------------------------------------------------------------------------------------------------


def test_summary_equals_numpy_and_its_interval_covers_prompts_not_rows() -> None:
    """20 rows a prompt that are all alike: rows say the mean is certain, prompts say it is not."""
    rng = np.random.default_rng(0)
    level = rng.normal(size=12)
    table = pa.table(
        {"prompt": np.repeat(np.arange(12), 20), "h_cos": np.repeat(level, 20), "h_alpha": np.full(240, np.nan)}
    )
    found = summarise(table, {"h": H_COLUMNS})["h"]
    assert "h_alpha" not in found
    stats = found["h_cos"]
    values = np.repeat(level, 20)
    assert stats["mean"] == pytest.approx(values.mean()) and stats["median"] == pytest.approx(np.median(values))
    for name, q in (("p1", 1), ("p5", 5), ("p95", 95), ("p99", 99), ("min", 0), ("max", 100)):
        assert stats[name] == pytest.approx(np.percentile(values, q))
    standard_error = level.std(ddof=1) / np.sqrt(12)
    low, high = stats["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.25)
    assert summarise(table.slice(0, 20), {"h": ["h_cos"]})["h"]["h_cos"]["ci95"] == [None, None]
    assert summarise(table.slice(0, 0), {"h": ["h_cos"]}) == {"h": {}}


def test_json_holds_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": Path("p")}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": "p"}}
