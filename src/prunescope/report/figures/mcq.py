"""Figures of mcq runs: the most likely tokens and the options of one question (paper Fig. 8), margins before and after.

As SVG and PNG, from run folders alone. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.figure import Figure

from prunescope.report.figures.style import FLOOR, drawable, save, style
from prunescope.report.names import short

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["draw_mcq"]

DENSE, TARGET = "#0072B2", "#D55E00"
_FATES = (  # right before, right after
    (True, True, "right in both", "#009E73", "o"),
    (True, False, "right to wrong", "#D55E00", "v"),
    (False, True, "wrong to right", "#0072B2", "^"),
    (False, False, "wrong in both", "#999999", "x"),
)
_TOKENS = 30


def draw_mcq(
    table: pa.Table, info: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path
) -> list[Path]:
    """Draw paper Fig. 8 for the question of the median KL, and the margins of all, into ``folder``; returns what was written."""
    with style():
        shown = samples[_median_question(table)]
        written = save(_tokens_and_options(table, shown, info), folder / "fig08_tokens_and_options")
        written += save(_margins(table, info), folder / "margins")
        written += save(_spaces(table, info), folder / "fig08_global_and_options")
    return written


def _tokens_and_options(table: pa.Table, sample: Mapping[str, Any], info: Mapping[str, Any]) -> Figure:
    """Paper Fig. 8: probabilities of the dense model's most likely tokens, and of the options among themselves, under both models."""
    figure = Figure(figsize=(7.8, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.1))
    top = sample["top_dense"][:_TOKENS]
    places = np.arange(len(top))
    for shift, side, colour in ((-0.2, "dense", DENSE), (0.2, "target", TARGET)):
        left.bar(places + shift, [row[f"p_{side}"] for row in top], 0.4, color=colour, label=side)
    left.set_xticks(
        places, [_token(row["text"]) for row in top], rotation=90, fontsize=6, family="monospace", parse_math=False
    )
    left.set(yscale="log", ylabel="probability", title=f"the dense model's {len(top)} most likely tokens")
    rows = {row["space"]: row for row in table.filter(pc.equal(table["question"], sample["question"])).to_pylist()}
    letters = [text.strip() for text in sample["option_strings"]]
    places = np.arange(len(letters))
    for shift, side, colour in ((-0.2, "dense", DENSE), (0.2, "target", TARGET)):
        scores = np.array(rows["options"][f"loglik_{side}"])
        p = np.exp(scores - scores.max())
        right.bar(places + shift, p / p.sum(), 0.4, color=colour, label=side)
    marks = [f"{x}\n(right)" if i == sample["gold"] else x for i, x in enumerate(letters)]
    right.set_xticks(places, marks)
    right.set(ylim=(0, 1), ylabel="probability among the options", title="the options")
    kl = {space: row["kl_dense_target"] for space, row in rows.items()}
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(
        f"{_title(info)}\nquestion {drawable(str(sample['id']))}: KL {kl['global']:.3g} over the vocabulary, {kl['options']:.3g} over the options"
    )
    return figure


def _margins(table: pa.Table, info: Mapping[str, Any]) -> Figure:
    """Log-likelihood of the right option less the best other one, before and after; above zero is answered right."""
    rows = table.filter(pc.equal(table["space"], "global"))
    x, y = (rows[f"margin_{side}"].to_numpy() for side in ("dense", "target"))
    gold = rows["gold"].to_numpy()
    before, after = (rows[f"choice_{side}"].to_numpy() == gold for side in ("dense", "target"))
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for was, now, label, colour, marker in _FATES:
        chosen = (before == was) & (after == now)
        axes.scatter(
            x[chosen], y[chosen], 14, color=colour, marker=marker, linewidths=0.8, label=f"{label}: {int(chosen.sum())}"
        )
    reach = 1.05 * max(float(np.abs(np.concatenate([x, y])).max()), 1e-3)
    axes.plot([-reach, reach], [-reach, reach], color=FLOOR, linewidth=0.6, linestyle=":")
    axes.axhline(0, color=FLOOR, linewidth=0.6)
    axes.axvline(0, color=FLOOR, linewidth=0.6)
    axes.set(
        xlim=(-reach, reach),
        ylim=(-reach, reach),
        xlabel="margin, dense (nats)",
        ylabel="margin, target (nats)",
        aspect="equal",
    )
    axes.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(0, 1))
    first, second = _title(info).split("; ", 1)
    figure.suptitle(f"{first}\n{second}\nmargin of the right option over the best other", fontsize=8)
    return figure


def _spaces(table: pa.Table, info: Mapping[str, Any]) -> Figure:
    """KL and cosines of all questions, the whole vocabulary beside the options."""
    figure = Figure(figsize=(7.8, 2.9), layout="constrained")
    grid = figure.subplots(1, 3)
    for axes, (column, name) in zip(
        grid, (("z_cos", "cosine of z"), ("p_cos", "cosine of p"), ("kl_dense_target", "KL(p || q), nats")), strict=True
    ):
        found = [table.filter(pc.equal(table["space"], space))[column].to_numpy() for space in ("global", "options")]
        parts = axes.boxplot(
            found,
            widths=0.5,
            showfliers=True,
            patch_artist=True,
            flierprops={"markersize": 2},
            medianprops={"color": "black"},
        )
        for box, colour in zip(parts["boxes"], (DENSE, "#E69F00"), strict=True):
            box.set_facecolor(colour)
            box.set_alpha(0.5)
        axes.set_xticks([1, 2], ["vocabulary", "options"])
        axes.set_title(name)
    figure.suptitle(f"{_title(info)}: each question once")
    return figure


def _median_question(table: pa.Table) -> int:
    """The question whose KL over the vocabulary is the median one: neither the mildest nor the worst."""
    rows = table.filter(pc.equal(table["space"], "global"))
    order = np.argsort(rows["kl_dense_target"].to_numpy(), kind="stable")
    return int(rows["question"].to_numpy()[order[len(order) // 2]])


def _token(text: str) -> str:
    """A token as a tick's label: spaces seen, cut to a length that fits."""
    shown = drawable(text.replace(" ", "\u2423")) or "(empty)"
    return shown if len(shown) <= 12 else shown[:11] + "\u2026"


def _title(info: Mapping[str, Any]) -> str:
    config = info["config"]
    return f"{short(config['dense'])} against {short(config['target'])}; template {config['template']}, {config['shots']} shots, {info['questions']} questions"
