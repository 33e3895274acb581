"""What the page shows side by side: every model of an evaluate run on every task, and one generate run's target against another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from prunescope.report.names import short
from prunescope.report.terminal.scoring import HEADINGS, STEP_HEADINGS, remarks, score_rows, step_rows
from prunescope.runs.folder import Run
from prunescope.stats import paired

__all__ = ["generation_section", "scores_section"]

_GENERATION = ("texts", "measure", "n", "model", "against", "from", "to", "change", "95 % of it")
_REGIME = "teacher-forced"
_COLUMNS = {"kl_dense_target": "KL, nats a token", "top1_agree": "same most likely token"}
_FIRST = "steps until the texts part"


def scores_section(run: Run) -> dict[str, Any]:
    """Tables of scores and of paired differences, the cells that the terminal shows."""
    info = run.info
    names = {model: short(model) for model in info["summary"]}
    if len(set(names.values())) < len(names):
        names = {model: model for model in names}
    return {
        "folder": run.folder.name,
        "models": list(names.values()),
        "tables": [
            {
                "name": "Scores, and differences from the first model",
                "headings": HEADINGS,
                "words": 5,
                "rows": _named(score_rows(info), names),
            },
            *(
                [
                    {
                        "name": "Differences from the model before it",
                        "headings": STEP_HEADINGS,
                        "words": 3,
                        "rows": _named(rows, names),
                    }
                ]
                if (rows := step_rows(info))
                else []
            ),
        ],
        "remarks": remarks(info),
    }


def _named(rows: list[list[str]], names: dict[str, str]) -> list[list[str]]:
    return [[names.get(cell, cell) for cell in row] for row in rows]


def generation_section(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any] | None:
    """What changed from one generate run's target to the next one's, after the same prompts to the same dense model; None without two such runs.

    Everything is a mean over prompts, and the differences are paired by prompt: all of them, and each kind of prompt by itself.
    """
    rows: list[list[str]] = []
    models: list[str] = []
    last: tuple[Run, str] | None = None
    for run, name in zip(runs, names, strict=True):
        if run.command != "generate" or run.info["models"]["target"] is None or _REGIME not in run.info["regimes"]:
            continue
        if last is not None and _alike(last[0], run):
            rows += _generation_rows(last[0], run, last[1], name)
            models += [one for one in (last[1], name) if one not in models]
        last = (run, name)
    if not rows:
        return None
    return {
        "folder": "generate",
        "models": models,
        "tables": [
            {
                "name": "Generation: differences from the target before it",
                "headings": _GENERATION,
                "words": 5,
                "rows": rows,
            }
        ],
        "remarks": [
            "KL and the most likely token are read in the dense model's context; intervals are bootstrapped over prompts."
        ],
    }


def _alike(first: Run, second: Run) -> bool:
    """Whether both have the same dense texts, so that their steps can be paired."""
    texts = [[(s["prompt_tokens"], s["dense_tokens"], s["kind"]) for s in run.samples()] for run in (first, second)]
    return texts[0] == texts[1]


def _generation_rows(first: Run, second: Run, against: str, name: str) -> list[list[str]]:
    kinds = np.array([str(sample["kind"]) for sample in first.samples()])
    measured = [_by_prompt(run) for run in (first, second)]
    rows = []
    distinct = list(dict.fromkeys(kinds))
    for use in ("all", *(distinct if len(distinct) > 1 else [])):
        chosen = np.full(len(kinds), True) if use == "all" else kinds == use
        for measure in measured[0]:
            before, after = (found[measure][chosen] for found in measured)
            pair = paired(list(before), list(after))
            low, high = pair["ci95"]
            means = [f"{before.mean():.3g}", f"{after.mean():.3g}", _signed(pair["difference"])]
            cells = [use, measure, str(pair["n"]), name, against, *means, f"{_signed(low)} .. {_signed(high)}"]
            rows.append(cells)
    return rows


def _signed(value: float) -> str:
    return f"{round(value, 9) + 0.0:+.3g}"  # a difference that is rounding alone, or minus zero, reads +0


def _by_prompt(run: Run) -> dict[str, np.ndarray]:
    """Of every measure a value a prompt, in the prompts' order."""
    samples = run.samples()
    place = {sample["prompt"]: i for i, sample in enumerate(samples)}
    table = run.table()
    rows = table.filter(pc.equal(table["regime"], _REGIME))
    prompt = np.array([place[number] for number in rows["prompt"].to_pylist()])
    counts = np.bincount(prompt, minlength=len(samples)).clip(min=1)
    found = {
        label: np.bincount(prompt, rows[column].to_numpy().astype(float), len(samples)) / counts
        for column, label in _COLUMNS.items()
        if column in rows.column_names
    }
    first = [len(s["dense_tokens"]) if s.get("first_difference") is None else s["first_difference"] for s in samples]
    return found | {_FIRST: np.array(first, float)}
