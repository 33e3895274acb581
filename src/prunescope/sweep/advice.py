"""How much may go before a use breaks: a falling fit through the points of each series of a sweep, with intervals over items. No torch.

The share kept of what the dense model scores above chance is averaged over the tasks of a use. In every series (attention, MLP, a method, a format ...) it can
only fall as bytes fall, so an isotonic regression takes out what is noise between neighbours. Items are drawn again with replacement, the same
items at every point, and the fit made anew; the interval is between the 2.5th and the 97.5th percentile. Half an item lost and half an item won are
added to those that are drawn from, as Agresti and Min do for paired proportions (2005), so that thirty items of which none changed are not taken for proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from prunescope.errors import UserError
from prunescope.stats import Z95
from prunescope.sweep.correlations import COUNTED
from prunescope.sweep.tables import Tables

__all__ = [
    "AGREEMENT",
    "HEALING",
    "USES",
    "Advised",
    "advised",
    "best",
    "by_kind",
    "fastest",
    "held_out",
    "tasks_of",
    "to_heal",
    "to_join",
]

USES = {  # use -> what a task's name, or its kind, must hold
    "writing": ("kind", ("generative",)),
    "choice": ("kind", ("choice",)),
    "chat": ("name", ("ifeval", "mt_bench", "alpaca")),
    "code": ("name", ("humaneval", "mbpp", "code")),
    "maths": ("name", ("gsm8k", "math", "arithmetic")),
    "retrieval": ("kind", ("retrieval",)),
}
AGREEMENT = "agreement"  # a task of sweeps: how far a point writes as the dense model does
HEALING: dict[str, Any] = {
    "samples": 96,
    "new_tokens": 48,
    "held_out": 16,
    "steps": 20,
    "batch_size": 6,
    "learning_rate": 1e-4,  # few steps
}  # of points that `advise` heals
_DROPS = {"attn": "attention", "mlp": "MLP", "block": "block", "all": "attention and MLP"}
_CHANGES = {"sparsify": "weights", "quant": "bits", "joined": "joined", "healed": "healed"}
_DRAWS = 1000
_UNSEEN = 0.5  # an item lost and one won that were not seen, each this often: where no item changed, an interval of width 0 would be a claim


@dataclass(frozen=True)
class Advised:
    """One point: what it is, what it saves, and what it keeps of the use.

    ``kept`` is what was measured, ``fitted`` what the falling fit says, ``low`` and ``high`` its 95 % interval; all are shares of what the dense
    model scores above chance. ``verdict``: ``safe`` where even ``low`` loses no more than is allowed, ``likely`` where ``fitted`` does, ``breaks`` where even
    ``high`` loses more, else ``unclear``.
    """

    point: str
    series: str
    change: str
    removed: float  # share of the dense model's weights
    bytes: int | None
    saved: float | None  # share of the dense model's bytes
    kept: float
    fitted: float
    low: float
    high: float
    verdict: str


def tasks_of(use: str, rows: Sequence[Mapping[str, Any]], of_file: Sequence[str] = ()) -> list[str]:
    """The tasks of a use: of its kind, or with its words in their names, or the one of that very name; those at floor are left out.

    Args:
        of_file: the tasks that were made of the rows of ``use``, where that is a file.
    Raises:
        UserError: no task of that use was measured, or all are at floor in the dense model.
    """
    dense = {row["task"]: row for row in rows if row["point"] == "dense"}
    if of_file:
        found = list(of_file)
    elif use in dense:
        found = [use]
    elif use in USES:
        by, words = USES[use]
        found = [
            task
            for task, row in dense.items()
            if (row["kind"] in words if by == "kind" else any(word in task for word in words))
        ]
    else:
        raise UserError(f"--use {use}: neither a use ({', '.join(USES)}) nor a task of the sweep ({', '.join(dense)})")
    if not found:
        raise UserError(f"--use {use}: the sweep has no such task, it has {', '.join(dense)}; sweep with --tasks")
    if not (usable := [task for task in found if dense[task]["informative"]]):
        raise UserError(
            f"--use {use}: the dense model itself is at chance in {', '.join(found)}; sweep with other tasks"
        )
    return usable


def advised(tables: Tables, tasks: Sequence[str], *, loss: float, seed: int = 0) -> list[Advised]:
    """Every point but the dense one, by series and by what it saves, the least first."""
    rows = {(row["point"], row["task"]): row for row in tables.sweep.to_pylist()}
    points = list(dict.fromkeys(point for point, _ in rows if point != "dense"))
    kept, drawn = _kept(tables, rows, points, tasks, seed)
    whole = rows["dense", tasks[0]].get("bytes")
    found: list[Advised] = []
    for series in dict.fromkeys(rows[point, tasks[0]]["series"] for point in points):
        mine = [i for i, point in enumerate(points) if rows[point, tasks[0]]["series"] == series]
        mine.sort(key=lambda i: _order(rows[points[i], tasks[0]]))
        fitted = _fall(kept[mine])
        low, high = np.percentile([_fall(draw[mine]) for draw in drawn], [2.5, 97.5], axis=0)
        for place, i in enumerate(mine):
            row = rows[points[i], tasks[0]]
            size = row.get("bytes")
            found.append(
                Advised(
                    points[i], series, row["change"], row[COUNTED], size,
                    None if size is None or not whole else 1 - size / whole,
                    float(kept[i]), float(fitted[place]), float(low[place]), float(high[place]),
                    _verdict(fitted[place], low[place], high[place], 1 - loss),
                )
            )  # fmt: skip
    return found


def best(found: Sequence[Advised], budget: str) -> Advised | None:
    """Of the safe points that save bytes, or else of the likely ones: the one of the fewest bytes (``bytes``), or the one that keeps most (``score``)."""
    for verdict in ("safe", "likely"):
        if able := [one for one in found if one.verdict == verdict and (one.saved or 0) > 0]:
            if budget == "bytes":
                return min(able, key=lambda one: (one.bytes or math.inf, -one.fitted))
            return max(able, key=lambda one: (one.low, one.fitted, one.saved or 0))
    return None


def by_kind(found: Sequence[Advised]) -> dict[str, Advised | None]:
    """Kind (attention, MLP, block, both, weights, bits, joined, healed) -> the point of the fewest bytes that keeps the use, safe or else likely."""
    kinds: dict[str, list[Advised]] = {}
    for one in found:
        kinds.setdefault(_CHANGES.get(one.change) or _DROPS.get(one.series, one.series), []).append(one)
    return {kind: best(points, "bytes") for kind, points in kinds.items()}


def to_join(found: Sequence[Advised]) -> tuple[list[str], str | None]:
    """Points worth rounding as well: of every series of dropped or pruned ones that of the fewest bytes that does not break the use; and the
    quantised point of the fewest bytes that does not either, None where all do."""
    whole = [one for one in found if one.verdict != "breaks" and one.bytes is not None]
    formats = [one for one in whole if one.change == "quant"]
    series: dict[str, list[Advised]] = {}
    for one in whole:
        if one.change in ("drop", "sparsify"):
            series.setdefault(one.series, []).append(one)
    return [_smallest(points).point for points in series.values()], _smallest(formats).point if formats else None


def to_heal(found: Sequence[Advised], dropped: Mapping[str, str]) -> list[str]:
    """Of every series of dropped sublayers the first point that may lose the use: there healing can change the verdict. The same sublayers once.

    Args:
        dropped: point -> its sublayers.
    """
    lost: dict[str, str] = {}
    for one in found:
        if one.change == "drop" and one.verdict in ("unclear", "breaks"):
            lost.setdefault(one.series, one.point)
    once: dict[str, str] = {}
    for point in lost.values():
        once.setdefault(dropped[point], point)
    return list(once.values())


def _smallest(points: Sequence[Advised]) -> Advised:
    return min(points, key=lambda one: (one.bytes or math.inf, -one.fitted))


def fastest(found: Sequence[Advised], rates: Mapping[str, Mapping[str, Any]]) -> Advised | None:
    """Of the safe points, or else of the likely ones, that are faster than the dense model by more than the spread of the repeats: the fastest.

    Args:
        rates: point -> ``speedup`` and ``faster``, of the points that were timed.
    """
    for verdict in ("safe", "likely"):
        able = [
            one
            for one in found
            if one.verdict == verdict and (rate := rates.get(one.point)) and rate["faster"] and rate["speedup"] > 1
        ]
        if able:
            return max(able, key=lambda one: (rates[one.point]["speedup"], one.low))
    return None


def held_out(tables: Tables, tasks: Sequence[str], *, seed: int = 0) -> list[tuple[Advised, float, float]]:
    """Every inner point of a series, predicted from the others alone: ``(point, predicted, half the width of the 95 % interval of the
    difference)``. Between neighbours the fit is taken to be straight in the share of weights removed, or of bytes saved."""
    found = []
    rows = {(row["point"], row["task"]): row for row in tables.sweep.to_pylist()}
    points = list(dict.fromkeys(point for point, _ in rows if point != "dense"))
    kept, drawn = _kept(tables, rows, points, tasks, seed)
    everything = {one.point: one for one in advised(tables, tasks, loss=0.05, seed=seed)}
    for series in dict.fromkeys(one.series for one in everything.values()):
        names = [one.point for one in everything.values() if one.series == series]
        places = [points.index(name) for name in names]
        size = [everything[name].removed or everything[name].saved or 0.0 for name in names]
        for hidden in range(1, len(names) - 1):
            rest = [i for i in range(len(names)) if i != hidden]
            asked = [places[i] for i in rest]
            at = [size[i] for i in rest]
            off = [_between(draw[asked], at, size[hidden]) - draw[places[hidden]] for draw in drawn]
            guess = _between(kept[asked], at, size[hidden])
            found.append((everything[names[hidden]], guess, Z95 * float(np.std(off, ddof=1))))
    return found


def _kept(
    tables: Tables,
    rows: Mapping[tuple[str, str], Mapping[str, Any]],
    points: Sequence[str],
    tasks: Sequence[str],
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share kept at every point, ``(points,)``, and of items drawn again, ``(draws, points)``."""
    scores: dict[tuple[str, str], dict[Any, float]] = {}
    columns = (tables.items[name].to_pylist() for name in ("point", "task", "item", "key", "score"))
    for point, task, item, key, score in zip(*columns, strict=True):
        scores.setdefault((point, task), {})[item, key] = float(score)
    rng = np.random.default_rng(seed)
    kept, drawn = np.zeros(len(points)), np.zeros((_DRAWS, len(points)))
    for task in tasks:
        before = scores["dense", task]
        room = rows["dense", task]["score"] - (rows["dense", task]["chance"] or 0.0)
        lost = np.array([[before[item] - scores[point, task][item] for item in before] for point in points]) / room
        kept += 1 - lost.mean(axis=1)
        lost = np.concatenate([lost, np.tile([[1 / room, -1 / room]], (len(points), 1))], axis=1)
        weights = np.array([1.0] * len(before) + [_UNSEEN] * 2) / (len(before) + 2 * _UNSEEN)
        draws = rng.choice(len(weights), (_DRAWS, len(before)), p=weights)
        drawn += 1 - np.stack([lost[:, draw].mean(axis=1) for draw in draws])
    return kept / len(tasks), drawn / len(tasks)


def _fall(kept: NDArray[np.float64]) -> NDArray[np.float64]:
    """The falling sequence nearest to ``kept`` in least squares, never above 1: that is where the dense model stands."""
    fitted: NDArray[np.float64] = np.minimum(isotonic_regression(kept, increasing=False).x, 1.0)
    return fitted


def _between(kept: NDArray[np.float64], sizes: Sequence[float], size: float) -> float:
    """The falling fit at another size, straight between its neighbours."""
    return float(np.interp(size, sizes, _fall(kept)))


def _order(row: Mapping[str, Any]) -> tuple[float, float]:
    return -(row.get("bytes") or 0), row[COUNTED]


def _verdict(fitted: float, low: float, high: float, least: float) -> str:
    if low >= least:
        return "safe"
    return "breaks" if high < least else "likely" if fitted >= least else "unclear"
