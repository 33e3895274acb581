"""From the measured points of a sweep to its tables: scores with what was lost, items, metrics, and which metric foretells which loss.

Reads what was measured and nothing else: no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prunescope.runs.folder import Run
from prunescope.stats_ranks import kendall, spearman

__all__ = ["COUNTED", "Measured", "Tables", "assemble", "show", "split"]

COUNTED = "weights_removed"  # what a metric must beat: counting what was removed
_Z95 = 1.959963984540054
_ID = ("point", "series", "n", "method", "sparsity", "pattern")
_ID_TYPES = (pa.string(), pa.string(), pa.int32(), pa.string(), pa.float64(), pa.string())
_MEANS = (("generative", "all generative"), ("choice", "all choice"))  # kind -> outcome in the table of correlations
_HALF = 0.5


@dataclass
class Measured:
    """One point: what identifies it, what was removed, scores by task, metrics by space and column, and every item."""

    info: dict[str, Any]
    items: pa.Table

    def packed(self) -> pa.Table:
        return self.items.replace_schema_metadata({"prunescope": json.dumps(self.info)})

    @classmethod
    def unpacked(cls, table: pa.Table) -> Measured:
        return cls(json.loads(table.schema.metadata[b"prunescope"]), table.replace_schema_metadata(None))


@dataclass
class Tables:
    """What the files of a sweep hold; ``summary`` goes to run.json."""

    sweep: pa.Table
    items: pa.Table
    metrics: pa.Table
    correlations: pa.Table
    summary: dict[str, Any]

    @classmethod
    def of_run(cls, run: Run) -> Tables:
        """What a run folder holds."""
        sweep, items, metrics, correlations = (
            run.table(name) for name in ("sweep", "items", "metrics", "correlations")
        )
        return cls(sweep, items, metrics, correlations, run.summary)

    def named(self) -> dict[str, pa.Table]:
        """The tables by the names of their files."""
        return {name: getattr(self, name) for name in ("sweep", "items", "metrics", "correlations")}


def assemble(measured: Sequence[Measured]) -> Tables:
    """Tables of the points in their order. The first one must be the dense model: what is lost is lost against it."""
    dense = measured[0]
    informative = _informative(dense.info["scores"])
    rows = [row for point in measured for row in _score_rows(point, dense, informative)]
    sweep = pa.Table.from_pylist(rows, _SWEEP)
    metrics = pa.Table.from_pylist([row for point in measured for row in _metric_rows(point)], _METRICS)
    items = pa.concat_tables([_with_point(point) for point in measured], promote_options="permissive")
    correlations = pa.Table.from_pylist(_correlations(measured, rows), _CORRELATIONS)
    summary = _summary(rows, correlations.to_pylist()) | {"discrepancy": _discrepancy(measured, informative)}
    return Tables(sweep, items, metrics, correlations, summary)


_SWEEP = pa.schema(
    [
        *zip(_ID, _ID_TYPES, strict=True),
        ("dropped", pa.string()),
        (COUNTED, pa.float64()),
        ("task", pa.string()),
        ("pair", pa.string()),
        ("kind", pa.string()),
        ("metric", pa.string()),
        *((name, pa.float64()) for name in ("score", "stderr", "ci_low", "ci_high")),
        ("items", pa.int32()),
        *((name, pa.float64()) for name in ("chance", "dense", "loss", "loss_ci_low", "loss_ci_high")),
        *((name, pa.float64()) for name in ("kept", "kept_ci_low", "kept_ci_high")),
        ("informative", pa.bool_()),
        ("at_floor", pa.string()),
        ("seconds", pa.float64()),
    ]
)
_METRICS = pa.schema(
    [
        *zip(_ID, _ID_TYPES, strict=True),
        ("space", pa.string()),
        ("column", pa.string()),
        *((name, pa.float64()) for name in ("mean", "median", "ci_low", "ci_high")),
    ]
)
_CORRELATIONS = pa.schema(
    [
        ("outcome", pa.string()),
        ("kind", pa.string()),
        ("points", pa.string()),
        ("space", pa.string()),
        ("column", pa.string()),
        ("spearman", pa.float64()),
        ("kendall", pa.float64()),
        ("count", pa.int32()),
    ]
)


def split(tables: Tables) -> list[Measured]:
    """The points that tables were made of: the way back from `assemble`."""
    import pyarrow.compute as pc

    found = []
    for name in dict.fromkeys(tables.sweep["point"].to_pylist()):
        rows = tables.sweep.filter(pc.equal(tables.sweep["point"], name)).to_pylist()
        metrics: dict[str, dict[str, Any]] = {}
        for row in tables.metrics.filter(pc.equal(tables.metrics["point"], name)).to_pylist():
            stats = {"mean": row["mean"], "median": row["median"], "ci95": [row["ci_low"], row["ci_high"]]}
            metrics.setdefault(row["space"], {})[row["column"]] = stats
        scores = {
            row["task"]: {
                "kind": row["kind"],
                "metric": row["metric"],
                "value": row["score"],
                "stderr": row["stderr"],
                "ci95": None if row["ci_low"] is None else [row["ci_low"], row["ci_high"]],
                "n": row["items"],
                "chance": row["chance"],
                "at_floor": row["at_floor"],
            }
            for row in rows
        }
        info = {key: rows[0][key] for key in (*_ID, "dropped", COUNTED, "seconds")}
        items = tables.items.filter(pc.equal(tables.items["point"], name)).drop_columns(["point", "series"])
        found.append(Measured(info | {"scores": scores, "metrics": metrics}, items))
    return found


# --- rows --------------------------------------------------------------------------------------------------------------


def _pair(task: str) -> tuple[str, str] | None:
    """Pair and way of a built-in task: arithmetic-gen -> arithmetic, gen."""
    pair, _, way = task.rpartition("-")
    return (pair, way) if pair and way in ("gen", "mc") else None


def _informative(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """A task says something if the dense model is not at its floor; a matched pair only if neither way of answering it is."""
    above = {task: score["at_floor"] is None for task, score in scores.items()}
    found = {}
    for task in scores:
        parts = _pair(task)
        others = [f"{parts[0]}-{way}" for way in ("gen", "mc")] if parts else []
        found[task] = above[task] and all(above.get(other, True) for other in others)
    return found


def _id(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: info[name] for name in _ID}


def _score_rows(point: Measured, dense: Measured, informative: Mapping[str, bool]) -> list[dict[str, Any]]:
    rows = []
    for task, score in point.info["scores"].items():
        before = dense.info["scores"][task]
        low, high = score.get("ci95") or (None, None)
        chance = score.get("chance")
        loss, half = _loss(point.items, dense.items, task)
        room = before["value"] - (chance or 0.0)
        usable = informative[task] and room > 0
        parts = _pair(task)
        rows.append(
            _id(point.info)
            | {
                "dropped": point.info["dropped"],
                COUNTED: point.info[COUNTED],
                "task": task,
                "pair": parts[0] if parts else None,
                "kind": score["kind"],
                "metric": score["metric"],
                "score": score["value"],
                "stderr": score.get("stderr"),
                "ci_low": low,
                "ci_high": high,
                "items": score["n"],
                "chance": chance,
                "dense": before["value"],
                "loss": before["value"] - score["value"],
                "loss_ci_low": None if half is None else loss - half,
                "loss_ci_high": None if half is None else loss + half,
                "kept": 1 - loss / room if usable else None,
                "kept_ci_low": 1 - (loss + half) / room if usable and half is not None else None,
                "kept_ci_high": 1 - (loss - half) / room if usable and half is not None else None,
                "informative": informative[task],
                "at_floor": score["at_floor"] if point is dense else None,
                "seconds": point.info["seconds"],
            }
        )
    return rows


def _by_item(items: pa.Table, task: str) -> dict[Any, float]:
    found = zip(*(items[name].to_pylist() for name in ("task", "item", "key", "score")), strict=True)
    return {(item, key): float(score) for name, item, key, score in found if name == task}


def _loss(point: pa.Table, dense: pa.Table, task: str) -> tuple[float, float | None]:
    """Mean of dense minus point over the same items, and half its 95 % interval (normal, paired); None with fewer than two items."""
    ours, theirs = _by_item(dense, task), _by_item(point, task)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{task}: the points were not asked the same items")
    lost = np.array([ours[item] - theirs[item] for item in ours])
    half = float(_Z95 * lost.std(ddof=1) / math.sqrt(len(lost))) if len(lost) > 1 else None
    return float(lost.mean()), half


def _metric_rows(point: Measured) -> list[dict[str, Any]]:
    return [
        _id(point.info)
        | {
            "space": space,
            "column": column,
            "mean": stats["mean"],
            "median": stats["median"],
            "ci_low": stats["ci95"][0],
            "ci_high": stats["ci95"][1],
        }
        for space, columns in point.info["metrics"].items()
        for column, stats in columns.items()
    ]


def _with_point(point: Measured) -> pa.Table:
    table = point.items
    for place, name in enumerate(("point", "series")):
        table = table.add_column(place, name, pa.array([point.info[name]] * len(table), pa.string()))
    return table


def _discrepancy(measured: Sequence[Measured], informative: Mapping[str, bool]) -> list[dict[str, Any]]:
    """By how much more choosing keeps than writing at each point, the paper's claim: share kept of what is above chance, over matched pairs.

    The two ways of a pair answer the same items, so the difference is taken item by item; its interval is normal, with the dense
    scores taken for exact and pairs for independent. Empty where no pair says something.
    """
    dense = measured[0]
    scores = dense.info["scores"]
    pairs = [parts[0] for task in scores if (parts := _pair(task)) and parts[1] == "gen"]
    pairs = [p for p in pairs if f"{p}-mc" in scores and informative[f"{p}-gen"] and informative[f"{p}-mc"]]
    found = []
    for point in measured[1:] if pairs else []:
        means, errors = [], []
        for pair in pairs:
            shares = []
            for task in (f"{pair}-gen", f"{pair}-mc"):
                ours, theirs = _by_item(dense.items, task), _by_item(point.items, task)
                room = scores[task]["value"] - (scores[task]["chance"] or 0.0)
                shares.append({item[0]: (ours[item] - theirs[item]) / room for item in ours})
            more = np.array([shares[0][item] - shares[1][item] for item in shares[0]])
            means.append(float(more.mean()))
            errors.append(float(more.std(ddof=1)) / math.sqrt(len(more)) if len(more) > 1 else math.nan)
        mean, half = sum(means) / len(means), _Z95 * math.sqrt(sum(e * e for e in errors)) / len(means)
        interval = [mean - half, mean + half] if math.isfinite(half) else None
        found.append(_id(point.info) | {"choice_keeps_more": mean, "ci95": interval, "pairs": len(pairs)})
    return found


# --- which metric foretells --------------------------------------------------------------------------------------------


def _outcomes(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """(outcome, kind) -> loss by point: of every task that says something, and of the share lost on average over those of a kind."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for kind, name in _MEANS:
        lost: dict[str, list[float]] = {}
        for row in rows:
            if row["kind"] == kind and row["kept"] is not None:
                lost.setdefault(row["point"], []).append(1 - row["kept"])
        if lost:
            found[name, kind] = {point: sum(values) / len(values) for point, values in lost.items()}
    for row in rows:
        if row["informative"]:
            found.setdefault((row["task"], row["kind"]), {})[row["point"]] = row["loss"]
    return found


def _correlations(measured: Sequence[Measured], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rank correlation of every metric's mean with every loss: over all points, and over those of each series with the dense model."""
    columns: dict[tuple[str, str], dict[str, float]] = {}
    for point in measured:
        columns.setdefault(("size", COUNTED), {})[point.info["point"]] = point.info[COUNTED]
        for space, stats in point.info["metrics"].items():
            for column, values in stats.items():
                columns.setdefault((space, column), {})[point.info["point"]] = values["mean"]
    series = {point.info["point"]: point.info["series"] for point in measured}
    scopes = {"all": list(series)} | {
        name: [point for point, own in series.items() if own in (name, "dense")]
        for name in dict.fromkeys(series.values())
        if name != "dense"
    }
    if len(scopes) == 2:  # one series: the same points as all
        scopes.pop("all")
    found = []
    for (outcome, kind), losses in _outcomes(rows).items():
        for scope, points in scopes.items():
            for (space, column), values in columns.items():
                both = [p for p in points if p in losses and p in values and math.isfinite(values[p])]
                x, y = [values[p] for p in both], [losses[p] for p in both]
                found.append(
                    {
                        "outcome": outcome,
                        "kind": kind,
                        "points": scope,
                        "space": space,
                        "column": column,
                        "spearman": spearman(x, y) if both else None,
                        "kendall": kendall(x, y) if both else None,
                        "count": len(both),
                    }
                )
    return found


def _summary(rows: Sequence[Mapping[str, Any]], correlations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    dense = {
        row["task"]: {key: row[key] for key in ("kind", "score", "ci_low", "ci_high", "chance", "items", "informative")}
        for row in rows
        if row["point"] == "dense"
    }
    return {"dense": dense, "half_lost": _half_lost(rows), "foretells": _best(correlations)}


def _half_lost(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per series and kind the first point at which, on average over the tasks that say something, half of what was above chance is gone."""
    found: dict[str, dict[str, Any]] = {}
    for series in dict.fromkeys(row["series"] for row in rows if row["series"] != "dense"):
        for kind, _ in _MEANS:
            mine = [r for r in rows if r["series"] == series and r["kind"] == kind and r["kept"] is not None]
            shares: dict[str, list[float]] = {}
            for row in mine:
                shares.setdefault(row["point"], []).append(row["kept"])
            if shares:
                at = next((p for p, kept in shares.items() if sum(kept) / len(kept) < _HALF), None)
                found.setdefault(series, {})[kind] = at
    return found


def _best(correlations: Sequence[Mapping[str, Any]], count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """For the average of each kind the columns that order the points best, by |Spearman|, and what counting weights does."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _, outcome in _MEANS:
        mine = [dict(r) for r in correlations if r["outcome"] == outcome and r["spearman"] is not None]
        scopes = list(dict.fromkeys(r["points"] for r in mine))
        mine = [r for r in mine if r["points"] == scopes[0]] if scopes else []
        mine.sort(key=lambda r: -abs(r["spearman"]))
        if mine:
            counted = [r for r in mine if r["column"] == COUNTED]
            found[outcome] = mine[:count] + [r for r in counted if r not in mine[:count]]
    return found


# --- in the terminal ---------------------------------------------------------------------------------------------------


def show(info: Mapping[str, Any], tables: Tables) -> None:
    """Mean scores by point and kind, then which metrics order the points as the losses do."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    rows = tables.sweep.to_pylist()
    says = [row for row in rows if row["informative"]] or rows
    kinds = [kind for kind, _ in _MEANS if any(row["kind"] == kind for row in says)]
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1), title=Text(str(info["config"]["model"])), title_justify="left")
    shown.add_column("point", no_wrap=True)
    shown.add_column("weights\nremoved", justify="right")
    for kind in kinds:
        count = len({row["task"] for row in says if row["kind"] == kind})
        shown.add_column(f"{kind}, mean\nof {count} tasks", justify="right")
        shown.add_column("share\nkept", justify="right")
    more = {row["point"]: row for row in tables.summary["discrepancy"]}
    if more:
        shown.add_column("choice keeps\nmore by", justify="right")
    for point in dict.fromkeys(row["point"] for row in rows):
        cells = []
        for kind in kinds:
            mine = [row for row in says if (row["point"], row["kind"]) == (point, kind)]
            kept = [row["kept"] for row in mine if row["kept"] is not None]
            cells.append(f"{sum(row['score'] for row in mine) / len(mine):.3f}")
            cells.append(f"{sum(kept) / len(kept):.3f}" if kept else "-")
        if more:
            cells.append(_more(more.get(point)))
        removed = next(row[COUNTED] for row in rows if row["point"] == point)
        shown.add_row(point, f"{100 * removed:.1f} %", *cells)
    console.print(shown)
    left_out = list(dict.fromkeys(row["task"] for row in rows if not row["informative"]))
    if left_out:
        console.print(
            Text(f"at floor in the dense model, alone or as a pair, so of no say here: {', '.join(left_out)}")
        )
    for outcome, best in tables.summary["foretells"].items():
        names = ", ".join(f"{row['column']} {row['spearman']:+.3f}" for row in best)
        console.print(Text(f"ranks of the loss, {outcome}, by Spearman over {best[0]['count']} points: {names}"))


def _more(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    half = "" if row["ci95"] is None else f" \u00b1 {(row['ci95'][1] - row['ci95'][0]) / 2:.2f}"
    return f"{row['choice_keeps_more']:+.2f}{half}"
