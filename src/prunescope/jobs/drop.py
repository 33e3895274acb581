"""`prunescope drop`: score sublayers, drop the least needed, save a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prunescope.cache import cache_folder
from prunescope.data.calibration import calibration_tokens
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions
from prunescope.models.anatomy import KINDS
from prunescope.prune.select import DropTarget, Order, ScoreOn, check_choice, choose_sublayers
from prunescope.report.terminal.pruning import show_scores
from prunescope.results import DropResult

__all__ = ["DropOptions", "run"]


@dataclass(frozen=True)
class DropOptions(Options):
    """See `prunescope.drop`."""

    model: Model
    target: DropTarget
    n: int
    format: Literal["recipe", "zeroed", "compact"]
    order: Order
    iterative: bool
    score_on: ScoreOn
    calibration: str
    samples: int | None
    seq_len: int | None
    batch_size: int | None
    seed: int
    cache: bool
    loading: LoadOptions
    output: OutputOptions


def run(options: DropOptions) -> DropResult:
    options.check()
    dense = options.loading.load(options.model)
    if dense.dropped:
        raise UserError(f"{options.model} has sublayers dropped already ({dense.dropped}); give its dense model")
    target, n = options.target, options.n
    check_choice(dense, target, n, options.order, options.iterative, options.score_on)
    cache = cache_folder() if options.cache else None
    calibration = calibration_tokens(
        dense, options.calibration, samples=options.samples, seq_len=options.seq_len, seed=options.seed,
        batch_size=options.batch_size or 32, cache=cache,
    )  # fmt: skip
    choice = choose_sublayers(
        dense, calibration, target, n, order=options.order, iterative=options.iterative, score_on=options.score_on,
        batch_size=options.batch_size or 8, cache=cache,
    )  # fmt: skip
    before = sum(p.numel() for p in dense.model.parameters())
    with dense.dropping(choice.spec):
        after = sum(p.numel() for p in dense.model.parameters())
    record: dict[str, Any] = {
        "command": "drop",
        "config": options.config(),
        "target": target,
        "calibration": calibration.describe(),
        "parameters": {"dense": before, "dropped": after},
        **{f"drop_{kind}_list": list(choice.spec.layers(kind)) for kind in KINDS},
    }
    result = DropResult(record, choice.rows, choice.spec, dense)
    show_scores(
        result.rows, f"{options.model}: {n} of {target} dropped, {before / 1e6:.1f} M -> {after / 1e6:.1f} M parameters"
    )
    if options.output.out is not None:
        result.save(options.output.out, format=options.format, overwrite=options.output.overwrite)
    options.output.say_written(f" ({options.format})")
    return result
