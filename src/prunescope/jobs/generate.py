"""`prunescope generate`: h, z and p at every step while both models write."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from prunescope.cache import cache_folder
from prunescope.compare.familiar import check_rungs, likenesses
from prunescope.compare.generation import (
    FREE,
    TEACHER,
    GenerationRows,
    Regime,
    generation_key,
    generation_passes,
    generation_rows,
)
from prunescope.compare.summary import generation_summary
from prunescope.data.continuations import Continued, encode_continued, read_continuations
from prunescope.data.prompts import Prompt, read_prompts
from prunescope.data.tokens import encode
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, SpreadOptions, Stream
from prunescope.jobs.pair import Pair, load_pair
from prunescope.jobs.streaming import UNWRITTEN, Sides, refuse_stream, sides
from prunescope.models.generating import Sampling, end_tokens
from prunescope.models.loaded import LoadedModel
from prunescope.progress import console
from prunescope.report.terminal.comparing import show_generation
from prunescope.results import GenerateResult
from prunescope.runs.provenance import run_record
from prunescope.sweep.comparison import ladder_of

__all__ = ["GenerateOptions", "run"]


@dataclass(frozen=True)
class GenerateOptions(Options):
    """See `prunescope.generate`."""

    dense: Model
    target: Model
    prompts: str | None
    continuations: str | None
    stream: Stream
    chat: bool
    max_new_tokens: int
    regime: Regime
    metric_temperature: float
    temperature: float
    top_k: int
    top_p: float
    ignore_eos: bool
    seed: int
    batch_size: int
    memory_mb: int
    ladder: str | None
    cache: bool
    spread: SpreadOptions
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        super().check()
        check_rungs(self.ladder)
        if self.continuations is not None and self.prompts is not None:
            raise UserError("--continuations holds the prompts too; leave --prompts out")
        if self.continuations is not None and self.regime == FREE:
            raise UserError(
                "--continuations: both models read these texts, which is teacher-forced; free-running, each writes its own, so leave --regime or --continuations out"
            )
        refuse_stream(self.stream, self.hindrance)

    @property
    def hindrance(self) -> str | None:
        """Why the models cannot stay on disk."""
        if self.spread.hindrance or self.continuations is None:
            return self.spread.hindrance or UNWRITTEN
        return None if self.ladder is None else "the ladder quantises the dense model in memory; leave --ladder out"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def run(options: GenerateOptions) -> GenerateResult:
    started = time.monotonic()
    options.check()
    given = None if options.continuations is None else read_continuations(options.continuations)
    prompts = read_prompts(options.prompts) if given is None else [row.prompt for row in given]
    options.sampling.check()
    if given is not None and options.regime == "both":
        console.print("free-running rows are left out: both models read the texts of --continuations", markup=False)
    with sides(
        options.dense, options.target, options.loading, options.output, options.stream, options.memory_mb, options.hindrance
    ) as both:  # fmt: skip
        result, complete = _compared(options, both, given, prompts, started)
    if complete:
        options.output.say_complete()
        return result
    show_generation(result.info)
    options.output.say_written()
    return result


def _compared(
    options: GenerateOptions, both: Sides, given: Sequence[Continued] | None, prompts: Sequence[Prompt], started: float
) -> tuple[GenerateResult, bool]:
    """The result, and whether it was there already."""
    pair, sampling = both.pair, options.sampling
    steps, stop = options.max_new_tokens, not options.ignore_eos
    regime: Regime = options.regime if given is None else "teacher-forced"
    encoded, texts = _encoded(options, pair.dense, given, prompts)
    for other in pair.models[1:]:
        _encoded(options, other, given, prompts)  # its context may be shorter
    settings = (steps, sampling, stop, regime, options.batch_size, options.metric_temperature)
    key = generation_key(pair.dense, pair.target, encoded, *settings, *([] if texts is None else [texts]))
    if done := options.output.complete(key):
        return GenerateResult.of_run(done), True
    passes = ([], []) if texts is None else generation_passes(encoded, texts, options.batch_size)
    options.output.require_space(2 * len(encoded) * steps * 2 * 60 * 8 + 2**24 + both.bytes_read(*passes))
    with (
        both.reading(options.output, key, *passes) as parts,
        options.spread.started(load_pair, [options.dense, options.target], options.loading, pair.dense) as workers,
    ):
        found = generation_rows(
            pair.dense, pair.pruned, encoded, max_new_tokens=steps, sampling=sampling, stop=stop, regime=regime,
            batch_size=options.batch_size, temperature=options.metric_temperature, memory=options.memory_mb * 2**20, parts=parts, key=key,
            texts=texts, workers=workers,
        )  # fmt: skip
        ours = [text.continuation for text in found.dense]
        theirs = None if found.target is None else [text.continuation for text in found.target]
        ends = (end_tokens(pair.dense), end_tokens(pair.models[-1]))
        info = {
            **run_record("generate", options.config(), pair.dense.device, pair.describe(), started),
            "placement": both.placement.describe(),
            "key": key,
            "prompts": [{"id": prompt.id, "kind": prompt.kind} for prompt in prompts],
            "steps": sum(map(len, ours)),
            "noise_floor": found.floor,
            "decoding": found.decoding,
            **generation_summary(found.table, ours, theirs, ends, steps, options.seed),
        }
        rungs = ladder_of(
            pair.dense, found.dense, None if options.ladder is None else check_rungs(options.ladder), batch_size=options.batch_size,
            temperature=options.metric_temperature, cache=cache_folder() if options.cache else None,
        )  # fmt: skip
        forced = info["summary_by_regime"].get(TEACHER, {})  # a rung reads the dense model's texts too
        kl = forced.get("p", {}).get("kl_dense_target")
        info["ladder"] = [asdict(rung) for rung in rungs]
        info["like"] = likenesses({TEACHER: kl["mean"]}, rungs).get(TEACHER) if kl else None
        samples = [_sample(pair, number, prompt, found, info) for number, prompt in enumerate(prompts)]
        result = GenerateResult(info, found.table, samples)
        if parts is not None and options.output.out is not None:
            result.write(parts)
    return result, False


def _encoded(
    options: GenerateOptions, loaded: LoadedModel, given: Sequence[Continued] | None, prompts: Sequence[Prompt]
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids of the prompts, and of their continuations where they are given."""
    if given is None:
        return encode(loaded, prompts, options.max_new_tokens, chat=options.chat), None
    return encode_continued(loaded, given, options.max_new_tokens, chat=options.chat)


def _sample(pair: Pair, number: int, prompt: Prompt, found: GenerationRows, info: dict[str, Any]) -> dict[str, Any]:
    """What `samples.jsonl` holds of a prompt: the texts whole and token by token, and the text of every token among the most likely."""
    tokenizer = pair.dense.tokenizer
    ours, theirs = found.dense[number], None if found.target is None else found.target[number]
    row: dict[str, Any] = {
        "prompt": number,
        "id": prompt.id,
        "kind": prompt.kind,
        "text": prompt.text,
        "prompt_tokens": ours.prompt,
    }
    for side, sequence in (("dense", ours), ("target", theirs)):
        if sequence is None:
            continue
        row[f"{side}_tokens"] = sequence.continuation
        row[side] = tokenizer.decode(sequence.continuation)
        row[f"{side}_pieces"] = [tokenizer.decode([token]) for token in sequence.continuation]
    if theirs is not None:
        row["first_difference"] = info["first_difference"]["by_prompt"][number]
    rows = found.table.filter(pc.equal(found.table["prompt"], number))
    named = {int(token) for name in ("top_dense", "top_target") for token in pc.list_flatten(rows[name]).to_pylist()}
    row["token_texts"] = {str(token): tokenizer.decode([token]) for token in sorted(named)}
    return row
