"""`prunescope advise`: how much may go before a use breaks, read from sweeps. No model is loaded."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from prunescope.errors import UserError
from prunescope.jobs.options import Options, OutputOptions
from prunescope.report.terminal.advice import show_advice
from prunescope.results import AdviseResult
from prunescope.runs.folder import Run, open_run
from prunescope.sweep.advice import Advised, advised, best, tasks_of
from prunescope.sweep.tables import Tables

__all__ = ["AdviseOptions", "run"]

_SHARED = ("calibration", "samples", "seq_len", "seed")  # what drop, sparsify and sweep are told alike


@dataclass(frozen=True)
class AdviseOptions(Options):
    """See `prunescope.advise`."""

    model: str
    sweep: str | None
    use: str
    budget: Literal["bytes", "score"]
    loss: float
    seed: int
    output: OutputOptions

    def check(self) -> None:
        if not 0 < self.loss < 1:
            raise UserError(f"--loss {self.loss}: give the share that may be lost, between 0 and 1, for example 0.05")
        super().check()

    def runs(self) -> list[Run]:
        """The sweeps; MODEL itself may be one."""
        if self.sweep is None and not (Path(self.model).expanduser() / "run.json").is_file():
            raise UserError(
                f"advise reads sweeps: run `prunescope sweep {self.model} --target attn,mlp,block --n 0..8 --out sweep`, then give --sweep sweep"
            )
        names = [self.model] if self.sweep is None else [name.strip() for name in self.sweep.split(",")]
        found = [open_run(name) for name in names]
        for one in found:
            if one.command != "sweep":
                raise UserError(f"{one.folder} is a run of {one.command}; advise reads runs of sweep")
            source = one.info["models"]["dense"]["source"]
            if self.sweep is not None and source != self.model:
                raise UserError(f"{one.folder} is a sweep of {source}, not of {self.model}; name that model")
        return found


def run(options: AdviseOptions) -> AdviseResult:
    started = time.monotonic()
    options.check()
    runs = options.runs()
    source = runs[0].info["models"]["dense"]["source"]
    if (other := next((r for r in runs if r.info["models"]["dense"]["source"] != source), None)) is not None:
        raise UserError(f"{other.folder} is of another model than {runs[0].folder}; give sweeps of one model")
    rows: list[dict[str, Any]] = []
    tasks: list[str] = []
    points: list[Advised] = []
    items: list[int] = []
    for one in runs:
        tables = Tables.of_run(one)
        scores = tables.sweep.to_pylist()
        mine = tasks_of(options.use, scores)
        found = advised(tables, mine, loss=options.loss, seed=options.seed)
        tasks += [task for task in mine if task not in tasks]
        items += [row["items"] for row in scores if row["task"] in mine]
        points += found
        how = {row["point"]: row for row in scores}
        rows += [asdict(p) | {"run": one.folder.name, "command": command(how[p.point], one.info)} for p in found]
    if not rows:
        raise UserError(f"{runs[0].folder} has the dense model alone; sweep more points")
    chosen = best(points, options.budget)
    info: dict[str, Any] = {
        **{
            key: runs[0].info[key] for key in ("schema_version", "versions", "device")
        },  # of the sweep: what decided its numbers
        "command": "advise",
        "seed": options.seed,
        "config": options.config(),
        "models": {"dense": runs[0].info["models"]["dense"], "target": None},
        "wall_time_s": round(time.monotonic() - started, 3),
        "summary": {
            "use": options.use,
            "tasks": tasks,
            "items": min(items),
            "loss": options.loss,
            "best": None if chosen is None else asdict(chosen),
            "command": None if chosen is None else next(r["command"] for r in rows if r["point"] == chosen.point),
            "says": says(points, chosen, options, min(items)),
        },
    }
    result = AdviseResult(info, pa.Table.from_pylist(rows))
    with options.output.staged() as staging:
        if staging is not None:
            result.write(staging)
    show_advice(rows, info)
    options.output.say_written()
    return result


def command(row: dict[str, Any], info: dict[str, Any]) -> str:
    """The command line that makes a point, with the sweep's own calibration."""
    config, source = info["config"], info["models"]["dense"]["source"]
    shared = [f"--{key.replace('_', '-')} {config[key]}" for key in _SHARED if config.get(key) is not None]
    if row["change"] == "quant":
        return f"quantise {source} with your engine's own tool; measured as {source} quant:{row['quant']}"
    if row["method"]:
        how = f"--pattern {row['pattern']}" if row["pattern"] else f"--sparsity {row['sparsity']:g}"
        line = f"prunescope sparsify {source} --method {row['method']} {how} {' '.join(shared)} --out pruned"
    else:
        line = f'prunescope export {source} --drop "{row["dropped"]}" --for transformers --out pruned'
    return line + (f", then quantise; measured with quant:{row['quant']}" if row["quant"] else "")


def says(points: list[Advised], chosen: Advised | None, options: AdviseOptions, items: int) -> list[str]:
    """The advice in sentences."""
    share, widest = f"{100 * options.loss:g} %", max(one.high - one.low for one in points)
    if chosen is None:
        smaller = [one for one in points if (one.saved or 0) > 0]
        if not smaller:
            return [
                "No point saves bytes: zeros in dense files take as much, and sweeps before 0.2 did not count bytes; sweep again, with --sparse-bytes for pruned weights."
            ]
        if all(one.verdict == "breaks" for one in smaller):
            return [f"Nothing that was measured saves bytes and loses at most {share} of {options.use}."]
        return [
            f"The data cannot tell: with {items} items an interval is up to {100 * widest:.0f} points wide, too wide to see a loss of {share}; sweep with a larger --limit."
        ]
    saved = f"{100 * (chosen.saved or 0):.1f} % of the bytes"
    sure = (
        "even at the low end of its interval"
        if chosen.verdict == "safe"
        else "by the fit, though not at the low end of its interval"
    )
    found = [
        f"{chosen.point} saves {saved} and keeps {100 * chosen.fitted:.0f} % of {options.use} ({100 * chosen.low:.0f} to {100 * chosen.high:.0f}): at most {share} is lost {sure}."
    ]
    if chosen.change == "quant":
        found.append("Quantising alone wins: nothing with dropped or pruned weights does as well here.")
    elif options.budget == "bytes":
        alone = best([one for one in points if one.change == "quant"], "bytes")
        if alone is None and not any(one.change == "quant" for one in points):
            found.append("No quantised point was measured; add some with sweep --quant int8,int4-g128 before pruning.")
        elif alone is not None:
            found.append(f"Quantising alone comes to {100 * (alone.saved or 0):.1f} % ({alone.point}).")
    return found
