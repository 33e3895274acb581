"""Worst first: passages and single tokens where two models differ most, in the form that the page shows, of `divergence` and `generate` runs alike.

A passage here is what `compare.divergence_summary.worst_passages` keeps: its place, what stands before it, and its tokens with both models' most
likely ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, sqrt
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prunescope.report.names import short
from prunescope.report.page.payload import TOKEN_CHARACTERS, clipped
from prunescope.runs.recovery import place_of
from prunescope.stats import worst_windows

__all__ = ["generation_passages", "shown", "worst_of_generation", "worst_of_passages"]

PASSAGES, PASSAGE = 10, 8  # of a generate run, and the tokens of one
TOKENS = 300  # of all generate runs together, in each class of confidence
EDGES = (0.5, 0.9)  # between the classes of the dense model's confidence
_TOP_CHARACTERS, _BEFORE_CHARACTERS, _NEAR_CHARACTERS = 60, 800, 60
_REGIME = "teacher-forced"
_TOPS = ("top_dense", "top_dense_p", "top_target", "top_target_p")


def shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """A passage as the template shows it."""
    largest = max(token["kl_dense_target"] for token in found["tokens"]) or 1.0
    before = found["before"]
    return {
        "where": f"{clipped(short(found['slice']), _TOP_CHARACTERS)}, "
        + (
            f"chunk {found['chunk']} from token {found['position']}"
            if "chunk" in found
            else f"from step {found['position']}"
        ),
        "kl": found["kl_dense_target"],
        "before": before if len(before) <= _BEFORE_CHARACTERS else f"…{before[-_BEFORE_CHARACTERS:]}",
        "text": clipped(_visible(found["text"]), _TOP_CHARACTERS),
        "tokens": [
            {
                "text": clipped(_visible(token["text"]), TOKEN_CHARACTERS),
                "kl": token["kl_dense_target"],
                "dp": token["dp"],
                "fork": token.get("fork", False),
                "strength": round(0.5 * sqrt(max(0.0, token["kl_dense_target"]) / largest), 3),
                **{
                    side: [
                        {"text": clipped(_visible(top["text"]), _TOP_CHARACTERS), "p": top["p"]}
                        for top in token[f"top_{side}"]
                    ]
                    for side in ("dense", "target")
                },
            }
            for token in found["tokens"]
        ],
    }


def worst_of_passages(passages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tokens of the passages of a divergence run, the largest KL first."""
    found = []
    for passage in passages:
        before = passage["before"]
        for number, token in enumerate(passage["tokens"]):
            where = f"chunk {passage['chunk']}, token {passage['position'] + number}"
            found.append(_entry(token, before, clipped(short(passage["slice"]), _TOP_CHARACTERS), where))
            before += token["text"]
    return sorted(found, key=lambda one: -one["kl"])


# --- generate ----------------------------------------------------------------------------------------------------------


def generation_passages(table: pa.Table, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The passages of the dense model's texts whose mean KL is largest, of a generate run with the teacher-forced regime."""
    rows = _rows(table)
    if rows is None:
        return []
    prompt = rows["prompt"].to_numpy()
    length = min(PASSAGE, int(np.bincount(prompt).max()))
    starts = worst_windows(rows["kl_dense_target"].to_numpy(), prompt, length, PASSAGES)
    return [shown(_passage(rows.slice(start, length).to_pylist(), samples)) for start in starts]


def worst_of_generation(table: pa.Table, samples: Sequence[Mapping[str, Any]], share: int) -> list[dict[str, Any]]:
    """The tokens of the largest KL in each class of the dense model's confidence, and every token at which two texts part; the largest KL first.

    Args:
        share: how many generate runs the page has; each gets this part of the budget.
    """
    rows = _rows(table)
    if rows is None:
        return []
    kl, steps, prompts = (rows[name].to_numpy() for name in ("kl_dense_target", "step", "prompt"))
    confidence = np.array([p[0] for p in rows["top_dense_p"].to_pylist()])
    first = [-1 if (step := sample.get("first_difference")) is None else step for sample in samples]
    keep = np.array(first)[prompts] == steps
    classes = np.searchsorted(EDGES, confidence, side="right")
    order = np.argsort(-kl, kind="stable")
    for one in range(len(EDGES) + 1):
        keep[order[classes[order] == one][: max(1, TOKENS // share)]] = True
    found = []
    for row in rows.take(pa.array(order[keep[order]])).to_pylist():
        sample = samples[row["prompt"]]
        before = sample["text"] + "\n" + "".join(sample["dense_pieces"][max(0, row["step"] - 24) : row["step"]])
        entry = _entry(
            _token(row, sample),
            before,
            str(sample.get("kind") or "prompt"),
            f"{clipped(str(sample['id']), 80)}, step {row['step']}",
        )
        found.append(entry | {"prompt": row["prompt"], "step": row["step"]})
    return found


def _rows(table: pa.Table) -> pa.Table | None:
    """The teacher-forced rows, in the order of prompts and steps; None of a run without them, or made before most likely tokens were kept."""
    if not set(_TOPS) <= set(table.column_names):
        return None
    rows = table.filter(pc.equal(table["regime"], _REGIME)).sort_by([("prompt", "ascending"), ("step", "ascending")])
    return rows if len(rows) else None


def _passage(rows: list[dict[str, Any]], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sample, start = samples[rows[0]["prompt"]], rows[0]["step"]
    pieces = sample["dense_pieces"]
    return {
        "slice": f"prompt {sample['id']}",
        "position": start,
        "kl_dense_target": float(np.mean([row["kl_dense_target"] for row in rows])),
        "before": sample["text"] + "\n" + "".join(pieces[:start]),
        "text": "".join(pieces[start : start + len(rows)]),
        "tokens": [_token(row, sample) for row in rows],
    }


def _token(row: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    names = sample.get("token_texts") or {}
    q = exp(-row["nll_target"])
    return {
        "text": sample["dense_pieces"][row["step"]],
        "kl_dense_target": row["kl_dense_target"],
        "dp": q - exp(-row["nll_dense"]),
        "fork": sample.get("first_difference") == row["step"],
        "place": place_of(row),
        "q": q,
        **{
            f"top_{side}": [
                {"text": names.get(str(token), f"token {token}"), "p": p}
                for token, p in zip(row[f"top_{side}"], row[f"top_{side}_p"], strict=True)
            ]
            for side in ("dense", "target")
        },
    }


def _entry(token: Mapping[str, Any], before: str, kind: str, where: str) -> dict[str, Any]:
    """A token as the script lists it."""
    found = {
        "text": clipped(token["text"], _TOP_CHARACTERS),
        "before": before[-_NEAR_CHARACTERS:],
        "kl": token["kl_dense_target"],
        "dp": token["dp"],
        "confidence": token["top_dense"][0]["p"],
        "same": token["top_dense"][0]["text"] == token["top_target"][0]["text"],
        "kind": kind,
        "where": where,
        "fork": token.get("fork", False),
        **{
            side: [[clipped(top["text"], _TOP_CHARACTERS), float(f"{top['p']:.6g}")] for top in token[f"top_{side}"]]
            for side in ("dense", "target")
        },
    }
    return found | {key: token[key] for key in ("place", "q") if key in token}


def _visible(text: str) -> str:
    """Blanks and ends of lines as signs, as the rest of the page shows single tokens."""
    return text.translate({ord(" "): "\u2423", ord("\n"): "\u21b5", ord("\t"): "\u21e5"}) or "(empty)"
