"""`prunescope sweep` from its options to a finished run: score once, measure point after point, keep each as soon as it is there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from prunescope.cache import cache_folder
from prunescope.commands import SweepResult
from prunescope.compare.layerwise import encode
from prunescope.data.calibration import Calibration, calibration_tokens
from prunescope.data.prompts import read_prompts
from prunescope.errors import UserError
from prunescope.jobs.generate import finished
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.progress import console
from prunescope.prune.inplace import check_prunable
from prunescope.prune.masks import Goal
from prunescope.prune.select import check_choice, drop_orders, spec_of
from prunescope.runs import folder as results
from prunescope.runs.parts import resume_state, save_state
from prunescope.runs.provenance import run_record
from prunescope.sweep.bench import Bench, Plan
from prunescope.sweep.comparison import write_texts
from prunescope.sweep.points import Point, read_points
from prunescope.sweep.tables import Measured, Tables, assemble, show, split, write_tables
from prunescope.tasks.evaluate import expand_tasks

__all__ = ["run_sweep"]

_MODEL = ("dtype", "device", "revision", "trust_remote_code")


def run_sweep(config: dict[str, Any]) -> SweepResult:
    """See `prunescope.sweep`, whose options ``config`` holds."""
    started = time.monotonic()
    points = _check(config)
    prompts = read_prompts(config["prompts"])
    dense = load_model(config["model"], **{name: config[name] for name in _MODEL})
    _check_model(dense, points)
    encoded = encode(dense, prompts, config["max_new_tokens"], chat=config["chat"])
    calibration = _calibration(config, dense)
    key = _key(config, dense, encoded, calibration)
    out = config["out"]
    complete = finished(config, key, "another model, other tasks or options")
    if complete is not None and {p.name for p in points} <= set(complete.table()["point"].to_pylist()):
        console.print(f"complete already: {out}", markup=False)
        return SweepResult(complete.info, _tables_of(complete))
    folder = (
        results.staged(out, overwrite=config["overwrite"], resume=config["resume"], keep_parts=True)
        if out is not None
        else nullcontext()
    )
    with folder as staging:
        kept = _Kept(staging, key, [] if complete is None else split(_tables_of(complete)))
        plan = _plan(config, dense, points, encoded, calibration)
        bench = Bench(dense, plan)
        info = {
            **_record(config, dense, started),
            "key": key,
            "prompts": [{"id": prompt.id, "kind": prompt.kind} for prompt in prompts],
            "steps": sum(len(text.continuation) for text in plan.texts),
            "calibration": calibration.describe(),
            "noise_floor": bench.yardstick.floor(dense),
            "points_asked": [point.name for point in points],
        }

        def done(point: Point, found: Measured) -> None:
            kept.add(point, found)
            if staging is not None and "dense" in kept:  # what is there can be opened and drawn, whatever happens next
                write_tables(staging, _state(info, kept, started, complete=False), assemble(kept.ordered(points)))

        todo = [point for point in points if point.name not in kept]
        _measure(config, bench, plan, todo, done, len(points))
        tables = assemble(kept.ordered(points))
        info = _state(info, kept, started, complete=True)
        result = SweepResult(info | {"summary": tables.summary}, tables)
        if staging is not None:
            result._write(staging)
    show(info, tables)
    return result


# --- checks ------------------------------------------------------------------------------------------------------------


def _check(config: Mapping[str, Any]) -> list[Point]:
    """Everything that can be said before the model is loaded. Raises UserError."""
    for name in ("batch_size", "limit", "workers", "max_new_tokens"):
        if config[name] is not None and config[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} {config[name]}: it must be at least 1")
    if not 0 <= config["seed"] < 2**31:
        raise UserError(f"--seed {config['seed']}: it must be from 0 to {2**31 - 1}")
    if not config["metric_temperature"] > 0:
        raise UserError(f"--metric-temperature {config['metric_temperature']}: it must be positive")
    points = read_points(*(config[name] for name in ("target", "n", "method", "sparsity", "pattern")))
    expand_tasks(_tasks(config))
    if config["workers"] > 1 or config["ray_address"] is not None:
        from prunescope.sweep.workers import require_ray

        require_ray()
    if config["out"] is not None:
        results.check_free(config["out"], overwrite=config["overwrite"], resume=config["resume"])
    elif config["resume"]:
        raise UserError("--resume goes on with an interrupted sweep; say where with --out")
    return points


def _tasks(config: Mapping[str, Any]) -> list[str]:
    return [name.strip() for name in config["tasks"].split(",")]


def _check_model(dense: LoadedModel, points: Sequence[Point]) -> None:
    if dense.dropped:
        raise UserError(f"{dense.ref} has sublayers dropped already ({dense.dropped}); give its dense model")
    for point in points:
        if point.dropped:
            check_choice(dense, point.series, point.n or 0, "discrete", False, "stream")  # type: ignore[arg-type]
        elif point.method is not None:
            goal = Goal.parse(point.pattern) if point.pattern else Goal(point.sparsity or 0.0)
            check_prunable(dense, point.method, goal)  # type: ignore[arg-type]


# --- stages ------------------------------------------------------------------------------------------------------------


def _calibration(config: Mapping[str, Any], dense: LoadedModel) -> Calibration:
    return calibration_tokens(
        dense,
        config["calibration"],
        samples=config["samples"],
        seq_len=config["seq_len"],
        seed=config["seed"],
        cache=cache_folder() if config["cache"] else None,
    )


def _plan(
    config: Mapping[str, Any],
    dense: LoadedModel,
    points: Sequence[Point],
    prompts: Sequence[list[int]],
    calibration: Calibration,
) -> Plan:
    """What the points need, found once: the order in which sublayers go, the texts to compare on."""
    targets: list[Any] = list(dict.fromkeys(point.series for point in points if point.dropped))
    cache = cache_folder() if config["cache"] else None
    orders = drop_orders(dense, calibration, targets, cache=cache) if targets else {}
    specs = {p.name: spec_of(orders[p.series][: p.n]) if p.dropped else DropSpec() for p in points}
    return Plan(
        tasks=_tasks(config),
        evaluation={name: config[name] for name in ("limit", "shots", "batch_size", "seed", "allow_code_execution")}
        | {"data": None if config["data"] is None else Path(config["data"])},
        texts=write_texts(dense, prompts, config["max_new_tokens"], batch_size=8),
        comparing={"temperature": config["metric_temperature"], "seed": config["seed"]},
        specs=specs,
        calibration=calibration.tokens if any(point.method for point in points) else None,
    )


def _measure(
    config: Mapping[str, Any],
    bench: Bench,
    plan: Plan,
    todo: Sequence[Point],
    done: Callable[[Point, Measured], None],
    total: int,
) -> None:
    """Measure what is not there yet, here or on workers, and say after each point how long the rest will take."""
    started, first = time.monotonic(), total - len(todo)
    count = 0

    def say(point: Point, found: Measured) -> None:
        nonlocal count
        count += 1
        done(point, found)
        left = (time.monotonic() - started) / count * (len(todo) - count)
        means = ", ".join(f"{kind} {value:.3f}" for kind, value in _means(found).items())
        after = f"; about {_duration(left)} left" if count < len(todo) else ""
        console.print(
            f"{point.title} ({first + count} of {total}): {means}, {found.info['seconds']:.1f} s{after}", markup=False
        )

    if config["workers"] > 1 or config["ray_address"] is not None:
        from prunescope.sweep.workers import measure_spread

        model = {"ref": config["model"]} | {name: config[name] for name in _MODEL}
        measure_spread(todo, model, plan, workers=config["workers"], address=config["ray_address"], done=say)
        return
    for number, point in enumerate(todo):
        elapsed = time.monotonic() - started
        rest = f", about {_duration(elapsed / number * (len(todo) - number))} left for all" if number else ""
        say(point, bench.measure(point, f"{point.title} ({first + number + 1} of {total}{rest})"))


def _means(found: Measured) -> dict[str, float]:
    by_kind: dict[str, list[float]] = {}
    for score in found.info["scores"].values():
        by_kind.setdefault(score["kind"], []).append(score["value"])
    return {kind: sum(values) / len(values) for kind, values in by_kind.items()}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- what is kept ------------------------------------------------------------------------------------------------------


class _Kept:
    """Finished points: in memory, and each in a file of its own in the unfinished folder."""

    def __init__(self, folder: Path | None, key: str, earlier: Sequence[Measured]) -> None:
        self._folder = folder
        self._found = {point.info["point"]: point for point in earlier}
        if folder is None:
            return
        if resume_state(folder, key) is None:
            for path in folder.glob("part-*.parquet"):  # of nobody knows what
                path.unlink()
            save_state(folder, key, [])
        for path in sorted(folder.glob("part-*.parquet")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one is measured again
                point = Measured.unpacked(pq.read_table(path))
                self._found[point.info["point"]] = point
        for point in earlier:
            self._write(point)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def add(self, point: Point, found: Measured) -> None:
        self._found[point.name] = found
        self._write(found)

    def ordered(self, points: Sequence[Point]) -> list[Measured]:
        """The dense model first, then series by series from little to much, those asked for now before those of earlier runs."""
        series = list(dict.fromkeys([*(p.series for p in points), *(f.info["series"] for f in self._found.values())]))

        def place(found: Measured) -> tuple[Any, ...]:
            info = found.info
            return (
                series.index(info["series"]),
                info["method"] or "",
                info["n"] or 0,
                info["sparsity"] or 0,
                info["point"],
            )

        return sorted(self._found.values(), key=place)

    @property
    def names(self) -> list[str]:
        return list(self._found)

    def _write(self, found: Measured) -> None:
        if self._folder is not None:
            path = self._folder / f"part-{found.info['point']}.parquet"
            beside = path.with_suffix(".tmp")
            pq.write_table(found.packed(), beside)
            beside.replace(path)


def _state(info: dict[str, Any], kept: _Kept, started: float, *, complete: bool) -> dict[str, Any]:
    return info | {
        "complete": complete,
        "points_done": kept.names,
        "wall_time_s": round(time.monotonic() - started, 3),
    }


def _record(config: Mapping[str, Any], dense: LoadedModel, started: float) -> dict[str, Any]:
    plain = dict(config) | {"model": str(config["model"])}
    return run_record("sweep", plain | {"dense": plain["model"]}, dense, None, started) | {"config": plain}


def _key(config: Mapping[str, Any], dense: LoadedModel, prompts: Sequence[list[int]], calibration: Calibration) -> str:
    """Names everything that decides what a point gives. Which points are asked for is not part of it."""
    names = ("tasks", "limit", "shots", "batch_size", "seed", "data", "allow_code_execution")
    content = {
        "model": dense.identity,
        "dtype": str(dense.dtype),
        "device": dense.device.type,
        "calibration": {k: v for k, v in calibration.describe().items() if k != "source"},
        "prompts": prompts,
        "versions": {name: version(name) for name in ("prunescope", "torch", "transformers")},
        **{name: config[name] for name in (*names, "max_new_tokens", "metric_temperature")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _tables_of(run: results.Run) -> Tables:
    sweep, items, metrics, correlations = (run.table(name) for name in ("sweep", "items", "metrics", "correlations"))
    return Tables(sweep, items, metrics, correlations, run.summary)
