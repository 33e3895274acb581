"""What `evaluate` and `speed` print, and `summary.md` of an evaluate run. Numbers come from rows and run.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "HEADINGS",
    "STEP_HEADINGS",
    "gain",
    "remarks",
    "score_rows",
    "show_engine_speed",
    "show_scores_of_tasks",
    "show_speed",
    "step_rows",
    "summary_page",
]

HEADINGS = ("task", "kind", "metric", "n", "model", "score", "95 %", "change", "95 % of it", "lost", "won", "p")


STEP_HEADINGS = ("task", "model", "against", "change", "95 % of it", "lost", "won", "p")


def score_rows(info: Mapping[str, Any]) -> list[list[str]]:
    """A row per task and model, the cells of `HEADINGS`; the dense model's first."""
    models = list(info["summary"])
    rows = []
    for task, dense in info["summary"][models[0]].items():
        for model in models:
            entry, pair = info["summary"][model][task], info["paired"].get(model, {}).get(task)
            first = [task, entry["kind"], entry["metric"], str(entry["n"])] if model == models[0] else [""] * 4
            cells = [model, f"{entry['value']:.3f}", _interval(entry["ci95"])]
            if pair is not None:
                cells += _difference(pair)
            elif model == models[0]:
                cells += [f"chance {dense['chance']:.2f}" if dense["chance"] else "", "", "", "", ""]
            else:
                cells += [f"{entry['value'] - dense['value']:+.3f}", "", "", "", ""]
            rows.append(first + cells)
    return rows


def _difference(pair: Mapping[str, Any]) -> list[str]:
    flips, p = [pair["right_to_wrong"], pair["wrong_to_right"]], pair["mcnemar_p"]
    return [
        f"{pair['difference']:+.3f}",
        _interval(pair["ci95"], signed=True),
        *("-" if flip is None else str(flip) for flip in flips),
        "-" if p is None else f"{p:.2g}" if p >= 0.001 else "<0.001",
    ]


def step_rows(info: Mapping[str, Any]) -> list[list[str]]:
    """From the third model on: what changed against the model before it, the cells of `STEP_HEADINGS`. With dense, pruned and healed in this
    order: what healing bought, use by use."""
    models = list(info["summary"])
    before = dict(zip(models[1:], models, strict=False))
    return [
        [task, model, before[model], *_difference(pair)]
        for task in info["summary"][models[0]]
        for model, found in info.get("paired_with_previous", {}).items()
        if (pair := found.get(task)) is not None
    ]


def remarks(info: Mapping[str, Any]) -> list[str]:
    """What one must know to read the table: tasks and pairs that say nothing, and notes."""
    lines = [_divergence(label, kl, info.get("like", {}).get(label)) for label, kl in info.get("kl", {}).items()]
    for pair in info["pairs"]:
        tasks = [task for task in (f"{pair}-gen", f"{pair}-mc") if task in info["says_nothing"]]
        if tasks:
            why = "; ".join(f"{task}: {info['says_nothing'][task]}" for task in tasks)
            lines.append(f"The pair {pair} says nothing here: {why}.")
    inside = {f"{pair}-{way}" for pair in info["pairs"] for way in ("gen", "mc")}
    lines += [f"{task} says nothing here: {why}." for task, why in info["says_nothing"].items() if task not in inside]
    first = next(iter(info["summary"].values()))
    return lines + [f"{task}: {entry['note']}." for task, entry in first.items() if entry.get("note")]


def _divergence(label: str, kl: Mapping[str, Any], like: str | None) -> str:
    low, high = kl["ci95"]
    interval = "" if low is None else f" ({low:.3g} to {high:.3g})"
    place = f", {like} of the first model's own quantised types" if like else ""
    return f"{label}: KL from the first model, a step of that one's text, {kl['mean']:.3g}{interval}{place}."


def show_scores_of_tasks(info: Mapping[str, Any], console: Console | None = None) -> None:
    """Every model on every task, and its difference from the first model. Models are numbered: their names may be long."""
    console = console or Console()
    numbers = {model: str(number) for number, model in enumerate(info["summary"], 1)}
    for model, number in numbers.items():
        console.print(Text(f"{number}: {model}"))
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("task", "", "score", "95 %", "change (95 %)", "lost", "won", "p"):
        table.add_column(
            heading, justify="left" if heading in ("task", "") else "right", no_wrap=heading != "task", overflow="fold"
        )
    for row in score_rows(info):
        change = f"{row[7]} ({row[8]})" if row[8] else row[7]
        cells = (row[0], numbers[row[4]], *row[5:7], change, *row[9:])
        table.add_row(*(Text(cell.replace(" .. ", "..")) for cell in cells))
    console.print(table)
    if steps := step_rows(info):
        console.print(Text("against the model before it"))
        table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
        for heading in ("task", "", "change (95 %)", "lost", "won", "p"):
            table.add_column(heading, justify="left" if heading in ("task", "") else "right", no_wrap=heading != "task")
        for task, model, earlier, change, interval, *rest in steps:
            cells = (task, f"{numbers[model]} - {numbers[earlier]}", f"{change} ({interval})", *rest)
            table.add_row(*(Text(cell.replace(" .. ", "..")) for cell in cells))
        console.print(table)
    for line in remarks(info):
        console.print(Text(line, style="bold"))


def summary_page(info: Mapping[str, Any]) -> str:
    """``summary.md`` of a run."""
    lines = ["# Scores", "", "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in score_rows(info)]
    if steps := step_rows(info):
        lines += ["", "## Against the model before it", "", "| " + " | ".join(STEP_HEADINGS) + " |"]
        lines += ["|" + "---|" * len(STEP_HEADINGS)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in steps]
    lines += ["", *(f"- {line}" for line in remarks(info))] if remarks(info) else []
    lines += ["", "Changes are model minus first model on the same items; lost and won are items that turned wrong"]
    lines += ["and right; p is McNemar's exact test, not corrected for the number of tasks."]
    return "\n".join(lines) + "\n"


def _interval(bounds: Any, signed: bool = False) -> str:
    if not bounds or bounds[0] is None:
        return ""
    low, high = bounds
    return f"{low:+.2f} .. {high:+.2f}" if signed else f"{low:.2f} .. {high:.2f}"


def show_speed(rows: list[dict[str, Any]], info: Mapping[str, Any], console: Console | None = None) -> None:
    """Sizes, a line a model; then times, a line per model and batch size; then what saves nothing."""
    console = console or Console()
    rates, config = info["rates"], info["config"]
    console.print(
        Text(
            f"{info['device']}, {info['dtype']}: {rates['bytes_per_s'] / 1e9:.4g} GB/s, {rates['operations_per_s'] / 1e12:.3g} TFLOP/s measured; prompts of {config['length']} tokens, {config['max_new_tokens']} new ones, median of {config['repeats']}",
            style="bold",
        )
    )
    sizes = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    sizes.add_column("model", min_width=16, overflow="fold")
    for heading in ("para-\nmeters", "not\nzero", "dropped", "on disk", "in\nmemory", "read\na step", "cache\na token"):
        sizes.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row["batch_size"] == rows[0]["batch_size"]:
            counts = (row[key] for key in ("parameters", "nonzero_parameters", "dropped_parameters"))
            stored = (row[key] for key in ("disk_bytes", "memory_bytes", "step_bytes", "cache_bytes_per_token"))
            sizes.add_row(row["model"], *map(_count, counts), *(_count(size, "B") for size in stored))
    console.print(sizes)
    _show_times(console, rows, batch=lambda row, kind: str(row["batch_size"]), floor=_over_floor)
    for name, notes in info["notes"].items():
        for note in notes:
            console.print(Text(f"{name}: {note}"))
    console.print(
        Text(
            "spread: slowest less fastest, over the median; ~ : a difference from the first model that is within the spread, that is, noise. "
            "floor: the weights that a step reads over the measured bandwidth, the operations of a prefill over the measured rate",
            style="dim",
        )
    )


def show_engine_speed(rows: list[dict[str, Any]], info: Mapping[str, Any], console: Console | None = None) -> None:
    """A line a model: bytes of weights and of the key/value cache, and times, each against the first model."""
    console = console or Console()
    config = info["config"]
    console.print(
        Text(
            f"{info['engine']}, {info['threads']} threads, keys and values in {info['cache']}: a prompt of {config['length']} tokens, {config['max_new_tokens']} new ones, median of {config['repeats']}, models in turn",
            style="bold",
        )
    )
    sizes = Table(box=SIMPLE_HEAD, padding=(0, 1))
    sizes.add_column("model", min_width=16)
    for heading in ("weights", "", "cache", ""):
        sizes.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        stored = [(row[f"{what}_bytes"], row[f"{what}_ratio"]) for what in ("weight", "cache")]
        sizes.add_row(row["model"], *(cell for size, ratio in stored for cell in (_count(size, "B"), _change(ratio))))
    console.print(sizes)
    _show_times(console, rows, digits=1)
    console.print(
        Text(
            "spread: slowest less fastest, over the median; ~ : a difference within the spread, that is, noise",
            style="dim",
        )
    )


def _show_times(
    console: Console,
    rows: Sequence[Mapping[str, Any]],
    *,
    digits: int = 0,
    batch: Callable[[Mapping[str, Any], str], str] | None = None,
    floor: Callable[[Mapping[str, Any], str], str] | None = None,
) -> None:
    """Prefill and decode, a line a row; ``digits`` of tokens/s, and columns that not every engine has."""
    columns: dict[str, Callable[[Mapping[str, Any], str], str] | None] = {
        "batch": batch,
        "tokens/s": lambda row, kind: f"{row[f'{kind}_tokens_per_s']:,.{digits}f}",
        "ms": lambda row, kind: f"{1000 * row[f'{kind}_s']:.4g}",
        "spread": lambda row, kind: f"{100 * (row[f'{kind}_s_max'] - row[f'{kind}_s_min']) / row[f'{kind}_s']:.0f} %",
        "over floor": floor,
        "gain": lambda row, kind: "" if row["model"] == rows[0]["model"] else gain(row, kind),
    }
    shown = {heading: cell for heading, cell in columns.items() if cell is not None}
    for kind, what in (("prefill", "prompt tokens read"), ("decode", "tokens written")):
        times = Table(box=SIMPLE_HEAD, padding=(0, 1), title=Text(f"{kind}: {what}"), title_justify="left")
        times.add_column("model")
        for heading in shown:
            times.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            times.add_row(row["model"], *(cell(row, kind) for cell in shown.values()))
        console.print(times)


def gain(row: Mapping[str, Any], kind: str) -> str:
    """How many times as fast as the first model, with a ``~`` where that is within the spread."""
    return f"{'~ ' if row[f'{kind}_within_spread'] else ''}{row[f'{kind}_speedup']:.2f}x"


def _over_floor(row: Mapping[str, Any], kind: str) -> str:
    over = row[f"{kind}_over_floor"]
    return "-" if over is None else f"{over:.2f}"


def _change(ratio: float) -> str:
    return "" if ratio == 1 else f"{100 * (ratio - 1):+.0f} %"


def _count(value: float | None, unit: str = "") -> str:
    """Three digits and a letter: 135 M, 768 B."""
    if value is None:
        return "-"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()
