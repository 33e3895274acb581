"""What `advise` measures itself where it is given no runs: a sweep of the model, and the speed of the points that keep a use. Each says first
what it will cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prunescope.data.prompts import read_prompts
from prunescope.data.tokens import encode
from prunescope.errors import UserError
from prunescope.jobs import speed as speed_job
from prunescope.jobs import sweep as sweep_job
from prunescope.jobs.options import LoadOptions, OutputOptions, SpreadOptions
from prunescope.models.loaded import LoadedModel
from prunescope.progress import console
from prunescope.results import SweepResult
from prunescope.sweep.advice import Advised
from prunescope.sweep.comparison import DenseReference, write_texts
from prunescope.sweep.points import read_points
from prunescope.tasks import quick
from prunescope.tasks.evaluate import evaluate_model, expand_tasks

__all__ = ["measure_speed", "measure_sweep", "tasks_for"]

_TARGETS, _FORMATS = "attn,mlp,block", "int8,int4-g128"
_SHARES = (1 / 15, 2 / 15, 4 / 15)  # of the blocks: 2, 4 and 8 of 30
_BATCH = 8
_REPEATS = 5
_STEPS = 16  # of each prompt, on which h, z and p are compared


def tasks_for(use: str) -> str:
    """The built-in tasks that measure a use.

    Raises:
        UserError: there are none.
    """
    known = {"writing": "quick-gen", "choice": "quick-mc", "maths": "arithmetic-gen,arithmetic-mc"}
    if use in known:
        return known[use]
    if use in quick.QUICK:
        return use
    raise UserError(
        f"--use {use}: no built-in task measures it; sweep with tasks of lm-evaluation-harness (`prunescope sweep MODEL --tasks ...`), then give --sweep"
    )


def measure_sweep(
    model: str, use: str, limit: int, seed: int, loading: LoadOptions, output: OutputOptions
) -> SweepResult:
    """Sweep the model at a few sizes of every kind: attention, MLP, blocks, two formats. Says first how long it will take.

    Args:
        limit: items of each task.
        output: of the sweep; an interrupted one goes on.
    """
    tasks = tasks_for(use)
    loaded = loading.load(model)
    blocks = len(loaded.anatomy)
    n = ",".join(map(str, dict.fromkeys([0, *(max(1, round(share * blocks)) for share in _SHARES)])))
    points = read_points(_TARGETS, n, None, None, None, _FORMATS, None)
    names = expand_tasks(tasks.split(","))
    seconds = _seconds(loaded, names, limit, seed) * len(points)
    kept = f"; it is kept in {output.out} and continues from there if interrupted" if output.out else "; --out keeps it"
    console.print(
        f"no sweep given, so one is run first: {len(points)} points ({_TARGETS} n = {n}; {_FORMATS}), {len(names)} task{'s' if len(names) > 1 else ''} of {limit} items, "
        f"about {_duration(seconds)} on this machine{kept}",
        markup=False,
    )
    return sweep_job.run(
        sweep_job.SweepOptions(
            model=loaded, target=_TARGETS, n=n, method=None, sparsity=None, pattern=None, quant=_FORMATS, join=None, sparse_bytes=False,
            ladder=None, tasks=tasks, limit=limit, shots=None, data=None, allow_code_execution=False, prompts=None, chat=False,
            max_new_tokens=_STEPS, metric_temperature=1.0, calibration="self", samples=None, seq_len=None, batch_size=_BATCH,
            seed=seed, cache=True, spread=SpreadOptions(1, None), loading=loading, output=output,
        )
    )  # fmt: skip


def _seconds(loaded: LoadedModel, tasks: Sequence[str], limit: int, seed: int) -> float:
    """Of one point: one batch of each task, times the batches, and the comparison of h, z and p on the shipped prompts."""
    texts = write_texts(loaded, encode(loaded, read_prompts(None), _STEPS), _STEPS, batch_size=_BATCH)
    reference = DenseReference(loaded, texts)
    started = time.monotonic()
    evaluate_model(loaded, tasks, limit=min(limit, _BATCH), batch_size=_BATCH, seed=seed)
    scored = time.monotonic()
    reference.measure(loaded)
    return (scored - started) * -(-limit // _BATCH) + time.monotonic() - scored


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def measure_speed(
    model: str, points: Sequence[Advised], dropped: dict[str, str], loading: LoadOptions, output: OutputOptions
) -> list[dict[str, Any]]:
    """Rows of a speed run of the dense model and of the points that keep the use and drop whole sublayers.

    Zeros and rounding are imitated in memory by a sweep and run at the dense speed, so only these are timed.

    Args:
        dropped: point -> its sublayers, as after ``drop:``.
    """
    names = [
        f"drop:{dropped[one.point]}" for one in points if one.change == "drop" and one.verdict in ("safe", "likely")
    ]
    if not names:
        return []
    console.print(
        f"no speed run given, so {len(names) + 1} models are timed first: a prompt of 128 tokens and 32 new ones, {_REPEATS} times each",
        markup=False,
    )
    found = speed_job.run(
        speed_job.SpeedOptions(
            models=[model, *dict.fromkeys(names)], batch_size="1", length=128, max_new_tokens=32, repeats=_REPEATS, sparse_kernels=False,
            seed=0, engine="transformers", engine_python=None, loading=loading, output=output,
        )
    )  # fmt: skip
    rows: list[dict[str, Any]] = found.table().to_pylist()
    return rows
