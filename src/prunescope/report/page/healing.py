"""Dense, pruned and healed beside each other, a row a measure, for every healed checkpoint of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prunescope.report.names import short
from prunescope.report.page.compared import Checkpoint, short_name
from prunescope.runs.folder import Run

__all__ = ["healings"]

_ITSELF = {"h_cos": 1, "z_cos": 1, "p_cos": 1, "kl": 0, "KL": 0, "js": 0, "top1_agree": 1, "same": 1, "share": 1}


def healings(
    checkpoints: Sequence[Checkpoint], targets: Sequence[Mapping[str, Any]], evaluated: Sequence[Run]
) -> list[dict[str, Any]]:
    """Every healed checkpoint with what it was pruned to and healed from.

    Args:
        checkpoints: of the page.
        targets: of the page, with ``name`` and ``values``; those named as the two checkpoints are taken.
        evaluated: its evaluate runs; those that have both models are taken.
    """
    found = []
    for one in checkpoints:
        if one.record["command"] != "heal":
            continue
        pruned, healed = short_name(str(one.record["config"]["target"])), one.folder.name
        kl = one.record["kl"]
        rows = [("KL on the held-out text, nats a token", "0", *(f"{kl[key]:.4g}" for key in ("before", "written")))]
        values = {target["name"]: target["values"] for target in targets}
        rows += _measured(values.get(pruned, {}), values.get(healed, {}))
        for run in evaluated:
            rows += _scored(run, pruned, healed)
        found.append({"name": healed, "pruned": pruned, "rows": rows})
    return found


def _measured(pruned: Mapping[str, Any], healed: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Measures that both targets have. The dense model's own value is that of a run, or what a model has against itself."""
    for name, after in healed.items():
        before, own = pruned.get(name), healed.get(f"{name}, dense")
        if before is None or after is None or name.endswith(", dense"):
            continue
        if own is None:
            own = next((value for start, value in _ITSELF.items() if name.startswith(start)), None)
        yield name, "-" if own is None else f"{own:.4g}", f"{before:.4g}", f"{after:.4g}"


def _scored(run: Run, pruned: str, healed: str) -> Iterator[tuple[str, ...]]:
    summary = run.info["summary"]
    named = {short(model): model for model in summary}
    if not {pruned, healed} <= set(named):
        return
    dense = next(iter(summary))
    for task, scores in summary[dense].items():
        found = (scores, summary[named[pruned]][task], summary[named[healed]][task])
        yield f"{task}, {scores['metric']} ({run.folder.name})", *(f"{one['value']:.3f}" for one in found)
