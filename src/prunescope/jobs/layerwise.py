"""`prunescope layerwise`: h, z and p after every sublayer, in the same context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunescope.compare.context import Transcript
from prunescope.compare.layerwise import LayerwiseRows, Lens, layerwise_key, layerwise_rows
from prunescope.compare.streamed import rows_bytes, streamed_layerwise_rows
from prunescope.compare.summary import layerwise_summary
from prunescope.data.continuations import Continued, encode_continued, read_continuations
from prunescope.data.prompts import Prompt, read_prompts
from prunescope.data.tokens import encode
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, SpreadOptions, Stream
from prunescope.jobs.pair import Pair, load_pair
from prunescope.jobs.streaming import Placement, StreamedPair, place, refuse_stream, stream_folder, write_texts
from prunescope.models.generating import Sampling
from prunescope.models.loaded import LoadedModel
from prunescope.report.terminal.comparing import show_layerwise
from prunescope.results import LayerwiseResult
from prunescope.runs.parts import resume_state, save_state
from prunescope.runs.provenance import run_record

__all__ = ["LayerwiseOptions", "run"]


@dataclass(frozen=True)
class LayerwiseOptions(Options):
    """See `prunescope.layerwise`."""

    dense: Model
    target: Model | None
    prompts: str | None
    continuations: str | None
    stream: Stream
    chat: bool
    max_new_tokens: int
    lens: Lens
    metric_temperature: float
    temperature: float
    top_k: int
    top_p: float
    ignore_eos: bool
    seed: int
    batch_size: int
    memory_mb: int
    spread: SpreadOptions
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        super().check()
        if self.continuations is not None and self.prompts is not None:
            raise UserError("--continuations holds the prompts too; leave --prompts out")
        refuse_stream(self.stream, self.spread.hindrance)

    def settings(self) -> tuple[Any, ...]:
        """What decides the rows beside models and texts."""
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.seed)
        return (
            *(self.max_new_tokens, sampling, not self.ignore_eos),
            *(self.batch_size, self.lens, self.metric_temperature),
        )


def run(options: LayerwiseOptions) -> LayerwiseResult:
    started = time.monotonic()
    options.check()
    given = None if options.continuations is None else read_continuations(options.continuations)
    prompts = read_prompts(options.prompts) if given is None else [row.prompt for row in given]
    options.settings()[1].check()
    placement = place(
        options.stream, options.dense, options.target, options.loading, options.memory_mb, options.spread.hindrance
    )
    if placement.streamed:
        result, complete = _streamed(options, given, prompts, placement, started)
    else:
        result, complete = _loaded(options, given, prompts, started)
    if complete:
        options.output.say_complete()
        return result
    show_layerwise(result.table(), result.info)
    options.output.say_written()
    return result


def _loaded(
    options: LayerwiseOptions, given: Sequence[Continued] | None, prompts: Sequence[Prompt], started: float
) -> tuple[LayerwiseResult, bool]:
    """The result, and whether it was there already."""
    settings = options.settings()
    pair = Pair.load(options.dense, options.target, options.loading, blocks=True)
    steps = options.max_new_tokens
    encoded, texts = _encoded(options, pair.dense, given, prompts)
    if done := options.output.complete(layerwise_key(pair.dense, pair.target, encoded, texts, *settings)):
        return LayerwiseResult.of_run(done), True
    options.output.require_space(_table_bytes(options, len(encoded), len(pair.dense.anatomy)))
    with (
        options.output.staged() as staging,
        pair.blaming(),
        options.spread.started(load_pair, [options.dense, options.target], options.loading, pair.dense) as workers,
    ):
        found = layerwise_rows(
            pair.dense, pair.target, encoded, max_new_tokens=steps, sampling=settings[1], stop=not options.ignore_eos,
            batch_size=options.batch_size, lens=options.lens, temperature=options.metric_temperature, memory=options.memory_mb * 2**20,
            parts=staging, texts=texts, workers=workers,
        )  # fmt: skip
        return _finished(options, pair, Placement(False), prompts, found, staging, started), False


def _encoded(
    options: LayerwiseOptions, dense: LoadedModel, given: Sequence[Continued] | None, prompts: Sequence[Prompt]
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids of the prompts, and of their continuations where they are given."""
    if given is None:
        return encode(dense, prompts, options.max_new_tokens, chat=options.chat), None
    return encode_continued(dense, given, options.max_new_tokens, chat=options.chat)


def _streamed(
    options: LayerwiseOptions,
    given: Sequence[Continued] | None,
    prompts: Sequence[Prompt],
    placement: Placement,
    started: float,
) -> tuple[LayerwiseResult, bool]:
    """The same with both models on disk."""
    output, steps = options.output, options.max_new_tokens
    with (
        stream_folder(output) as folder,
        closing(StreamedPair.open(options.dense, options.target, options.loading, folder / "scratch")) as streamed,
    ):
        pair = streamed.pair
        encoded, texts = _encoded(options, pair.dense, given, prompts)
        key = layerwise_key(pair.dense, pair.target, encoded, texts, *options.settings())
        if done := output.complete(key):
            return LayerwiseResult.of_run(done), True
        longest = [Transcript(prompt, [0] * steps) for prompt in encoded]
        output.require_space(
            _table_bytes(options, len(encoded), len(pair.dense.anatomy))
            + rows_bytes(streamed.dense, streamed.target, longest)
        )
        written = resume_state(folder, key) or texts  # complains of another run's parts
        with pair.blaming():
            if written is None:
                stop, sampling = not options.ignore_eos, options.settings()[1]
                written = write_texts(streamed.dense, encoded, steps, sampling, stop=stop)
                save_state(folder, key, written)
            sequences = [Transcript(prompt, text) for prompt, text in zip(encoded, written, strict=True)]
            found = streamed_layerwise_rows(
                streamed.dense, streamed.target, sequences, key, folder, batch_size=options.batch_size, lens=options.lens,
                temperature=options.metric_temperature, memory=options.memory_mb * 2**20,
            )  # fmt: skip
        staging = None if output.out is None else folder
        return _finished(options, pair, placement, prompts, found, staging, started), False


def _table_bytes(options: LayerwiseOptions, prompts: int, layers: int) -> int:
    return 2 * prompts * options.max_new_tokens * 2 * layers * 60 * 8 + 2**24


def _finished(
    options: LayerwiseOptions,
    pair: Pair,
    placement: Placement,
    prompts: Sequence[Prompt],
    found: LayerwiseRows,
    staging: Path | None,
    started: float,
) -> LayerwiseResult:
    """Write what was found into ``staging``, and show it."""
    info = {
        **run_record("layerwise", options.config(), pair.dense.device, pair.describe(), started),
        "placement": placement.describe(),
        "key": found.key,
        "prompts": [{"id": prompt.id, "kind": prompt.kind} for prompt in prompts],
        "steps": sum(len(text.continuation) for text in found.sequences),
        "noise_floor": found.floor,
        **layerwise_summary(found.table, options.seed),
    }
    decode = pair.dense.tokenizer.decode
    samples = [
        {
            "prompt": number,
            "id": prompt.id,
            "kind": prompt.kind,
            "text": prompt.text,
            "prompt_tokens": text.prompt,
            "dense_tokens": text.continuation,
            "dense": decode(text.continuation),
            "dense_pieces": [decode([token]) for token in text.continuation],
        }
        for number, (prompt, text) in enumerate(zip(prompts, found.sequences, strict=True))
    ]
    result = LayerwiseResult(info, found.table, samples)
    if staging is not None:
        result.write(staging)
    return result
