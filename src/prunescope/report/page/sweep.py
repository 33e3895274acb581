"""What the page shows of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from prunescope.report.figures.sweep import draw_sweep
from prunescope.report.names import short
from prunescope.report.page.pictures import images
from prunescope.report.sweep_means import KINDS, Rows, mean_over_tasks, of_kind
from prunescope.runs.folder import Run

__all__ = ["sweep_section"]

_RETRIEVED = "#009E73"
_WORDS = {"generative": "writing", "choice": "choosing"}


def sweep_section(run: Run, searched: Sequence[Run] = ()) -> dict[str, Any]:
    """What the page shows of a sweep, finished or not.

    Args:
        searched: the page's runs of `retrieve`; those of a model that a point of the sweep made say what is kept of retrieving there.
    """
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
        "series": _series(rows, says, kinds, found := _retrieved(run, rows, searched)),
        "retrieved": bool(found),
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


def _series(rows: Rows, says: Rows, kinds: Sequence[str], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every series as a slider goes through it: the dense model, then its points by what they remove or save; with what each use keeps."""
    names = [name for name in dict.fromkeys(row["series"] for row in rows) if name != "dense"]
    by_name = {point: next(row for row in rows if row["point"] == point) for point in _points(rows)}
    series = []
    for name in names:
        mine = [row for row in by_name.values() if row["series"] in ("dense", name)]
        mine.sort(key=lambda row: (row["series"] != "dense", row["weights_removed"], -(row.get("bytes") or 0)))
        points = [_point(row, [one for one in says if one["point"] == row["point"]], kinds, found) for row in mine]
        if all(point["uses"] for point in points):
            series.append({"name": name, "points": points})
    return series


def _point(row: Mapping[str, Any], rows: Rows, kinds: Sequence[str], found: Mapping[str, Any]) -> dict[str, Any]:
    size = "" if row.get("bytes") is None else f", {row['bytes'] / 1e6:.1f} MB"
    uses = []
    for kind in kinds:
        if (mean := mean_over_tasks(of_kind(rows, kind, False), "kept")) is not None:
            uses.append({"name": _WORDS[kind], "colour": KINDS[kind][0], **_kept(*mean)})
    if (kept := found.get(row["point"])) is not None:
        uses.append({"name": "retrieving", "colour": _RETRIEVED, **_kept(*kept)})
    return {
        "point": row["point"],
        "words": f"{100 * row['weights_removed']:.1f} % of the weights removed{size}",
        "uses": uses,
    }


def _kept(mean: float, low: float | None, high: float | None) -> dict[str, float | None]:
    known = low is not None and high is not None and isfinite(low + high)
    return {"kept": mean, "low": low if known else None, "high": high if known else None}


def _retrieved(run: Run, rows: Rows, searched: Sequence[Run]) -> dict[str, tuple[float, float | None, float | None]]:
    """Point -> share kept of nDCG@10 with its interval, where a retrieve run has the model of the point: the same sublayers dropped, no more."""
    source = run.info["models"]["dense"]["source"]
    points = {row["dropped"]: row["point"] for row in rows if row["series"] != "dense" and _only_dropped(row)}
    found: dict[str, tuple[float, float | None, float | None]] = {}
    for one in searched:
        target, measure = one.info["models"]["target"], one.info["measures"]["ndcg_10"]
        lists = ((kind, target.get(f"drop_{kind}_list")) for kind in ("attn", "mlp"))
        spec = ";".join(f"{kind}={','.join(map(str, layers))}" for kind, layers in lists if layers)
        if target["source"] == source and spec in points and measure["dense"]:
            low, high = (None if end is None else 1 + end / measure["dense"] for end in measure["diff_ci95"])
            found[points[spec]] = measure["target"] / measure["dense"], low, high
            found["dense"] = 1.0, None, None
    return found


def _only_dropped(row: Mapping[str, Any]) -> bool:
    return bool(row["dropped"]) and not (row["method"] or row.get("quant"))


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
