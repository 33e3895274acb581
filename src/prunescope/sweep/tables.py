"""From the measured points of a sweep to its tables, and back: scores with what was lost, items, metrics.

Reads what was measured and nothing else: no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prunescope.runs.folder import Run
from prunescope.stats import normal_interval, pareto_front
from prunescope.sweep.correlations import CORRELATIONS_SCHEMA, COUNTED, MEANS, best_predictors, correlations
from prunescope.tasks import quick
from prunescope.tasks.scores import tasks_at_floor

__all__ = ["Measured", "Tables", "assemble", "kl_of", "split"]

_ID = ("point", "series", "n", "method", "sparsity", "pattern", "quant", "change")
_ID_TYPES = (pa.string(), pa.string(), pa.int32(), pa.string(), pa.float64(), pa.string(), pa.string(), pa.string())
_DENSE = ("kind", "score", "ci_low", "ci_high", "chance", "items", "informative")  # of a dense score, in run.json
_HALF = 0.5
_ByItem = dict[str, dict[tuple[Any, Any], float]]  # task -> (item, key) -> number


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
    at_floor = tasks_at_floor({task: score["at_floor"] for task, score in dense.info["scores"].items()})
    lost = [_lost(_by_item(dense), _by_item(point)) for point in measured]
    rows = [row for point, own in zip(measured, lost, strict=True) for row in _score_rows(point, dense, own, at_floor)]
    sweep = pa.Table.from_pylist(rows, _SWEEP)
    metrics = pa.Table.from_pylist([row for point in measured for row in _metric_rows(point)], _METRICS)
    items = pa.concat_tables([_with_point(point) for point in measured], promote_options="permissive")
    ranked = correlations([point.info for point in measured], rows)
    summary = {
        "dense": {row["task"]: {key: row[key] for key in _DENSE} for row in rows if row["point"] == "dense"},
        "half_lost": _half_lost(rows),
        "predicts": best_predictors(ranked),
        "kl": {point.info["point"]: kl for point in measured if (kl := kl_of(point.info)) is not None},
        "front": _front(measured, rows),
        "discrepancy": _discrepancy(measured, lost, at_floor),
    }
    return Tables(sweep, items, metrics, pa.Table.from_pylist(ranked, CORRELATIONS_SCHEMA), summary)


_SWEEP = pa.schema(
    [
        *zip(_ID, _ID_TYPES, strict=True),
        ("dropped", pa.string()),
        (COUNTED, pa.float64()),
        ("bytes", pa.int64()),
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
        info = {key: rows[0].get(key) for key in (*_ID, "dropped", COUNTED, "bytes", "seconds")}
        items = tables.items.filter(pc.equal(tables.items["point"], name)).drop_columns(["point", "series"])
        found.append(Measured(info | {"scores": scores, "metrics": metrics}, items))
    return found


# --- rows --------------------------------------------------------------------------------------------------------------


def _id(info: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: info.get(name) for name in _ID}
    if found["change"] is None:  # of a folder written before sweeps could quantise
        found["change"] = "dense" if info["point"] == "dense" else "sparsify" if info["method"] else "drop"
    return found


def _score_rows(point: Measured, dense: Measured, lost: _ByItem, at_floor: Collection[str]) -> list[dict[str, Any]]:
    rows = []
    for task, score in point.info["scores"].items():
        before = dense.info["scores"][task]
        low, high = score.get("ci95") or (None, None)
        chance = score.get("chance")
        loss, interval = _loss(list(lost.get(task, {}).values()))
        least, most = interval or (None, None)
        room = before["value"] - (chance or 0.0)
        usable = task not in at_floor and room > 0
        rows.append(
            _id(point.info)
            | {
                "dropped": point.info["dropped"],
                COUNTED: point.info[COUNTED],
                "bytes": point.info.get("bytes"),
                "task": task,
                "pair": quick.pair_of(task) if task in quick.QUICK else None,
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
                "loss_ci_low": least,
                "loss_ci_high": most,
                "kept": 1 - loss / room if usable else None,
                "kept_ci_low": 1 - most / room if usable and most is not None else None,
                "kept_ci_high": 1 - least / room if usable and least is not None else None,
                "informative": task not in at_floor,
                "at_floor": score["at_floor"] if point is dense else None,
                "seconds": point.info["seconds"],
            }
        )
    return rows


def _by_item(point: Measured) -> _ByItem:
    found: _ByItem = {}
    columns = (point.items[name].to_pylist() for name in ("task", "item", "key", "score"))
    for task, item, key, score in zip(*columns, strict=True):
        found.setdefault(task, {})[item, key] = float(score)
    return found


def _lost(dense: _ByItem, point: _ByItem) -> _ByItem:
    """Dense minus point, item by item."""
    for task in dense.keys() | point.keys():
        if dense.get(task, {}).keys() != point.get(task, {}).keys():
            raise RuntimeError(f"{task}: the points were not asked the same items")
    return {task: {item: ours - point[task][item] for item, ours in scores.items()} for task, scores in dense.items()}


def _loss(lost: Sequence[float]) -> tuple[float, list[float] | None]:
    """Mean over items, and its 95 % interval (normal, paired); None with fewer than two items."""
    mean = float(np.mean(lost))
    stderr = float(np.std(lost, ddof=1)) / math.sqrt(len(lost)) if len(lost) > 1 else None
    return mean, None if stderr is None else normal_interval(mean, stderr)


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


def _discrepancy(
    measured: Sequence[Measured], lost: Sequence[_ByItem], at_floor: Collection[str]
) -> list[dict[str, Any]]:
    """By how much more choosing keeps than writing at each point, the paper's claim: share kept of what is above chance, over matched pairs.

    The two ways of a pair answer the same items, so the difference is taken item by item; its interval is normal, with the dense
    scores taken for exact and pairs for independent. Empty where no pair says something.
    """
    scores = measured[0].info["scores"]
    ways = {pair: {f"{pair}-gen", f"{pair}-mc"} for task in scores if (pair := quick.pair_of(task)) in quick.PAIRS}
    pairs = [pair for pair, both in ways.items() if both <= scores.keys() and not both & set(at_floor)]
    found = []
    for point, own in zip(measured[1:], lost[1:], strict=True) if pairs else []:
        means, errors = [], []
        for pair in pairs:
            shares = []
            for task in (f"{pair}-gen", f"{pair}-mc"):
                room = scores[task]["value"] - (scores[task]["chance"] or 0.0)
                shares.append({item: value / room for (item, _), value in own[task].items()})
            more = np.array([shares[0][item] - shares[1][item] for item in shares[0]])
            means.append(float(more.mean()))
            errors.append(float(more.std(ddof=1)) / math.sqrt(len(more)) if len(more) > 1 else math.nan)
        mean, error = sum(means) / len(means), math.sqrt(sum(e * e for e in errors)) / len(means)
        interval = normal_interval(mean, error) if math.isfinite(error) else None
        found.append(_id(point.info) | {"choice_keeps_more": mean, "ci95": interval, "pairs": len(pairs)})
    return found


def _front(measured: Sequence[Measured], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Points that no other beats in bytes and in the mean: share kept of what is written, of what is chosen, and KL; from the fewest bytes up."""
    size = {point.info["point"]: point.info.get("bytes") for point in measured}
    values: dict[str, dict[str, float]] = {}
    for kind in MEANS:
        shares: dict[str, list[float]] = {}
        for row in rows:
            if row["kind"] == kind and row["kept"] is not None:
                shares.setdefault(row["point"], []).append(row["kept"])
        values[kind] = {point: sum(kept) / len(kept) for point, kept in shares.items()}
    values["kl"] = {p.info["point"]: -kl for p in measured if (kl := kl_of(p.info)) is not None}
    found = {}
    for name, of_point in values.items():
        points = [point for point in of_point if size[point] is not None]
        front = pareto_front([(float(size[point] or 0), of_point[point]) for point in points])
        if points:
            found[name] = [points[i] for i in front]
    return found


def kl_of(info: Mapping[str, Any]) -> float | None:
    """Mean KL(dense || point) over the steps of the dense model's texts."""
    stats = info["metrics"].get("p", {}).get("kl_dense_target")
    return None if stats is None else float(stats["mean"])


def _half_lost(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per series and kind the first point at which, on average over the tasks that say something, half of what was above chance is gone."""
    found: dict[str, dict[str, Any]] = {}
    for series in dict.fromkeys(row["series"] for row in rows if row["change"] not in ("dense", "quant")):
        for kind in MEANS:
            mine = [r for r in rows if r["series"] == series and r["kind"] == kind and r["kept"] is not None]
            shares: dict[str, list[float]] = {}
            for row in mine:
                shares.setdefault(row["point"], []).append(row["kept"])
            if shares:
                at = next((p for p, kept in shares.items() if sum(kept) / len(kept) < _HALF), None)
                found.setdefault(series, {})[kind] = at
    return found
