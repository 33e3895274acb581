"""What the page holds of a run: means, quantiles and a bounded number of single values, packed.

Everything that a table or a sentence shows is computed over all rows, in float64. Single cells of the heatmaps are float32 and thinned to a
budget, so that a run of any size makes a page that opens at once: whole steps or whole prompts are left out, and the page says so.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prunescope.report import KIND_NAMES
from prunescope.runs.folder import Columns
from prunescope.runs.recovery import of_questions

__all__ = ["CELL_COLUMNS", "checkpoint_view", "generation_view", "layerwise_view", "mcq_view", "metric_columns", "pack"]

CELL_COLUMNS = ("h_cos_dev", "z_cos_dev", "p_cos_dev", "kl_dense_target", "kl_est", "js", "top1_agree", "dp_top1")
MEAN_FLOATS, CELL_FLOATS = 400_000, 600_000  # of all layerwise runs of a page together
STEP_ROWS, TEXT_STEPS, QUESTIONS, TOP_QUESTIONS, POINTS = 1024, 6000, 500, 100, 5000
TOKEN_CHARACTERS, TEXT_CHARACTERS = 400, 20_000
_STATS = ("mean", "p5", "p95", "min", "max")


def pack(values: Any, dtype: str = "f8") -> dict[str, Any]:
    """An array as JSON: little-endian bytes, all first bytes of the numbers before all second ones (that shrinks), deflate, base64."""
    array = np.ascontiguousarray(values, dtype=f"<{dtype}")
    shuffled = array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
    return {
        "dtype": dtype,
        "shape": list(array.shape),
        "data": base64.b64encode(zlib.compress(shuffled, 6)).decode("ascii"),
    }


def metric_columns(table: pa.Table | Columns) -> list[str]:
    """The metric columns of a run's table: its floating-point columns."""
    return [field.name for field in table.schema if pa.types.is_floating(field.type)]


def _values(rows: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """``(rows, columns)`` float64; what is not there is NaN."""
    return np.stack([rows[name].to_numpy().astype(np.float64) for name in columns], axis=1)


def _group_stats(values: np.ndarray, group: np.ndarray, count: int, order: np.ndarray | None = None) -> np.ndarray:
    """Mean, 5th and 95th percentile, smallest and largest of each group, ``(stats, columns, count)``; NaN where a group has nothing.
    ``order`` sorts the groups, where it is known."""
    result = np.full((len(_STATS), values.shape[1], count), np.nan)
    order = np.argsort(group, kind="stable") if order is None else order
    edges = np.searchsorted(group[order], np.arange(count + 1))
    for number in range(count):
        found = values[order[edges[number] : edges[number + 1]]]
        if not len(found):
            continue
        for column in range(values.shape[1]):
            known = found[:, column][np.isfinite(found[:, column])]
            if len(known):
                low, high = np.quantile(known, [0.05, 0.95])
                result[:, column, number] = known.mean(), low, high, known.min(), known.max()
    return result


def _stat_blobs(stats: np.ndarray, columns: Sequence[str]) -> dict[str, Any]:
    return {name: pack(stats[:, number]) for number, name in enumerate(columns)}


def _stride(size: int, limit: int) -> int:
    return max(1, -(-size // limit))


def clipped(text: str, limit: int) -> str:
    """Cut to ``limit`` characters, with a word on how many there were."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


# --- layerwise ---------------------------------------------------------------------------------------------------------


def layerwise_view(
    table: pa.Table | Columns, info: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], share: int = 1
) -> dict[str, Any]:
    """By layer over all rows; by layer and step, mean over prompts; by layer and step of single prompts, with their tokens.

    Args:
        share: how many layerwise runs the page has; each gets this part of the budget.
    """
    columns = metric_columns(table)
    kinds, layers = list(KIND_NAMES), int(info["models"]["dense"]["blocks"])
    kind_of = pc.index_in(table["sublayer"], pa.array(kinds)).to_numpy()
    layer, step, prompt = (table[name].to_numpy() for name in ("layer", "step", "prompt"))
    place = kind_of * layers + layer
    steps = int(step.max()) + 1
    stride = _stride(len(kinds) * layers * steps * len(columns), MEAN_FLOATS // share)
    kept = list(range(0, steps, stride))
    chosen = step % stride == 0
    shape = (len(kinds), layers, len(kept))
    cell = place[chosen] * len(kept) + step[chosen] // stride
    shown = _Prompts(kind_of, layer, step, prompt, layers, [name for name in CELL_COLUMNS if name in columns], share)
    order = np.argsort(place, kind="stable")
    means, by_layer = {}, {}
    for name in columns:  # a column at a time: a run may be larger than the memory
        values = table[name].to_numpy().astype(np.float64)
        known = np.isfinite(values[chosen])
        total = np.bincount(cell[known], values[chosen][known], int(np.prod(shape)))
        count = np.bincount(cell[known], minlength=int(np.prod(shape)))
        with np.errstate(invalid="ignore"):
            means[name] = pack((total / count).reshape(shape), "f4")
        stats = _group_stats(values[:, None], place, len(kinds) * layers, order)
        by_layer[name] = pack(stats.reshape(len(_STATS), len(kinds), layers))
        shown.add(name, values)
    return {
        "layers": layers,
        "kinds": kinds,
        "columns": columns,
        "changed": info["changed_layers"],
        "by_layer": by_layer,
        "steps": kept,
        "stride": stride,
        "means": means,
        "prompts": shown.described(samples),
        "prompt_count": len(np.unique(prompt)),
    }


class _Prompts:
    """Single prompts, evenly chosen, as many as the budget holds; of very long ones the first steps. Columns are added one by one."""

    def __init__(
        self, kind_of: np.ndarray, layer: np.ndarray, step: np.ndarray, prompt: np.ndarray, layers: int, wanted: Sequence[str], share: int
    ) -> None:  # fmt: skip
        self.wanted = wanted
        numbers = [int(number) for number in np.unique(prompt)]
        longest = max(1, int(step.max()) + 1)
        per_step = 2 * layers * len(wanted)
        most_steps = max(8, CELL_FLOATS // share // per_step)
        total = sum(min(len(np.unique(step[prompt == n])), most_steps) for n in numbers[:200]) / len(numbers[:200])
        fit = max(1, int(CELL_FLOATS // share // (per_step * max(total, 1))))
        self.rows: dict[int, np.ndarray] = {}  # prompt -> its rows
        self.places: dict[int, tuple[tuple[np.ndarray, ...], tuple[int, int, int]]] = {}  # where they stand in its grid
        self.cells: dict[int, dict[str, Any]] = {}
        for number in numbers[:: _stride(len(numbers), fit)]:
            mine = np.flatnonzero((prompt == number) & (step < most_steps))
            steps = min(int(step[mine].max()) + 1, longest)
            self.rows[number] = mine
            self.places[number] = (kind_of[mine], layer[mine], step[mine]), (2, layers, steps)
            self.cells[number] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        if name not in self.wanted:
            return
        for number, mine in self.rows.items():
            place, shape = self.places[number]
            grid = np.full(shape, np.nan)
            grid[place] = values[mine]
            self.cells[number][name] = pack(grid, "f4")

    def described(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        result = []
        for number, cells in self.cells.items():
            sample, steps = samples[number], self.places[number][1][2]
            pieces = sample.get("dense_pieces") or [f"token {token}" for token in sample["dense_tokens"]]
            result.append(
                {
                    "prompt": number,
                    "id": clipped(str(sample["id"]), 80),
                    "steps": steps,
                    "tokens": [clipped(piece, TOKEN_CHARACTERS) for piece in pieces[:steps]],
                    "cells": {name: cells[name] for name in self.wanted},
                }
            )
        return result


# --- generate ----------------------------------------------------------------------------------------------------------


def generation_view(
    table: pa.Table, info: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], share: int = 1
) -> dict[str, Any]:
    """By step and regime over all prompts; texts token by token with both models' most likely tokens."""
    columns = metric_columns(table)
    step = table["step"].to_numpy().astype(int)
    steps = int(step.max()) + 1
    stride = _stride(steps, STEP_ROWS)
    kept = list(range(0, steps, stride))
    regimes: dict[str, Any] = {}
    for regime in info["regimes"]:
        mine = np.array(pc.equal(table["regime"], regime).to_pylist()) & (step % stride == 0)
        rows = table.filter(pa.array(mine))
        group = rows["step"].to_numpy().astype(int) // stride
        stats = _group_stats(_values(rows, columns), group, len(kept))
        counts = np.bincount(group, minlength=len(kept))
        regimes[regime] = {"by_step": _stat_blobs(stats, columns), "prompts": counts.tolist()}
    return {
        "columns": columns,
        "steps": kept,
        "stride": stride,
        "regimes": regimes,
        "divergence": info.get("divergence"),
        "survival": (info.get("first_difference") or {}).get("survival"),
        "first": (info.get("first_difference") or {}).get("by_prompt"),
        "confidence": info.get("agreement_by_confidence"),
        "texts": _texts(table, samples, share),
        "prompt_count": len(samples),
    }


def _texts(table: pa.Table, samples: Sequence[Mapping[str, Any]], share: int) -> list[dict[str, Any]]:
    """Texts of the first prompts until the budget of steps is used up."""
    result: list[dict[str, Any]] = []
    used = 0
    prompts, regimes, steps = (table[name].to_pylist() for name in ("prompt", "regime", "step"))
    rows = {key: number for number, key in enumerate(zip(prompts, regimes, steps, strict=True))}
    lists = {
        name: table[name].to_pylist()
        for name in ("kl_dense_target", "top1_agree", "top_dense", "top_dense_p", "top_target", "top_target_p")
        if name in table.column_names
    }
    for sample in samples:
        if used >= TEXT_STEPS // share and result:
            break
        names = sample.get("token_texts") or {}
        text: dict[str, Any] = {
            "id": clipped(str(sample["id"]), 80),
            "prompt": clipped(sample["text"], TEXT_CHARACTERS),
            "first": sample.get("first_difference"),
        }
        for side in ("dense", "target"):
            pieces = sample.get(f"{side}_pieces")
            text[side] = None if pieces is None else [clipped(piece, TOKEN_CHARACTERS) for piece in pieces[:TEXT_STEPS]]
        used += len(text["dense"])
        for regime, short in (("free-running", "free"), ("teacher-forced", "forced")):
            text[short] = [
                None if (row := rows.get((sample["prompt"], regime, step))) is None else _step(lists, row, names)
                for step in range(len(text["dense"]))
            ]
        result.append(text)
    return result


def _step(lists: Mapping[str, Sequence[Any]], row: int, names: Mapping[str, str]) -> dict[str, Any]:
    """KL, agreement and the most likely tokens of both at one step."""
    found: dict[str, Any] = {"kl": lists["kl_dense_target"][row], "same": lists["top1_agree"][row]}
    for side in ("dense", "target"):
        if f"top_{side}" in lists:
            found[side] = [
                [clipped(names.get(str(token), f"token {token}"), 60), float(f"{p:.6g}")]
                for token, p in zip(lists[f"top_{side}"][row], lists[f"top_{side}_p"][row], strict=True)
            ]
    return found


# --- mcq ---------------------------------------------------------------------------------------------------------------


def mcq_view(
    table: pa.Table, info: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], share: int = 1
) -> dict[str, Any]:
    """A point a question; the text of those whose choice flipped; most likely tokens of some."""
    columns = metric_columns(table)
    whole, options = (table.filter(pc.equal(table["space"], space)) for space in ("global", "options"))
    stride = _stride(len(whole), POINTS)
    rows = whole.to_pylist()
    flipped = [row["question"] for row in rows if row["choice_dense"] != row["choice_target"]]
    order = np.argsort(-whole["kl_dense_target"].to_numpy(), kind="stable")
    shown = sorted({*flipped[: TOP_QUESTIONS // share], *(int(i) for i in order[: TOP_QUESTIONS // share])})
    standing = {one.number: one for one in of_questions(table, "target")}
    points = {
        name: [row[name] for row in rows[::stride]]
        for name in ("question", "margin_dense", "margin_target", "gold", "choice_dense", "choice_target")
    }
    option_values = _values(options, columns)
    return {
        "columns": columns,
        "stride": stride,
        "points": points | {"id": [clipped(str(row["id"]), 80) for row in rows[::stride]]},
        "global": {name: pack(whole[name].to_numpy().astype(float)[::stride]) for name in columns},
        "options": {name: pack(option_values[::stride, number]) for number, name in enumerate(columns)},
        "flip_count": len(flipped),
        "flips": [
            _question(rows[number], samples[number])
            | ({"place": one.place, "q": one.p} if (one := standing.get(number)) else {})
            for number in flipped[:QUESTIONS]
        ],
        "tops": [
            _question(rows[number], samples[number])
            | {
                "kl": rows[number]["kl_dense_target"],
                "loglik_dense": rows[number]["loglik_dense"],
                "loglik_target": rows[number]["loglik_target"],
                "tokens": [
                    [clipped(top["text"], 60), float(f"{top['p_dense']:.6g}"), float(f"{top['p_target']:.6g}")]
                    for top in samples[number]["top_dense"][:20]
                ],
            }
            for number in shown
        ],
        "question_count": len(rows),
    }


def _question(row: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question": row["question"],
        "id": clipped(str(row["id"]), 80),
        "subject": clipped(str(row["subject"]), 80),
        "text": clipped(sample["text"], TEXT_CHARACTERS),
        "choices": [clipped(str(choice), TOKEN_CHARACTERS) for choice in sample["choices"]],
        "letters": [text.strip() for text in sample["option_strings"]],
        **{name: row[name] for name in ("gold", "choice_dense", "choice_target", "margin_dense", "margin_target")},
    }


# --- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of a dropped checkpoint by layer, errors of a sparsified one by block and kind of matrix, checks of a healed one."""
    if record.get("command") == "sparsify":
        cells: dict[tuple[int, str], list[float]] = {}
        for row in record["modules"]:
            name = row["name"].partition("[")[0].removesuffix(".weight").rpartition(".")[2]
            if row["error"] is not None:
                cells.setdefault((row["layer"], name), []).append(row["error"])
        names = list(dict.fromkeys(name for _, name in cells))
        layers = sorted({layer for layer, _ in cells})
        grid = [[sum(found) / len(found) if (found := cells.get((i, n))) else None for i in layers] for n in names]
        return {"errors": {"names": names, "layers": layers, "values": grid}}
    if record.get("command") == "heal":
        return {"healing": [{k: row[k] for k in ("tokens", "loss", "held_out_kl")} for row in record["checks"]]}
    scores = [{k: row[k] for k in ("layer", "sublayer", "score", "dropped")} for row in record.get("scores") or []]
    return {"scores": scores}
