"""`prunescope divergence`: llama.cpp's KL table over a text, without a file of logits."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from prunescope.cache import cache_folder
from prunescope.compare.divergence import divergence_key, divergence_passes, divergence_rows, read_slices
from prunescope.compare.divergence_summary import divergence_summary, worst_passages
from prunescope.compare.familiar import like_rung, measure_ladder, usual_ladder
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, SpreadOptions, Stream, listed
from prunescope.jobs.pair import load_pair
from prunescope.jobs.streaming import Sides, refuse_stream, sides
from prunescope.models import ggml
from prunescope.models.quantised import QuantSpec
from prunescope.report.terminal.divergence import show_divergence
from prunescope.results import DivergenceResult
from prunescope.runs.provenance import run_record

__all__ = ["DivergenceOptions", "run"]

_ROW_BYTES = 400  # of a scored token on the disk, its finished part included


@dataclass(frozen=True)
class DivergenceOptions(Options):
    """See `prunescope.divergence`."""

    dense: Model
    target: Model
    text: str
    context: int
    chunks: int | None
    scale: bool
    ladder: str | None
    metric_temperature: float
    seed: int
    batch_size: int
    memory_mb: int
    cache: bool
    stream: Stream
    spread: SpreadOptions
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        super().check()
        refuse_stream(self.stream, self.hindrance)
        for name in self.rungs:
            ggml.check(QuantSpec.parse(name).scheme)

    @property
    def rungs(self) -> list[str]:
        """The types that the model's own ladder is made of; none where the scale is not asked for."""
        if not self.scale:
            return []
        if self.ladder is None:
            return list(usual_ladder())
        return listed(self.ladder)

    @property
    def hindrance(self) -> str | None:
        """Why the models cannot stay on disk."""
        ladder = (
            "the ladder quantises the dense model in memory; leave it out with --scale false" if self.scale else None
        )
        return self.spread.hindrance or ladder


def run(options: DivergenceOptions) -> DivergenceResult:
    started = time.monotonic()
    options.check()
    with sides(
        options.dense, options.target, options.loading, options.output, options.stream, options.memory_mb, options.hindrance
    ) as found:  # fmt: skip
        result, complete = _measured(options, found, started)
    if complete:
        options.output.say_complete()
        return result
    show_divergence(result.info | {"worst": result.samples()})
    options.output.say_written()
    return result


def _measured(
    options: DivergenceOptions,
    both: Sides,
    started: float,
) -> tuple[DivergenceResult, bool]:
    """The result, and whether it was there already."""
    pair = both.pair
    slices = read_slices(pair.dense, options.text, context=options.context, chunks=options.chunks)
    for other in pair.models[1:]:
        read_slices(other, options.text, context=options.context, chunks=options.chunks)  # its context may be shorter
    temperature, memory = options.metric_temperature, options.memory_mb * 2**20
    key = divergence_key(pair.dense, pair.pruned, slices, options.batch_size, temperature, options.rungs)
    if done := options.output.complete(key, "other models, texts or options"):
        return DivergenceResult.of_run(done), True
    scored = sum(len(piece.chunks) * piece.context for piece in slices) // 2
    passes = divergence_passes(slices, options.batch_size)
    options.output.require_space(2 * scored * _ROW_BYTES + 2**24 + both.bytes_read(*passes))
    with (
        both.reading(options.output, key, *passes) as parts,
        options.spread.started(load_pair, [options.dense, options.target], options.loading, pair.dense) as workers,
    ):
        found = divergence_rows(
            pair.dense, pair.pruned, slices, batch_size=options.batch_size, temperature=temperature, memory=memory, parts=parts, key=key,
            workers=workers,
        )  # fmt: skip
        ladder = []
        if options.rungs:
            ladder = measure_ladder(
                pair.dense, slices, options.rungs, batch_size=options.batch_size, temperature=temperature, memory=memory,
                cache=cache_folder() if options.cache else None,
            )  # fmt: skip
        summary = divergence_summary(found.table, seed=options.seed)
        info: dict[str, Any] = {
            **run_record("divergence", options.config(), pair.dense.device, pair.describe(), started),
            "placement": both.placement.describe(),
            "key": key,
            "slices": [{"name": piece.name, "tokens": piece.tokens, "chunks": len(piece.chunks)} for piece in slices],
            "noise_floor": found.floor,
            "ladder": [asdict(rung) for rung in ladder],
            "like": str(like_rung(summary["table"]["kl_dense_target"]["mean"][0], ladder)) if ladder else None,
            **summary,
        }
        chunks = dict(enumerate(chunk.tolist() for piece in slices for chunk in piece.chunks))
        result = DivergenceResult(info, found.table, worst_passages(found.table, chunks, pair.dense.tokenizer.decode))
        if parts is not None and options.output.out is not None:
            result.write(parts)
    return result, False
