"""The table of a divergence run for the terminal: llama.cpp's rows in its order and units, and what is added to them. From run.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["kl_lines", "show_divergence"]

_PASSAGES = 3


def kl_lines(table: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (name, value ± error) of a `kl_table`, formatted and named as llama.cpp prints them, percentages as there."""

    def pair(value: Sequence[float], form: str = "10.6f", times: float = 1.0, unit: str = "") -> str:
        return " ± ".join(f"{times * x:{form}}" for x in value) + unit

    def spread(found: Mapping[str, Any], name: str, times: float = 1.0, form: str = "10.6f", unit: str = "") -> Any:
        yield f"Mean {name}", pair(found["mean"], form, times, unit)
        yield f"Maximum {name}", f"{times * found['max']:{form}}{unit}"
        for key in (key for key in found if key[0] == "p"):
            label = "Median" if key == "p50" else f"{float(key[1:]):.1f}%"
            yield f"{label} {name}", f"{times * found[key]:{form}}{unit}"
        yield f"Minimum {name}", f"{times * found['min']:{form}}{unit}"

    backward, js = table["kl_target_dense"], table["js"]
    percent: dict[str, Any] = {"times": 100, "form": "7.3f", "unit": " %"}
    return [
        (
            "Perplexity statistics",
            [
                ("Mean PPL(Q)", pair(table["ppl_target"])),
                ("Mean PPL(base)", pair(table["ppl_dense"])),
                ("Cor(ln(PPL(Q)), ln(PPL(base)))", f"{100 * table['ln_ppl_correlation']:6.2f}%"),
                ("Mean ln(PPL(Q)/PPL(base))", pair(table["ln_ppl_ratio"])),
                ("Mean PPL(Q)/PPL(base)", pair(table["ppl_ratio"])),
                ("Mean PPL(Q)-PPL(base)", pair(table["ppl_difference"])),
            ],
        ),
        (
            "KL divergence statistics",
            [
                *spread(table["kl_dense_target"], "KLD"),
                ("Mean KLD(Q || base)", pair(backward["mean"])),
                ("Maximum KLD(Q || base)", f"{backward['max']:10.6f}"),
                ("Mean JSD", pair(js["mean"])),
            ],
        ),
        (
            "Token probability statistics",
            [
                *spread(table["dp"], "Δp", **percent),
                ("RMS Δp", pair(table["dp_rms"], **percent)),
                ("Same top p", pair(table["same_top"], **percent)),
                ("Same sampled p", pair(table["same_sampled"], **percent)),
                ("Same sampled p, base with itself", pair(table["same_sampled_dense"], **percent)),
                ("Overlap (1 - TV)", pair(table["overlap"], **percent)),
            ],
        ),
    ]


def show_divergence(info: Mapping[str, Any], console: Console | None = None) -> None:
    """llama.cpp's table, KL by slice and by confidence, the rungs that it lies between, and the worst passages.

    Args:
        info: with ``table``, ``by``, ``tokens``, ``chunks`` of `divergence_summary`, ``noise_floor``, and, where they were asked for,
            ``like`` (a string) and ``worst`` (`worst_passages`).
    """
    console = console or Console()
    config = info["config"]
    console.print(
        Text(
            f"{config['dense']} (base) against {config['target']} (Q): {info['tokens']:,} scored tokens in {info['chunks']} chunks of {config['context']}, T = {config['metric_temperature']:g}",
            style="bold",
        )
    )
    for title, lines in kl_lines(info["table"]):
        shown = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1), show_header=False)
        shown.add_column(no_wrap=True)
        shown.add_column(no_wrap=True)
        for name, value in lines:
            shown.add_row(Text(name), value)
        console.print(shown)
        console.print()
    if info.get("like"):
        console.print(Text(f"the KL is {info['like']} of this model's own ladder", style="bold"))
    low, high = info["summary"]["p"]["kl_dense_target"]["ci95"]
    if low is not None:
        console.print(Text(f"95 % interval of the mean KLD, resampled by chunk: {low:.6f} .. {high:.6f}"))
    floor = info["noise_floor"]["floor"]["kl_dense_target"]
    console.print(Text(f"noise floor, the largest KLD of the dense model against itself: {floor:.2g}"))
    if len(info["by"]["slice"]) > 1:
        _show_groups(console, "by slice", "slice", [(group["slice"], group) for group in info["by"]["slice"]])
    for name, title in (("position", "by position in the chunk"), ("confidence", "by the dense model's confidence")):
        rows = [(f"{group['from']:g} - {group['to']:g}", group) for group in info["by"][name]]
        _show_groups(console, title, name, rows)
    for passage in info.get("worst", [])[:_PASSAGES]:
        worst = max(passage["tokens"], key=lambda token: token["kl_dense_target"])
        console.print(Text(f"chunk {passage['chunk']}, KLD {passage['kl_dense_target']:.3f}: {passage['text']!r}"))
        for side in ("dense", "target"):
            listed = ", ".join(f"{top['text']!r} {top['p']:.2f}" for top in worst[f"top_{side}"])
            console.print(Text(f"  {side} at {worst['text']!r}: {listed}", style="dim"))


def _show_groups(console: Console, title: str, name: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    shown = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    shown.add_column(name, no_wrap=True)
    for heading in ("tokens", "KLD", "median", "RMS Δp %", "same top %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for label, group in rows:
        mean, error = group["kl_dense_target"]
        shown.add_row(
            Text(label), f"{group['tokens']:,}", f"{mean:.5f} ± {error:.5f}", f"{group['kl_median']:.5f}", f"{100 * group['dp_rms']:.2f}", f"{100 * group['same_top'][0]:.2f}"
        )  # fmt: skip
    console.print(shown)
