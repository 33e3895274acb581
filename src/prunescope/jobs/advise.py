"""`prunescope advise`: how much may go before a use breaks, read from sweeps, which are run where none is given."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from prunescope.data.asked import is_file_of_rows, rows_hold, sha256_of
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Options, OutputOptions, listed
from prunescope.report.terminal.advice import show_advice
from prunescope.results import AdviseResult
from prunescope.runs.folder import Run, open_run
from prunescope.sweep.advice import AGREEMENT, HEALING, Advised, advised, best, by_kind, fastest, tasks_of
from prunescope.sweep.tables import Tables

__all__ = ["AdviseOptions", "run"]

_SHARED = ("calibration", "samples", "seq_len", "seed")  # what drop, sparsify and sweep are told alike


@dataclass(frozen=True)
class AdviseOptions(Options):
    """See `prunescope.advise`."""

    model: str
    sweep: str | None
    speed: str | None
    use: str
    budget: Literal["bytes", "speed", "score"]
    loss: float
    limit: int
    heal: bool
    seed: int
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        if not 0 < self.loss < 1:
            raise UserError(f"--loss {self.loss}: give the share that may be lost, between 0 and 1, for example 0.05")
        if is_file_of_rows(self.use):
            rows_hold(self.use)
        if self.speed is not None and self.budget != "speed":
            raise UserError(f"--speed goes with --budget speed, not with --budget {self.budget}")
        if self.heal and not self.sweeps:
            raise UserError("--heal heals points of a sweep that advise runs itself; leave out --heal, or the sweep")
        super().check()

    @property
    def sweeps(self) -> bool:
        """Whether no sweep is given, so that one is run."""
        return self.sweep is None and not (Path(self.model).expanduser() / "run.json").is_file()

    def beside(self, kind: str) -> OutputOptions:
        """Where runs that advise makes itself are kept: beside --out, if there is one."""
        if self.output.out is None:
            return OutputOptions(None, overwrite=False)
        return OutputOptions(f"{self.output.out.rstrip('/')}-{kind}", self.output.overwrite)

    def swept(self) -> list[_Swept]:
        """The sweeps: those given, MODEL itself if it is one, or one that is run now."""
        if self.sweeps:
            from prunescope.jobs.advise_measure import measure_sweep

            kept = self.beside("sweep")
            found = measure_sweep(
                self.model, self.use, self.limit, self.seed, self.loss, self.heal, self.loading,
                OutputOptions(kept.out, overwrite=False, resume=kept.out is not None),
            )  # fmt: skip
            return [_Swept(Path(kept.out or "sweep"), found.info, found.all_tables)]
        return [_Swept(run.folder, run.info, Tables.of_run(run)) for run in self._given()]

    def tasks_of_file(self, info: Mapping[str, Any], folder: Path) -> list[str]:
        """Tasks that a sweep made of the rows of ``--use``; none where that is no file. Raises UserError if it was not asked that file."""
        if not is_file_of_rows(self.use):
            return []
        found: list[str] | None = (info.get("own_files") or {}).get(sha256_of(Path(self.use)))
        if found is None:
            how = (
                f"--tasks {AGREEMENT} --prompts {self.use}"
                if rows_hold(self.use)[0] == "prompts"
                else f"--tasks {self.use}"
            )
            raise UserError(f"--use {self.use}: {folder} was not asked these rows; sweep with {how}")
        return found

    def _given(self) -> list[Run]:
        names = [self.model] if self.sweep is None else [name.strip() for name in self.sweep.split(",")]
        found = [open_run(name) for name in names]
        for one in found:
            if one.command != "sweep":
                raise UserError(f"{one.folder} is a run of {one.command}; advise reads runs of sweep")
            source = one.info["models"]["dense"]["source"]
            if self.sweep is not None and source != self.model:
                raise UserError(f"{one.folder} is a sweep of {source}, not of {self.model}; name that model")
        return found


@dataclass(frozen=True)
class _Swept:
    """A sweep: its folder, run.json and tables."""

    folder: Path
    info: dict[str, Any]
    tables: Tables


def run(options: AdviseOptions) -> AdviseResult:
    started = time.monotonic()
    options.check()
    runs = options.swept()
    source = runs[0].info["models"]["dense"]["source"]
    if (other := next((r for r in runs if r.info["models"]["dense"]["source"] != source), None)) is not None:
        raise UserError(f"{other.folder} is of another model than {runs[0].folder}; give sweeps of one model")
    rows: list[dict[str, Any]] = []
    tasks: list[str] = []
    points: list[Advised] = []
    items: list[int] = []
    kinds: dict[str, str] = {}
    for one in runs:
        scores = one.tables.sweep.to_pylist()
        of_file = options.tasks_of_file(one.info, one.folder)
        mine = tasks_of(options.use, scores, of_file)
        found = advised(one.tables, mine, loss=options.loss, seed=options.seed)
        tasks += [task for task in mine if task not in tasks]
        items += [row["items"] for row in scores if row["task"] in mine]
        kinds |= {row["task"]: row["kind"] for row in scores if row["task"] in mine}
        points += found
        how = {row["point"]: row for row in scores}
        rows += [
            asdict(p)
            | {"run": one.folder.name, "dropped": how[p.point]["dropped"], "command": command(how[p.point], one.info)}
            for p in found
        ]
    if not rows:
        raise UserError(f"{runs[0].folder} has the dense model alone; sweep more points")
    rates = _rates(options, source, points, rows) if options.budget == "speed" else {}
    for row in rows:
        row |= rates.get(row["point"], {"tokens_per_s": None, "speedup": None, "faster": None})
    chosen = fastest(points, rates) if options.budget == "speed" else best(points, options.budget)
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
            "judged": judged(options.use, kinds),
            "items": min(items),
            "loss": options.loss,
            "best": None if chosen is None else asdict(chosen),
            "command": None if chosen is None else next(r["command"] for r in rows if r["point"] == chosen.point),
            "by_kind": {kind: None if one is None else asdict(one) for kind, one in by_kind(points).items()},
            "says": says(points, chosen, options, min(items), rates),
        },
    }
    result = AdviseResult(info, pa.Table.from_pylist(rows))
    with options.output.staged() as staging:
        if staging is not None:
            result.write(staging)
    show_advice(rows, info)
    options.output.say_written()
    return result


def _rates(
    options: AdviseOptions, source: str, points: list[Advised], rows: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Point -> tokens a second as it writes, how many times the dense model's, and whether that is more than the spread of the repeats."""
    dropped = {row["point"]: row["dropped"] for row in rows}
    if options.speed is None:
        from prunescope.jobs.advise_measure import measure_speed

        timed = measure_speed(source, points, dropped, options.loading, options.beside("speed"))
    else:
        timed = [row for name in listed(options.speed) for row in _speed_run(name, source)]
    of_model = {row["model"]: row for row in reversed(timed)}  # of several batch sizes the first
    return {
        one.point: {
            "tokens_per_s": row["decode_tokens_per_s"],
            "speedup": row["decode_speedup"],
            "faster": not row["decode_within_spread"],
        }
        for one in points
        if one.change in ("drop", "healed") and (row := of_model.get(f"drop:{dropped[one.point]}")) is not None
    }


def _speed_run(name: str, source: str) -> list[dict[str, Any]]:
    run = open_run(name)
    if run.command != "speed":
        raise UserError(f"{run.folder} is a run of {run.command}; --speed takes runs of speed")
    rows: list[dict[str, Any]] = run.table().to_pylist()
    if rows[0]["model"] != source:
        raise UserError(f"{run.folder} times {rows[0]['model']} first, not {source}; its gains are of another model")
    return rows


def command(row: dict[str, Any], info: dict[str, Any]) -> str:
    """The command line that makes a point, with the sweep's own calibration."""
    config, source = info["config"], info["models"]["dense"]["source"]
    shared = [f"--{key.replace('_', '-')} {config[key]}" for key in _SHARED if config.get(key) is not None]
    if row["change"] == "quant":
        return f"quantise {source} with your engine's own tool; measured as {source} quant:{row['quant']}"
    if row["change"] == "healed":
        how = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in HEALING.items())
        return f'prunescope heal "drop:{row["dropped"]}" --teacher {source} {how} --seed {config["seed"]} --out healed'
    if row["method"]:
        how = f"--pattern {row['pattern']}" if row["pattern"] else f"--sparsity {row['sparsity']:g}"
        line = f"prunescope sparsify {source} --method {row['method']} {how} {' '.join(shared)} --out pruned"
    else:
        line = f'prunescope export {source} --drop "{row["dropped"]}" --for transformers --out pruned'
    return line + (f", then quantise; measured with quant:{row['quant']}" if row["quant"] else "")


def judged(use: str, kinds: Mapping[str, str]) -> str | None:
    """How the rows of a file are judged, by the kinds of its tasks; None where the use is no file."""
    if not is_file_of_rows(use):
        return None
    if AGREEMENT in kinds:
        return (
            f"{use} holds prompts without answers. Judged is agreement: the share of the tokens which the dense model writes after each prompt "
            "that is the most likely one to the point too. It says how far the writing moves, not whether it is still good."
        )
    how = "the option chosen" if "choice" in kinds.values() else "the answer written, which must be the one given"
    return f"{use} holds questions with answers. Judged is {how}."


def says(
    points: list[Advised],
    chosen: Advised | None,
    options: AdviseOptions,
    items: int,
    rates: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """The advice in sentences."""
    share, widest = f"{100 * options.loss:g} %", max(one.high - one.low for one in points)
    if options.budget == "speed":
        return _says_of_speed(points, chosen, options, rates, share)
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
    kinds = [
        f"{kind} {'none' if one is None else f'{one.point} ({100 * (one.saved or 0):.1f} %)'}"
        for kind, one in by_kind(points).items()
    ]
    if len(kinds) > 1:
        found.append(f"The smallest of each kind that keeps it: {', '.join(kinds)}.")
    if chosen.change == "quant":
        found.append("Quantising alone wins: nothing with dropped or pruned weights does as well here.")
    elif options.budget == "bytes":
        alone = best([one for one in points if one.change == "quant"], "bytes")
        if alone is None and not any(one.change == "quant" for one in points):
            found.append("No quantised point was measured; add some with sweep --quant int8,int4-g128 before pruning.")
        elif alone is not None:
            found.append(f"Quantising alone comes to {100 * (alone.saved or 0):.1f} % ({alone.point}).")
    return found


def _says_of_speed(
    points: list[Advised],
    chosen: Advised | None,
    options: AdviseOptions,
    rates: Mapping[str, Mapping[str, Any]],
    share: str,
) -> list[str]:
    others = "Rounded and pruned weights are imitated in memory and have no speed here: export them and time them with `prunescope speed --engine llama.cpp`."
    found = [others] if any(one.change not in ("drop", "healed") for one in points) else []
    if chosen is not None:
        rate = rates[chosen.point]
        kept = f"keeps {100 * chosen.fitted:.0f} % of {options.use} ({100 * chosen.low:.0f} to {100 * chosen.high:.0f})"
        sure = (
            "even at the low end of its interval"
            if chosen.verdict == "safe"
            else "by the fit, though not at the low end of its interval"
        )
        return [
            f"{chosen.point} writes {rate['tokens_per_s']:,.0f} tokens a second, {rate['speedup']:.2f} times as many as the dense model, and {kept}: at most {share} is lost {sure}.",
            *found,
        ]
    if not rates:
        return [
            f"No point that drops whole sublayers loses at most {share} of {options.use}, or none was timed.",
            *found,
        ]
    return [
        "No point that keeps the use is faster than the dense model by more than the spread of the repeats.",
        *found,
    ]
