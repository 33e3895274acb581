"""What the page shows of an evaluate run: every model on every task, side by side."""

from __future__ import annotations

from typing import Any

from prunescope.report.names import short
from prunescope.report.terminal.scoring import HEADINGS, STEP_HEADINGS, remarks, score_rows, step_rows
from prunescope.runs.folder import Run

__all__ = ["scores_section"]


def scores_section(run: Run) -> dict[str, Any]:
    """Tables of scores and of paired differences, the cells that the terminal shows."""
    info = run.info
    models = [short(model) for model in info["summary"]]
    return {
        "folder": run.folder.name,
        "models": models,
        "tables": [
            {"name": "Scores, and differences from the first model", "headings": HEADINGS, "rows": score_rows(info)},
            *(
                [{"name": "Differences from the model before it", "headings": STEP_HEADINGS, "rows": rows}]
                if (rows := step_rows(info))
                else []
            ),
        ],
        "remarks": remarks(info),
    }
