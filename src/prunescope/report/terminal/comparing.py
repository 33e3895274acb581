"""What `layerwise`, `generate`, `mcq` and `retrieve` print. Numbers come from rows and run.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunescope.report import KIND_NAMES
from prunescope.report.names import measure_name, short
from prunescope.report.terminal.recovery import show_recovery

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["show_generation", "show_layerwise", "show_mcq", "show_retrieval", "worst_layers"]

_SHOWN = ("h_cos", "z_cos", "p_cos", "h_cos_dev", "z_cos_dev", "p_cos_dev", "kl_dense_target", "js", "top1_agree")
_UPWARD_IS_WORSE = ("h_cos_dev", "z_cos_dev", "p_cos_dev", "kl_dense_target", "js")


def show_layerwise(table: pa.Table, info: dict[str, Any], console: Console | None = None) -> None:
    """Per sublayer kind and column: mean with its confidence interval, the worst value, and the three worst layers.

    A value that is not above the noise floor (the dense model against itself) bears a ``<``.
    """
    floor = info["noise_floor"]["floor"]
    console = console or Console()
    console.print(Text(_title(info), style="bold"))
    for kind, name in KIND_NAMES.items():
        if not info["changed_layers"][kind]:
            console.print(Text(f"{name} sublayers: the target changes none"))
            continue
        shown = Table(
            title=Text(f"{name} sublayers ({len(info['changed_layers'][kind])} changed)"),
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1),
        )
        shown.add_column("column", no_wrap=True)
        for heading in ("mean", "95 % interval", "worst"):
            shown.add_column(heading, justify="right", no_wrap=True)
        shown.add_column("worst layers", no_wrap=True)
        for column in _SHOWN:
            stats = info["summary_by_sublayer"][kind][space_of_name(column)][column]
            upward = column in _UPWARD_IS_WORSE
            low, high = stats["ci95"]
            shown.add_row(
                column,
                _number(stats["mean"], floor.get(column)),
                "-" if low is None else f"{low:.3g} .. {high:.3g}",
                _number(stats["max" if upward else "min"], floor.get(column)),
                ", ".join(map(str, worst_layers(table, kind, column, upward, info["changed_layers"][kind]))),
            )
        console.print(shown)
    console.print(
        Text("< : not above the noise floor, which is what the dense model gives against itself", style="dim")
    )


def worst_layers(
    table: pa.Table, kind: str, column: str, upward: bool, changed: list[int], count: int = 3
) -> list[int]:
    """The changed layers with the worst mean of a column, worst first."""
    import pyarrow.compute as pc

    means = table.filter(pc.equal(table["sublayer"], kind)).group_by("layer").aggregate([(column, "mean")])
    ordered = means.sort_by([(f"{column}_mean", "descending" if upward else "ascending"), ("layer", "ascending")])
    return [int(layer) for layer in ordered["layer"].to_pylist() if layer in changed][:count]


def show_generation(info: Mapping[str, Any], console: Console | None = None) -> None:
    """Means per column and regime with their intervals, then what became of the texts."""
    floor = info["noise_floor"]["floor"]
    console = console or Console()
    config = info["config"]
    console.print(
        Text(
            f"{config['dense']} against {config['target']}: {len(info['prompts'])} prompts, {info['steps']} steps, T = {config['metric_temperature']:g}",
            style="bold",
        )
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("column", no_wrap=True)
    for regime in info["regimes"]:
        table.add_column(f"{regime}\nmean (95 % interval)", justify="right", no_wrap=True)
    for column in _SHOWN:
        cells = []
        for regime in info["regimes"]:
            stats = info["summary_by_regime"][regime][space_of_name(column)].get(column)
            low, high = stats["ci95"] if stats else (None, None)
            interval = "" if low is None else f" ({low:.3g} .. {high:.3g})"
            cells.append(f"{_number(stats['mean'], floor.get(column))}{interval}" if stats else "-")
        table.add_row(column, *cells)
    console.print(table)
    if info.get("like"):
        console.print(Text(f"KL in the dense model's texts: {info['like']} of the dense model's own quantised types"))
    if first := info.get("first_difference"):
        median = "" if first["median"] is None else f"; the others differ first at step {first['median']:g} (median)"
        console.print(Text(f"same text to the end: {first['same_texts']} of {len(first['by_prompt'])} prompts{median}"))
    show_recovery(info, console)
    if parts := info.get("divergence"):
        console.print(
            Text(
                f"KL a step: {parts['total']:.4g} free-running = {parts['local']:.4g} in the dense context + {parts['history']:.4g} through its own history"
            )
        )
    if texts := info.get("texts"):
        console.print(_texts_table(texts))
    console.print(
        Text("< : not above the noise floor, which is what the dense model gives against itself", style="dim")
    )


def _texts_table(texts: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title=Text("free texts"), title_justify="left")
    table.add_column("")
    for heading in ("tokens", "rep-2", "rep-4", "distinct-1", "looping", "never ended"):
        table.add_column(heading, justify="right")
    for side in ("dense", "target"):
        row = texts[side]
        shares = [row[name] for name in ("rep_2", "rep_4", "distinct_1", "looping", "never_ended")]
        table.add_row(side, f"{row['tokens']:.1f}", *("-" if share is None else f"{share:.3f}" for share in shares))
    return table


def show_mcq(info: Mapping[str, Any], console: Console | None = None) -> None:
    """Means over the whole vocabulary and over the options, accuracies, flips."""
    floor = info["noise_floor"]["floor"]
    console = console or Console()
    config = info["config"]
    console.print(
        Text(
            f"{config['dense']} against {config['target']}: {info['questions']} questions, template {config['template']}, {config['shots']} shots, T = {config['metric_temperature']:g}",
            style="bold",
        )
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("column", no_wrap=True)
    for name in ("whole vocabulary", "options"):
        table.add_column(f"{name}\nmean (95 % interval)", justify="right", no_wrap=True)
    for column in ("z_cos", "p_cos", "kl_dense_target", "kl_target_dense", "top1_agree"):
        cells = []
        for space in ("global", "options"):
            stats = info["summary_by_space"][space][space_of_name(column)][column]
            low, high = stats["ci95"]
            interval = "" if low is None else f" ({low:.3g} .. {high:.3g})"
            cells.append(f"{_number(stats['mean'], floor.get(column))}{interval}")
        table.add_row(column, *cells)
    console.print(table)
    for space, where in (("global", "over the whole vocabulary"), ("options", "over the options")):
        if words := info.get("like", {}).get(space):
            console.print(Text(f"KL {where}: {words} of the dense model's own quantised types"))
    for side in ("dense", "target"):
        found = info["accuracy"][side]
        low, high = found["ci95"]
        error = info["calibration"][side]["ece"]
        console.print(
            Text(f"{side}: accuracy {found['accuracy']:.3f} ({low:.3f} .. {high:.3f}), calibration error {error:.3f}")
        )
    if info["accuracy"]["dense"]["ci95"][0] <= info["chance"]:
        console.print(
            Text(
                f"the dense accuracy is not above chance ({info['chance']:.3f}): accuracies and flips say nothing here",
                style="bold",
            )
        )
    flips = info["flips"]
    console.print(
        Text(
            f"flips: {flips['right_to_wrong']} right to wrong, {flips['wrong_to_right']} wrong to right, {flips['wrong_to_wrong']} between wrong ones; McNemar p = {flips['mcnemar_p']:.3g}; same choice {info['agreement']['same_choice']:.3f}"
        )
    )
    show_recovery(info, console)
    if info["scored_by_sequence"]:
        console.print(
            Text(
                f"{info['scored_by_sequence']} questions have options of several or shared tokens; they are scored by sequence log-likelihood"
            )
        )


def show_retrieval(info: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the measures of both models with the interval of their difference, and how alike rankings and embeddings are."""
    console = console or Console()
    target = short(str(info["config"]["target"]))
    title = f"{target} against {short(str(info['config']['dense']))}: {info['queries']} queries, {info['passages']} passages"
    console.print(Text(title, style="bold"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("mean", no_wrap=True)
    for name in ("dense", "target", "change (95 % interval)", "up / down", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in info["measures"].items():
        table.add_row(
            measure_name(name),
            *(f"{row[side]:.3f}" for side in ("dense", "target")),
            f"{row['diff']:+.3f} {_interval(row['diff_ci95'])}",
            f"{row['better']} / {row['worse']}",
            f"{row['sign_test_p']:.2g}",
        )
    console.print(table)
    console.print("up / down: queries; p: sign test of them", markup=False)
    alike = info["summary"]["retrieval"]
    console.print(
        f"rankings: Kendall's tau {_mean(alike, 'kendall')}, shared top 10 {_mean(alike, 'overlap_10')}, same first passage "
        f"{_mean(alike, 'top1_same')}",
        markup=False,
        highlight=False,
    )
    moved, floor = info["summary"]["h"].get("h_cos_dev"), info["noise_floor"]["floor"]["h_cos_dev"]
    if moved:
        passages = info["passages_moved"]["h_cos_dev"]["mean"]
        console.print(
            f"embeddings: 1 - h-cosine {moved['mean']:.3g} of queries, {passages:.3g} of passages (noise floor {floor:.1g})",
            markup=False,
            highlight=False,
        )
    else:
        console.print("embeddings: the models differ in width, so there is no h-cosine between them", markup=False)


def _mean(columns: Mapping[str, Any], name: str) -> str:
    return f"{columns[name]['mean']:.3f} {_interval(columns[name]['ci95'])}" if name in columns else "not defined"


def _interval(pair: Sequence[float | None]) -> str:
    return "" if pair[0] is None else f"({pair[0]:.3f} to {pair[1]:.3f})"


def space_of_name(column: str) -> str:
    """The space of a column that `show_layerwise` shows."""
    return column[0] if column[1] == "_" else "p"


def _number(value: float, floor: float | None) -> str:
    return f"{'< ' if floor is not None and abs(value) <= floor else ''}{value:.6g}"


def _title(info: dict[str, Any]) -> str:
    config = info["config"]
    against = config["target"] or "each sublayer dropped in turn"
    return f"{config['dense']} against {against}: {len(info['prompts'])} prompts, {info['steps']} steps, lens {config['lens']}, T = {config['metric_temperature']:g}"
