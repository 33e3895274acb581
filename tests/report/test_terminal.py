"""What is printed fits a terminal of 80 columns, and no name is broken."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from prunescope.report.terminal.scoring import show_scores_of_tasks
from prunescope.tasks import quick


def printed(info: dict[str, Any]) -> str:
    out = io.StringIO()
    show_scores_of_tasks(info, Console(file=out, width=80, force_terminal=False))
    return out.getvalue()


def test_scores_of_tasks() -> None:
    """Would catch a column more, or a longer name of a built-in task, that pushes the table over the edge."""
    models, tasks = ["a/model-of-some-name", "drop:attn=1,2", "./healed"], list(quick.QUICK)
    entry = {"kind": "generative", "metric": "exact_match", "n": 100, "value": 0.5, "ci95": [0.4, 0.6], "chance": 0.25}
    pair = {"difference": -0.123, "ci95": [-0.2, 0.05], "right_to_wrong": 100, "wrong_to_right": 99, "mcnemar_p": 1e-9}
    info = {
        "summary": {model: dict.fromkeys(tasks, entry) for model in models},
        "paired": {model: dict.fromkeys(tasks, pair) for model in models[1:]},
        "paired_with_previous": {models[2]: dict.fromkeys(tasks, pair)},
        **{"pairs": [], "says_nothing": {}},
    }
    text = printed(info)
    assert max(map(len, text.splitlines())) <= 80
    for task in tasks:
        assert sum(line.split()[:1] == [task] for line in text.splitlines()) == 2, task  # in both tables
