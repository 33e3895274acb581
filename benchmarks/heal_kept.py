"""How much of the writing score is left without N sublayers: chosen by cosine, by KL, and healed. Drawn from the items of `evaluate`.

    python benchmarks/heal_kept.py docs/heal-kept.json --out docs/heal-kept.png

The score kept is the mean over the tasks of (score / dense score). Its 95 % interval is a bootstrap over the items, the dense model's drawn along. The file:
{"model": NAME, "rows": [{"target": "attn", "n": 4, "how": "cosine", "items": {TASK: "0110..."}}, ...]}, an item a digit, in the same order in every row; how is
dense (once), cosine, kl, healed (what kl chose) or "cosine, healed".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunescope.report.figures.style import ESTIMATE, TRUTH, style
from prunescope.stats import RESAMPLES

HALF, GOAL = 0.5, 0.9
LOOK = {"cosine": ("#888888", "s"), "kl": (TRUTH, "o"), "healed": (ESTIMATE, "D"), "cosine, healed": ("#CC79A7", "v")}
LABEL = {
    "cosine": "chosen by cosine",
    "kl": "chosen by kl",
    "healed": "by kl, healed",
    "cosine, healed": "by cosine, healed",
}
NAMES = {"attn": "attention sublayers", "mlp": "MLP sublayers", "block": "blocks"}


def kept(dense: dict[str, str], items: dict[str, str], seed: int = 0) -> tuple[float, float, float]:
    """The share of the dense score that is kept, and its interval."""
    rng = np.random.default_rng(seed)
    values, draws = [], []
    for task, base in dense.items():
        before, after = (np.array(list(text), float) for text in (base, items[task]))
        chosen = rng.integers(0, len(before), (RESAMPLES, len(before)))
        values.append(after.mean() / before.mean())
        draws.append(after[chosen].mean(1) / np.maximum(before[chosen].mean(1), 1 / len(before)))
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row but the dense one, with what it keeps; a line each is printed."""
    dense = next(row["items"] for row in rows if row["how"] == "dense")
    found = []
    for row in sorted((row for row in rows if row["how"] != "dense"), key=lambda row: (row["target"], row["n"])):
        value, low, high = kept(dense, row["items"])
        found.append(row | {"kept": value, "interval": (low, high)})
        scores = ", ".join(
            f"{task} {100 * items.count('1') / len(items):.1f} %" for task, items in row["items"].items()
        )
        print(f"{row['target']} {row['n']} {row['how']:7} keeps {100 * value:.1f} % ({100 * low:.0f} to {100 * high:.0f}): {scores}")  # fmt: skip
    for target in dict.fromkeys(row["target"] for row in found):
        its = [row for row in found if row["target"] == target]
        lost = min((row["n"] for row in its if row["how"] == "cosine" and row["kept"] <= HALF), default=None)
        if lost is None:
            print(f"{target}: cosine has not lost half of the score at any n")
            continue
        there = (f"{row['how']} {100 * row['kept']:.1f} %" for row in its if row["n"] == lost)
        print(f"{target}: cosine has lost half at n = {lost}: {', '.join(there)}")
    return found


def draw(rows: list[dict[str, Any]], model: str, file: Path) -> None:
    """A panel a target; a curve a way to choose, over n."""
    targets = [target for target in NAMES if any(row["target"] == target for row in rows)]
    with style():
        figure = Figure(figsize=(2.2 * len(targets) + 1.0, 2.8), layout="constrained")
        panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for target, axes in zip(targets, panels, strict=True):
            for level in (HALF, GOAL):
                axes.axhline(level, color="0.6", linewidth=0.8, linestyle=":", zorder=1)
            for shift, (how, (colour, mark)) in zip((-0.08, 0.0, 0.08, 0.16), LOOK.items(), strict=True):
                its = [row for row in rows if (row["target"], row["how"]) == (target, how)]
                if not its:
                    continue
                if "healed" not in how:  # without any dropped there is the dense model
                    its.insert(0, {"n": -shift, "kept": 1.0, "interval": (1.0, 1.0)})
                n, value = ([row[name] for row in its] for name in ("n", "kept"))
                reach = [[row["kept"] - row["interval"][0] for row in its], [row["interval"][1] - row["kept"] for row in its]]  # fmt: skip
                handles[how] = axes.errorbar(
                    [x + shift for x in n], value, np.maximum(reach, 0), color=colour, marker=mark, markersize=4, elinewidth=0.7, capsize=1.5,
                )  # fmt: skip
            axes.set(xlabel=f"{NAMES[target]} dropped")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("writing score kept")
        panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.suptitle(model)
        figure.legend(
            list(handles.values()), [LABEL[how] for how in handles], loc="outside lower center", ncols=len(handles)
        )
        figure.savefig(file, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = json.loads(options.file.read_text("utf-8"))
    draw(measured(data["rows"]), data["model"], options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
