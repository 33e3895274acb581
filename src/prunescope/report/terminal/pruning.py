"""What `drop`, `sparsify` and `heal` print. Numbers come from rows and run.json alone."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["show_healed", "show_plan", "show_scores", "show_sparsified"]


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
        exact = record["method"] == "sparsegpt" or record["config"].get("refine")
        how = "" if exact else ", estimated on some of the calibration tokens"
        console.print(Text(f"relative error |(W - W\u2032)X| / |WX| by block{how}"))
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        table.add_column("block", justify="right")
        for kind, name in zip(kinds, last, strict=True):
            table.add_column(name if last.count(name) == 1 else kind.replace(".", "\n"), justify="right", no_wrap=True)
        for layer in sorted({layer for layer, _ in cells}):
            errors = [cells.get((layer, kind), []) for kind in kinds]
            table.add_row(str(layer), *(f"{sum(found) / len(found):.4f}" if found else "-" for found in errors))
        console.print(table)
    _say_refined(modules, record["config"].get("refine"), console)
    if record["method"] == "experts":
        console.print(Text("experts removed by block, by mean router weight x norm of the output"))
        for row in modules:
            console.print(Text(f"  {row['layer']}: {', '.join(map(str, row['removed_experts']))} of {row['experts']}"))
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


def _say_refined(modules: list[dict[str, Any]], how: str | None, console: Console) -> None:
    """What refining gained on the samples that it was not fitted to, which decide, and on all."""
    rows = [row for row in modules if row.get("held_out_refined") is not None]
    if how is None or not rows:
        return
    names = ("held_out_unrefined", "held_out_refined", "held_out", "error_unrefined", "error")
    was, found, chosen, error_was, error = (sum(row[name] for row in rows) / len(rows) for name in names)
    kept = sum(row["refined"] for row in rows)
    console.print(
        Text(
            f"refined ({how}): {kept} of {len(rows)} matrices, those whose error fell on the quarter of the samples held out\n"
            f"mean relative error: held out {was:.4f} before, {found:.4f} with all refined, {chosen:.4f} as chosen; "
            f"on all samples, which it is fitted to, {error_was:.4f} before, {error:.4f} after"
        )
    )


def show_healed(record: dict[str, Any], console: Console | None = None) -> None:
    """The held-out divergence before and after, and what it took."""
    console = console or Console()
    kl, config = record["kl"], record["config"]
    how = "all weights of the blocks" if config["lora"] is None else f"low-rank changes (rank {config['lora']})"
    console.print(Text(f"{config['target']}: healed, {how}, {record['trained_parameters']:,} parameters", style="bold"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("", "held-out KL, nats a token", "of before"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, value in (
        ("before", kl["before"]),
        (f"best, step {record['best_step']}", kl["best"]),
        ("as written", kl["written"]),
    ):
        table.add_row(name, f"{value:.4f}", f"{100 * value / kl['before']:.1f} %" if kl["before"] > 0 else "-")
    console.print(table)
    rate = record["tokens"] / record["seconds"] if record["seconds"] else 0.0
    console.print(
        Text(
            f"{record['steps']} steps, {record['tokens']:,} tokens in {record['seconds']:.0f} s ({rate:,.0f} a second)"
        )
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
    what = {"structured": "neurons", "experts": "experts"}.get(record["method"], "weights")
    return f"{config['model']}: {record['method']}, {asked}, {100 * record['sparsity']:.2f} % of the {what} of {len(record['modules'])} matrices"
