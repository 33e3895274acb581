"""What `prunescope.json` says of a checkpoint that `sparsify` wrote."""

from __future__ import annotations

import time
from typing import Any

from prunescope.data.calibration import Calibration
from prunescope.models.blockwise import StreamedModel
from prunescope.prune.blocks import Pruned
from prunescope.prune.plan import RESHAPING, PruningPlan
from prunescope.runs.provenance import device_name, versions

__all__ = ["WHOLE", "sparsify_record"]

WHOLE = {"structured": "neurons", "experts": "experts"}  # what these methods remove


def sparsify_record(
    asked: str | float | None,
    config: dict[str, Any],
    streamed: StreamedModel,
    plan: PruningPlan,
    calibration: Calibration | None,
    pruned: Pruned,
    key: str,
    started: float,
) -> dict[str, Any]:
    loaded = streamed.loaded
    before = loaded.record or {}
    earlier = list(before.get("pruned_before", []))
    if before.get("command") == "sparsify":
        earlier.append({name: before.get(name) for name in ("base", "method", "asked", "sparsity")})
    return {
        "schema_version": 1,
        "command": "sparsify",
        "format": before.get("format", "sparsified"),
        "base": loaded.identity,
        "architecture": type(loaded.model).__name__,
        "dense_layers": loaded.dense_layers,
        "kept_layers": list(loaded.layer_map),
        "drop_attn_list": before.get("drop_attn_list", []),
        "drop_mlp_list": before.get("drop_mlp_list", []),
        "pruned_before": earlier,
        "method": plan.method,
        "asked": asked,
        "sparsity": _overall(plan, pruned.rows),
        "perplexity": pruned.perplexity or None,
        "calibration": None if calibration is None else calibration.describe(),
        "config_changes": pruned.config,
        "modules": pruned.rows,
        "config": config,
        "key": key,
        "versions": versions(),
        "device": device_name(streamed.device),
        "wall_time_s": round(time.monotonic() - started, 3),
    }


def _overall(plan: PruningPlan, rows: list[dict[str, Any]]) -> float:
    """Share of zero weights in the pruned matrices, of neurons or experts that were removed."""
    if plan.method in RESHAPING:
        return float(sum(row["removed"] for row in rows) / sum(row[WHOLE[plan.method]] for row in rows))
    return float(sum(row["zeros"] for row in rows) / sum(row["outputs"] * row["inputs"] for row in rows))
