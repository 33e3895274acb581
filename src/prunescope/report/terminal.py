"""Tables for the terminal. Numbers come from rows and run.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunescope.report import KIND_NAMES

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["show_generation", "show_layerwise", "show_mcq", "show_plan", "show_scores", "show_sparsified", "show_speed"]

_SHOWN = ("h_cos", "z_cos", "p_cos", "h_cos_dev", "z_cos_dev", "p_cos_dev", "kl_dense_target", "js", "top1_agree")
_UPWARD_IS_WORSE = ("h_cos_dev", "z_cos_dev", "p_cos_dev", "kl_dense_target", "js")


def show_scores(rows: list[dict[str, Any]], title: str, console: Console | None = None) -> None:
    """Layer, score, dropped or kept; one column of scores per kind of sublayer."""
    names = sorted({row["sublayer"] for row in rows})
    console = console or Console()
    console.print(Text(title, style="bold"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("layer", justify="right")
    for name in names:
        table.add_column(f"{name} score", justify="right")
        table.add_column("")
    cells = {(row["layer"], row["sublayer"]): row for row in rows}
    for layer in sorted({row["layer"] for row in rows}):
        line: list[str | Text] = [str(layer)]
        for name in names:
            row = cells[layer, name]
            line += [
                f"{row['score']:.6f}",
                Text("dropped", style="bold red") if row["dropped"] else Text("kept", style="dim"),
            ]
        table.add_row(*line)
    console.print(table)


def show_sparsified(record: dict[str, Any], console: Console | None = None) -> None:
    """Relative reconstruction error per block and kind of matrix (mean over experts), sparsity reached, perplexity."""
    console = console or Console()
    console.print(Text(_sparsified_title(record), style="bold"))
    modules = record["modules"]
    cells: dict[tuple[int, str], list[float]] = {}
    for row in modules:
        cells.setdefault((row["layer"], _short(row["name"])), []).extend([] if row["error"] is None else [row["error"]])
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    last = [kind.rpartition(".")[2] for kind in kinds]
    if any(cells.values()):
        how = "" if record["method"] == "sparsegpt" else ", estimated on some of the calibration tokens"
        console.print(Text(f"relative error |(W - W\u2032)X| / |WX| by block{how}"))
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        table.add_column("block", justify="right")
        for kind, name in zip(kinds, last, strict=True):
            table.add_column(name if last.count(name) == 1 else kind.replace(".", "\n"), justify="right", no_wrap=True)
        for layer in sorted({layer for layer, _ in cells}):
            errors = [cells.get((layer, kind), []) for kind in kinds]
            table.add_row(str(layer), *(f"{sum(found) / len(found):.4f}" if found else "-" for found in errors))
        console.print(table)
    dead = [row for row in modules if row["dead_inputs"]]
    few = [row for row in modules if row["few_tokens"] or row["tokens"] == 0]
    if dead:
        console.print(
            Text(f"dead inputs: {sum(r['dead_inputs'] for r in dead)} in {len(dead)} matrices, first {dead[0]['name']}")
        )
    if few:
        console.print(Text(f"too few calibration tokens: {len(few)} expert matrices, first {few[0]['name']}"))
    if record["perplexity"]:
        console.print(
            Text(f"perplexity: {record['perplexity']['dense']:.3f} dense, {record['perplexity']['pruned']:.3f} pruned")
        )


def show_plan(record: dict[str, Any], console: Console | None = None) -> None:
    """What a dry run found: matrices by kind, and what the run would need."""
    console = console or Console()
    console.print(Text(f"dry run: {_sparsified_title(record)}", style="bold"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("module", "count", "shape", "asked", "weights", "removed"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    groups: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
    for row in record["modules"]:
        groups.setdefault((_short(row["name"]), row["outputs"], row["inputs"], row["asked"]), []).append(row)
    for (kind, outputs, inputs, asked), rows in groups.items():
        weights, gone = outputs * inputs * len(rows), sum(row["zeros"] for row in rows)
        table.add_row(kind, str(len(rows)), f"{outputs} x {inputs}", asked, f"{weights:,}", f"{gone:,}")
    console.print(table)
    spilled = f"; {record['spilled_bytes'] / 2**20:.0f} MB of hidden states on disk" if record["spilled_bytes"] else ""
    console.print(
        Text(
            f"about {record['memory_bytes'] / 2**20:.0f} MB beside the process itself, {record['bytes_written'] / 2**20:.0f} MB to write{spilled}, "
            f"{record['seconds']:.0f} s of computing on {record['tokens']:,} calibration tokens"
        )
    )


def _short(name: str) -> str:
    """`self_attn.q_proj` of a matrix's full name, without its expert."""
    return ".".join(name.partition("[")[0].removesuffix(".weight").split(".")[-2:])


def _sparsified_title(record: dict[str, Any]) -> str:
    config = record["config"]
    asked = config["pattern"] if config["pattern"] not in (None, "unstructured") else f"sparsity {config['sparsity']:g}"
    what = "neurons" if record["method"] == "structured" else "weights"
    return f"{config['model']}: {record['method']}, {asked}, {100 * record['sparsity']:.2f} % of the {what} of {len(record['modules'])} matrices"


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
    if first := info.get("first_difference"):
        median = "" if first["median"] is None else f"; the others differ first at step {first['median']:g} (median)"
        console.print(Text(f"same text to the end: {first['same_texts']} of {len(first['by_prompt'])} prompts{median}"))
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
    if info["scored_by_sequence"]:
        console.print(
            Text(
                f"{info['scored_by_sequence']} questions have options of several or shared tokens; they are scored by sequence log-likelihood"
            )
        )


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
    sizes = Table(box=SIMPLE_HEAD, padding=(0, 1))
    sizes.add_column("model", min_width=16)
    for heading in ("para-\nmeters", "not\nzero", "dropped", "on disk", "in\nmemory", "read\na step", "cache\na token"):
        sizes.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row["batch_size"] == rows[0]["batch_size"]:
            counts = (row[key] for key in ("parameters", "nonzero_parameters", "dropped_parameters"))
            stored = (row[key] for key in ("disk_bytes", "memory_bytes", "step_bytes", "cache_bytes_per_token"))
            sizes.add_row(row["model"], *map(_count, counts), *(_count(size, "B") for size in stored))
    console.print(sizes)
    for kind, what in (("prefill", "prompt tokens read"), ("decode", "tokens written")):
        times = Table(box=SIMPLE_HEAD, padding=(0, 1), title=Text(f"{kind}: {what}"), title_justify="left")
        times.add_column("model")
        for heading in ("batch", "tokens/s", "ms", "spread", "over floor", "gain"):
            times.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            over, middle = row[f"{kind}_over_floor"], row[f"{kind}_s"]
            spread = (row[f"{kind}_s_max"] - row[f"{kind}_s_min"]) / middle
            gain = f"{'~ ' if row[f'{kind}_within_spread'] else ''}{row[f'{kind}_speedup']:.2f}x"
            times.add_row(
                row["model"],
                str(row["batch_size"]),
                f"{row[f'{kind}_tokens_per_s']:,.0f}",
                f"{1000 * middle:.4g}",
                f"{100 * spread:.0f} %",
                "-" if over is None else f"{over:.2f}",
                "" if row["model"] == rows[0]["model"] else gain,
            )
        console.print(times)
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


def _count(value: float | None, unit: str = "") -> str:
    """Three digits and a letter: 135 M, 768 B."""
    if value is None:
        return "-"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


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


def space_of_name(column: str) -> str:
    """The space of a column that `show_layerwise` shows."""
    return column[0] if column[1] == "_" else "p"


def worst_layers(
    table: pa.Table, kind: str, column: str, upward: bool, changed: list[int], count: int = 3
) -> list[int]:
    """The changed layers with the worst mean of a column, worst first."""
    import pyarrow.compute as pc

    means = table.filter(pc.equal(table["sublayer"], kind)).group_by("layer").aggregate([(column, "mean")])
    ordered = means.sort_by([(f"{column}_mean", "descending" if upward else "ascending"), ("layer", "ascending")])
    return [int(layer) for layer in ordered["layer"].to_pylist() if layer in changed][:count]


def _number(value: float, floor: float | None) -> str:
    return f"{'< ' if floor is not None and abs(value) <= floor else ''}{value:.6g}"


def _title(info: dict[str, Any]) -> str:
    config = info["config"]
    against = config["target"] or "each sublayer dropped in turn"
    return f"{config['dense']} against {against}: {len(info['prompts'])} prompts, {info['steps']} steps, lens {config['lens']}, T = {config['metric_temperature']:g}"
