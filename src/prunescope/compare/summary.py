"""What the rows of a generate or mcq run say over all prompts or questions. Reads tables and token ids only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prunescope.compare.metrics import SPACES
from prunescope.compare.texts import degeneration, first_difference, survival, text_columns
from prunescope.runs.recovery import of_forks, of_questions, recovery
from prunescope.runs.summary import summarise
from prunescope.stats import mcnemar, wilson

__all__ = [
    "by_confidence",
    "calibration",
    "divergence_parts",
    "generation_summary",
    "layerwise_summary",
    "mcq_summary",
]

_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99, 1.0)  # of the dense model's confidence


def by_confidence(rows: pa.Table) -> list[dict[str, Any]]:
    """Share of steps at which both models find the same token most likely, by the probability that the dense model gives its own.

    Bins are [from, to), the last one closed. The interval takes steps for independent, which those of one text are not quite.
    """
    confidence, agree = rows["confidence_dense"].to_numpy(), rows["top1_agree"].to_numpy()
    bins = np.clip(np.searchsorted(_EDGES, confidence, side="right") - 1, 0, len(_EDGES) - 2)
    result = []
    for number, (low, high) in enumerate(pairwise(_EDGES)):
        count, same = int((bins == number).sum()), int(agree[bins == number].sum())
        share = same / count if count else None
        result.append({"from": low, "to": high, "steps": count, "agreement": share, "ci95": wilson(same, count)})
    return result


def divergence_parts(table: pa.Table, column: str = "kl_dense_target") -> list[dict[str, Any]]:
    """By step, over the prompts that have both regimes at that step: ``total`` (free-running), its ``local`` part (teacher-forced: the
    error in the dense context) and its ``history`` part, which is the rest (the paper, Eq. 67). Means; history may be negative."""
    keys = ["prompt", "step"]
    free, forced = (
        table.filter(pc.equal(table["regime"], regime)).select([*keys, column]).rename_columns([*keys, name])
        for regime, name in (("free-running", "total"), ("teacher-forced", "local"))
    )
    joined = free.join(forced, keys=keys, join_type="inner")
    means = (
        joined.group_by("step").aggregate([("total", "mean"), ("local", "mean"), ("total", "count")]).sort_by("step")
    )
    return [
        {
            "step": row["step"],
            "prompts": row["total_count"],
            "total": row["total_mean"],
            "local": row["local_mean"],
            "history": row["total_mean"] - row["local_mean"],
        }
        for row in means.to_pylist()
    ]


def generation_summary(
    table: pa.Table,
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]] | None,
    ends: tuple[Sequence[int], Sequence[int]],
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """The parts of run.json that say what was found.

    Args:
        table: rows of `generation_rows`.
        ours, theirs: texts of the dense and of the target model, as token ids; None where the target wrote none.
        ends: ids that end a text, of the dense and of the target model.
        steps: steps that a text may have.
        seed: of the bootstrap.
    """
    regimes = [name for name in ("free-running", "teacher-forced") if pc.any(pc.equal(table["regime"], name)).as_py()]
    per_regime = {name: summarise(table.filter(pc.equal(table["regime"], name)), SPACES, seed=seed) for name in regimes}
    found: dict[str, Any] = {
        "regimes": regimes,
        "summary_rows": f"{regimes[0]} steps",
        "summary": per_regime[regimes[0]],
        "summary_by_regime": per_regime,
    }
    if "teacher-forced" in regimes:
        found["agreement_by_confidence"] = by_confidence(table.filter(pc.equal(table["regime"], "teacher-forced")))
    if len(regimes) == 2:
        parts = divergence_parts(table)
        weights = sum(row["prompts"] for row in parts)
        found["divergence"] = {
            "column": "kl_dense_target",
            **{
                name: sum(row[name] * row["prompts"] for row in parts) / weights
                for name in ("total", "local", "history")
            },
            "by_step": parts,
        }
    if theirs is not None:
        first = [first_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
        known = [step for step in first if step is not None]
        texts = {
            side: [text_columns(text, end) for text in written]
            for side, written, end in (("dense", ours, ends[0]), ("target", theirs, ends[1]))
        }
        ratios = [
            b["tokens"] / a["tokens"] for a, b in zip(texts["dense"], texts["target"], strict=True) if a["tokens"]
        ]
        found["first_difference"] = {
            "by_prompt": first,
            "same_texts": sum(step is None for step in first),
            "median": float(np.median(known)) if known else None,
            "survival": survival(first, steps),
            "dense_token": recovery(of_forks(table, first)),
        }
        found["texts"] = {
            **{side: degeneration(columns) for side, columns in texts.items()},
            "length_ratio": fmean(ratios) if ratios else None,
            "by_prompt": texts,
        }
    return found


# --- layerwise ---------------------------------------------------------------------------------------------------------


def layerwise_summary(table: pa.Table, seed: int) -> dict[str, Any]:
    """The parts of run.json that say what was found: the layers that the target changes, and the columns over those, by kind of sublayer.

    Args:
        table: rows of `layerwise_rows`.
        seed: of the bootstrap.
    """
    changed, per_kind = {}, {}
    for kind in ("attn", "mlp"):
        rows = table.filter(pc.equal(table["sublayer"], kind))
        moved = rows.filter(pc.or_(pc.not_equal(rows["h_orth_rel"], 0.0), pc.not_equal(rows["h_para_rel"], 0.0)))
        changed[kind] = sorted(pc.unique(moved["layer"]).to_pylist())
        per_kind[kind] = summarise(rows.filter(pc.is_in(rows["layer"], moved["layer"])), SPACES, seed=seed)
    masks = [
        pc.and_(pc.equal(table["sublayer"], kind), pc.is_in(table["layer"], pa.array(layers, pa.int32())))
        for kind, layers in changed.items()
    ]
    any_changed = any(changed.values())
    rows = table.filter(pc.or_(*masks)) if any_changed else table
    return {
        "changed_layers": changed,
        "summary_rows": "sublayers that the target changes" if any_changed else "all, the target changes none",
        "summary": summarise(rows, SPACES, seed=seed),
        "summary_by_sublayer": per_kind,
    }


# --- multiple choice ---------------------------------------------------------------------------------------------------


def calibration(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> dict[str, Any]:
    """Expected calibration error over bins of equal width, and the bins: mean confidence and accuracy in each."""
    sure, hit = np.asarray(confidence, float), np.asarray(right, float)
    number = np.clip((sure * bins).astype(int), 0, bins - 1)
    rows: list[dict[str, Any]] = []
    error = 0.0
    for i in range(bins):
        inside = number == i
        count = int(inside.sum())
        row: dict[str, Any] = {
            "from": i / bins,
            "to": (i + 1) / bins,
            "questions": count,
            "confidence": None,
            "accuracy": None,
        }
        if count:
            row |= {"confidence": float(sure[inside].mean()), "accuracy": float(hit[inside].mean())}
            error += abs(row["confidence"] - row["accuracy"]) * count
        rows.append(row)
    return {"ece": error / len(hit), "bins": rows}


def mcq_summary(table: pa.Table, seed: int) -> dict[str, Any]:
    """The parts of run.json that say what was found: accuracies, flips, calibration, and the columns of both spaces.

    Args:
        table: rows of `mcq_rows`.
        seed: of the bootstrap over questions.
    """
    named = table.rename_columns(["prompt" if name == "question" else name for name in table.column_names])
    spaces = {
        space: summarise(named.filter(pc.equal(named["space"], space)), SPACES, seed=seed)
        for space in ("global", "options")
    }
    rows = table.filter(pc.equal(table["space"], "global"))
    gold = rows["gold"].to_numpy()
    choice = {side: rows[f"choice_{side}"].to_numpy() for side in ("dense", "target")}
    right = {side: choice[side] == gold for side in choice}
    subjects = rows["subject"].to_numpy(zero_copy_only=False)
    changed = choice["dense"] != choice["target"]
    lost, won = int((right["dense"] & ~right["target"]).sum()), int((~right["dense"] & right["target"]).sum())
    turned = {int(number) for number in rows["question"].to_numpy()[right["dense"] & ~right["target"]]}
    standing = {side: of_questions(table, side) for side in ("dense", "target")}
    return {
        "summary": spaces["global"],
        "summary_by_space": spaces,
        "right_token": {
            **{side: recovery(found) for side, found in standing.items()},
            "right_to_wrong": recovery([one for one in standing["target"] if one.number in turned]),
        },
        "accuracy": {side: _accuracy(hit) for side, hit in right.items()},
        "chance": float(np.mean([1 / len(scores) for scores in rows["loglik_dense"].to_pylist()])),
        "accuracy_by_subject": {
            str(name): {side: _accuracy(hit[subjects == name]) for side, hit in right.items()}
            for name in dict.fromkeys(subjects)
        },
        "flips": {
            "right_to_wrong": lost,
            "wrong_to_right": won,
            "wrong_to_wrong": int((changed & ~right["dense"] & ~right["target"]).sum()),
            "mcnemar_p": mcnemar(lost, won),
            "questions": [int(i) for i in rows["question"].to_numpy()[changed]],
        },
        "agreement": {"same_choice": float((~changed).mean()), "ci95": wilson(int((~changed).sum()), len(gold))},
        "calibration": {side: calibration(rows[f"option_confidence_{side}"].to_numpy(), right[side]) for side in right},
        "scored_by_sequence": int(pc.sum(pc.equal(rows["scoring"], "sequence")).as_py()),
    }


def _accuracy(right: np.ndarray) -> dict[str, Any]:
    return {"accuracy": float(right.mean()), "ci95": wilson(int(right.sum()), len(right)), "questions": len(right)}
