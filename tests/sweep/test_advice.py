"""`advise`: the fit by hand, verdicts where the truth is known, and the command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import prunescope
from prunescope.cli import main
from prunescope.runs.folder import write_run
from prunescope.sweep.advice import Advised, _fall, advised, best, by_kind, held_out, tasks_of, to_heal, to_join
from prunescope.sweep.correlations import COUNTED
from prunescope.sweep.points import DENSE, Point
from prunescope.sweep.tables import Measured, Tables, assemble

WHOLE = 1000


def made_up(items: int = 400, drawn: int | None = None) -> Tables:
    """Dropped attentions lose 1 % of what is written a step, MLPs 20 %; int8 loses nothing at a quarter of the bytes. Choosing stays."""
    rng = np.random.default_rng(3)
    points = [DENSE, *(Point(s, n=n) for s in ("attn", "mlp") for n in range(1, 6)), Point("quant", quant="int8")]
    found = []
    before = {"arithmetic-gen": rng.random(items) < 0.8, "arithmetic-mc": rng.random(items) < 0.9}
    for point in points:
        n = point.n or 0
        wrong = n * (0.01 if point.series == "attn" else 0.2 if point.series == "mlp" else 0)
        rows, scores = [], {}
        for task, right in before.items():
            kind = "generative" if task.endswith("gen") else "choice"
            keep = np.ones(items, bool) if kind == "choice" else rng.random(items) >= wrong
            values = (right & keep).astype(float)
            rows += [{"task": task, "item": i, "key": str(i), "score": v, "prediction": "", "gold": ""} for i, v in enumerate(values)]  # fmt: skip
            scores[task] = {"kind": kind, "metric": "acc", "value": float(values.mean()), "stderr": 0.01, "ci95": None, "n": items, "chance": 0.25 if kind == "choice" else 0.0, "at_floor": None}  # fmt: skip
        size = WHOLE // 4 if point.quant else WHOLE - 10 * n
        info = point.columns() | {"dropped": f"{point.series}={n}" if n else "", COUNTED: n / 100, "bytes": size, "scores": scores, "metrics": {}, "seconds": 1.0}  # fmt: skip
        found.append(Measured(info, pa.Table.from_pylist(rows)))
    return assemble(found)


def folder_of(tables: Tables, folder: Path, source: str = "m") -> Path:
    folder.mkdir()
    config = {"calibration": "self", "samples": 8, "seq_len": 64, "seed": 0}
    info = {
        **{"schema_version": 1, "command": "sweep", "config": config, "seed": 0, "versions": {}, "device": "cpu"},
        **{"complete": True, "models": {"dense": {"source": source}, "target": None}, "summary": tables.summary},
    }
    named = tables.named()
    write_run(folder, info, {"" if name == "sweep" else name: table for name, table in named.items()})
    return folder


def test_the_fit_is_the_pooled_means() -> None:
    """By hand: 0.9 and 1.0 are out of order and become their mean, 0.95; above 1 is 1."""
    assert _fall(np.array([1.1, 0.9, 1.0, 0.4])).tolist() == pytest.approx([1.0, 0.95, 0.95, 0.4])


def test_verdicts_where_the_truth_is_known() -> None:
    """Would catch an interval over points instead of items, a fit in the wrong direction, and a share not taken of what is above chance."""
    tables = made_up()
    found = {one.point: one for one in advised(tables, ["arithmetic-gen"], loss=0.05)}
    assert found["attn-001"].verdict == "safe" and found["quant-int8"].verdict == "safe"
    assert all(found[f"mlp-{n:03d}"].verdict == "breaks" for n in range(1, 6))
    rows = {row["point"]: row for row in tables.sweep.to_pylist() if row["task"] == "arithmetic-gen"}
    for name, one in found.items():
        assert one.kept == pytest.approx(rows[name]["score"] / rows["dense"]["score"])
        assert one.low <= one.fitted <= one.high and one.saved == pytest.approx(1 - rows[name]["bytes"] / WHOLE)
    lost = rows["attn-001"]["loss_ci_high"] - rows["attn-001"]["loss_ci_low"]
    assert found["attn-001"].high - found["attn-001"].low == pytest.approx(lost / rows["dense"]["score"], rel=0.4)
    assert best(list(found.values()), "bytes") == found["quant-int8"]
    assert best([one for one in found.values() if one.change == "drop"], "bytes").series == "attn"  # type: ignore[union-attr]
    chosen = advised(tables, ["arithmetic-mc"], loss=0.05)
    assert all(one.verdict == "safe" and one.kept == 1.0 and 0.97 < one.low < 0.999 for one in chosen)
    few = advised(made_up(12), ["arithmetic-mc"], loss=0.05)
    assert all(one.verdict == "likely" and one.low < 0.9 for one in few)  # not one of twelve items changed: no proof


def test_a_point_that_was_not_seen_lies_in_its_interval() -> None:
    inner = held_out(made_up(), ["arithmetic-gen"])
    assert {one.point for one, *_ in inner} == {f"{s}-{n:03d}" for s in ("attn", "mlp") for n in (2, 3, 4)}
    for one, guess, half in inner:
        assert abs(guess - one.kept) <= 1.5 * half and 0 < half < 0.12, one


def test_uses() -> None:
    rows = made_up(20).sweep.to_pylist()
    assert tasks_of("writing", rows) == tasks_of("arithmetic-gen", rows) == ["arithmetic-gen"]
    assert tasks_of("choice", rows) == ["arithmetic-mc"]
    assert tasks_of("maths", rows) == ["arithmetic-gen", "arithmetic-mc"]
    for use, words in {"code": "no such task", "poems": "neither a use"}.items():
        with pytest.raises(prunescope.UserError, match=words):
            tasks_of(use, rows)


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What it says, the folder that it writes, and the command line that makes the point: an export that parses."""
    sweep = folder_of(made_up(), tmp_path / "sweep")
    assert main(["advise", "m", "--sweep", str(sweep), "--use", "writing", "--out", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    assert "Quantising alone wins" in printed and "quant-int8" in printed
    run = prunescope.open(tmp_path / "out")
    assert run.summary["best"]["point"] == "quant-int8" and run.summary["items"] == 400 and run.table().num_rows == 11
    assert json.loads((tmp_path / "out" / "run.json").read_text())["models"]["dense"]["source"] == "m"
    dropped = next(row for row in run.table().to_pylist() if row["point"] == "attn-002")
    assert dropped["command"] == 'prunescope export m --drop "attn=2" --for transformers --out pruned'
    few = folder_of(made_up(12), tmp_path / "few")
    found = prunescope.advise(str(few), budget="score", loss=0.01)
    assert found.summary["best"]["verdict"] in ("safe", "likely")


def speed_of(folder: Path, times: dict[str, tuple[float, bool]], first: str = "m") -> Path:
    """A run of speed: model -> times the dense model's tokens a second, and whether that is within the spread."""
    folder.mkdir()
    rows = [
        {"model": name, "batch_size": size, "decode_tokens_per_s": 100.0 * speedup * size, "decode_speedup": speedup, "decode_within_spread": within}
        for name, (speedup, within) in {first: (1.0, True), **times}.items()
        for size in (1, 8)
    ]  # fmt: skip
    info = {"schema_version": 1, "command": "speed", "config": {}, "seed": 0, "versions": {}, "device": "cpu"}
    write_run(folder, info, {"": pa.Table.from_pylist(rows)})
    return folder


def test_budget_speed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The fastest of the safe points. Catches one that breaks the use, one whose gain is noise, the smallest in place of the fastest, the
    rate of a larger batch, and a gain of another model."""
    sweep = folder_of(made_up(), tmp_path / "sweep")
    times = {
        "drop:attn=1": (1.2, False),
        "drop:attn=2": (1.1, False),
        "drop:attn=3": (1.4, True),
        "drop:mlp=5": (2.0, False),
    }
    speed = speed_of(tmp_path / "speed", times)
    argv = ["advise", "m", "--sweep", str(sweep), "--budget", "speed", "--loss", "0.1", "--speed"]
    assert main([*argv, str(speed), "--out", str(tmp_path / "out")]) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "attn-001 writes 120 tokens a second, 1.20 times as many as the dense model" in printed
    run = prunescope.open(tmp_path / "out")
    rows = {row["point"]: row for row in run.table().to_pylist()}
    assert run.summary["best"]["point"] == "attn-001" and rows["attn-001"]["verdict"] == "safe"
    assert rows["mlp-005"]["speedup"] == 2.0 and rows["mlp-005"]["verdict"] == "breaks"
    assert rows["attn-004"]["tokens_per_s"] is None and rows["quant-int8"]["tokens_per_s"] is None
    none = speed_of(tmp_path / "noise", {"drop:attn=1": (1.2, True)})
    found = prunescope.advise("m", sweep=str(sweep), budget="speed", speed=str(none))
    assert found.summary["best"] is None and found.summary["says"][0].startswith(
        "No point that keeps the use is faster"
    )
    assert main([*argv, str(speed_of(tmp_path / "other", times, "other"))]) == 2
    assert "times other first, not m" in capfd.readouterr().err


def test_too_few_items_cannot_tell(tmp_path: Path) -> None:
    tables = made_up(12)
    rows = [row for row in tables.sweep.to_pylist() if row["series"] in ("dense", "mlp") and (row["n"] or 0) < 2]
    sweep = pa.Table.from_pylist(rows, tables.sweep.schema)
    few = Tables(sweep, tables.items, tables.metrics, tables.correlations, tables.summary)
    found = prunescope.advise(str(folder_of(few, tmp_path / "sweep")), loss=0.1)
    verdicts = {row["verdict"] for row in found.table().to_pylist()}
    assert found.summary["best"] is None and verdicts <= {"unclear", "breaks"}
    assert found.summary["says"][0].startswith("The data cannot tell" if "unclear" in verdicts else "Nothing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-folder/of-a-model/here"], "no-folder"),
        (["m", "--use", "code"], "no built-in task measures it"),
        (["m", "--use", "none.jsonl"], "none.jsonl cannot be read"),
        (["m", "--sweep", "SWEEP", "--use", __file__.replace(".py", ".txt")], "cannot be read"),
        (["m", "--sweep", "SWEEP", "--heal"], "leave out --heal"),
        (["m", "--sweep", "SWEEP", "--speed", "x"], "--budget bytes"),
        (["m", "--sweep", "SWEEP", "--budget", "speed", "--speed", "SWEEP"], "takes runs of speed"),
        (["other", "--sweep", "SWEEP"], "not of other"),
        (["m", "--sweep", "SWEEP", "--use", "code"], "no such task"),
        (["m", "--sweep", "SWEEP", "--loss", "5"], "--loss 5"),
    ],
)
def test_bad_input(words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep = folder_of(made_up(8), tmp_path / "sweep")
    argv = ["advise", *(str(sweep) if word == "SWEEP" else word for word in words), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    lines = [
        line for line in capfd.readouterr().err.splitlines() if line and "huggingface.co cannot be reached" not in line
    ]
    assert len(lines) == 1 and said in lines[0] and not (tmp_path / "out").exists()


def test_rows_of_the_user(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A sweep that was asked the file is judged by its task alone; the same rows under another name are the same; other rows are refused, with the
    option that sweeps them."""
    tables = made_up(60)
    sweep = folder_of(tables, tmp_path / "sweep")
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"question": "1 + 1", "answer": "2"}\n', "utf-8")
    sha = hashlib.sha256(mine.read_bytes()).hexdigest()
    info = json.loads((sweep / "run.json").read_text("utf-8")) | {"own_files": {sha: ["arithmetic-gen"]}}
    (sweep / "run.json").write_text(json.dumps(info), "utf-8")
    mine.rename(tmp_path / "other-name.jsonl")
    found = prunescope.advise("m", sweep=str(sweep), use=str(tmp_path / "other-name.jsonl"))
    assert found.summary["tasks"] == ["arithmetic-gen"]
    assert "Judged is the answer written" in " ".join(capfd.readouterr().out.split())
    assert found.table().equals(prunescope.advise("m", sweep=str(sweep), use="arithmetic-gen").table())
    mine.write_text('{"question": "1 + 2", "answer": "3"}\n', "utf-8")
    with pytest.raises(prunescope.UserError, match=r"was not asked these rows; sweep with --tasks .*mine\.jsonl"):
        prunescope.advise("m", sweep=str(sweep), use=str(mine))


def one(point: str, series: str, change: str, size: int, verdict: str, fitted: float = 0.9) -> Advised:
    return Advised(point, series, change, 0.1, size, 0.1, fitted, fitted, fitted, fitted, verdict)


def test_what_is_joined_and_healed() -> None:
    """By hand. Catches the largest point in place of the smallest, a broken one that is joined, one that keeps the use healed, and two of a series."""
    found = [
        one("attn-002", "attn", "drop", 90, "likely"), one("attn-004", "attn", "drop", 80, "unclear"), one("attn-008", "attn", "drop", 60, "breaks"),
        one("mlp-002", "mlp", "drop", 80, "breaks"), one("wanda-0.3", "wanda", "sparsify", 70, "unclear"),
        one("quant-int8", "quant", "quant", 50, "safe"), one("quant-int4", "quant", "quant", 30, "breaks"),
    ]  # fmt: skip
    assert to_join(found) == (["attn-004", "wanda-0.3"], "quant-int8")
    dropped = {"attn-004": "attn=3", "mlp-002": "mlp=1", "all-002": "attn=3"}
    assert to_heal([*found, one("all-002", "all", "drop", 80, "breaks")], dropped) == ["attn-004", "mlp-002"]
    assert to_join([one for one in found if one.change != "quant"])[1] is None
    kinds = by_kind(found)
    assert list(kinds) == ["attention", "MLP", "weights", "bits"]
    assert kinds["attention"] is found[0] and kinds["MLP"] is None and kinds["bits"] is found[5]


def test_the_page_shows_the_advice(tmp_path: Path) -> None:
    sweep = folder_of(made_up(), tmp_path / "sweep")
    prunescope.advise(str(sweep), out=str(tmp_path / "advice"))
    page = prunescope.report([str(tmp_path / "advice")], out=str(tmp_path / "page.html")).read_text("utf-8")
    assert "Quantising alone wins" in page and page.count('<td class="text">breaks</td>') == 5


def test_a_sweep_in_which_nothing_saves_bytes(tmp_path: Path) -> None:
    """Zeros in dense files, or a sweep of 0.1, which knows no bytes: it is not the items that cannot tell."""
    tables = made_up(40)
    for size in (WHOLE, None):
        rows = [row | {"bytes": size} for row in tables.sweep.to_pylist()]
        sweep = pa.Table.from_pylist(rows, tables.sweep.schema)
        same = Tables(sweep, tables.items, tables.metrics, tables.correlations, tables.summary)
        found = prunescope.advise(str(folder_of(same, tmp_path / f"sweep-{size}")))
        assert found.summary["best"] is None and found.summary["says"][0].startswith("No point saves bytes")
