"""What the page shows of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunescope.report.figures.sweep import draw_sweep
from prunescope.report.names import short
from prunescope.report.page.pictures import images
from prunescope.report.sweep_means import KINDS, Rows, mean_over_tasks, of_kind
from prunescope.runs.folder import Run

__all__ = ["sweep_section"]


def sweep_section(run: Run) -> dict[str, Any]:
    """What the page shows of a sweep, finished or not."""
    info = run.info
    rows: Rows = run.table().to_pylist()
    says = [row for row in rows if row["informative"]] or rows
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in says)]
    name = short(info["config"]["model"])
    return {
        "model": name,
        "folder": run.folder.name,
        "complete": info["complete"],
        "done": len(info["points_done"]),
        "asked": len(info["points_asked"]),
        "kinds": kinds,
        "left_out": list(dict.fromkeys(row["task"] for row in rows if not row["informative"])),
        "rows": [
            _shown(point, [row for row in says if row["point"] == point], kinds, info["summary"])
            for point in _points(rows)
        ],
        "images": images(run, name, lambda folder: _draw(run, folder)),
        "predicts": [
            (outcome, ", ".join(f"{row['column']} {row['spearman']:+.3f}" for row in best))
            for outcome, best in info["summary"]["predicts"].items()
        ],
    }


def _draw(run: Run, folder: Path) -> list[Path]:
    return draw_sweep(run.table(), run.table("metrics"), run.table("correlations"), run.info, folder)


def _points(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["point"] for row in rows))


def _shown(point: str, rows: Rows, kinds: Sequence[str], summary: Mapping[str, Any]) -> dict[str, Any]:
    size, kl = rows[0].get("bytes"), summary.get("kl", {}).get(point)
    found: dict[str, Any] = {
        "point": point,
        "removed": rows[0]["weights_removed"],
        "size": "-" if size is None else f"{size / 1e6:.1f}",
        "kl": "-" if kl is None else f"{kl:.3g}",
        "like": summary.get("like", {}).get(point, ""),
    }
    for kind in kinds:
        means = {column: mean_over_tasks(of_kind(rows, kind, False), column) for column in ("score", "kept")}
        found[kind] = {column: "-" if mean is None else f"{mean[0]:.3f}" for column, mean in means.items()}
    return found
