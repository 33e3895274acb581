"""`prunescope mcq`: the whole vocabulary against the answer options."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from prunescope.cache import cache_folder
from prunescope.compare.context import run_key
from prunescope.compare.familiar import Rung, check_rungs, likenesses, remembered_ladder, usual_ladder
from prunescope.compare.mcq import Asked, ask, mcq_passes, mcq_rows
from prunescope.compare.summary import mcq_summary
from prunescope.data.questions import Question, Template, read_questions
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, SpreadOptions, Stream, listed
from prunescope.jobs.pair import Pair, load_pair
from prunescope.jobs.streaming import Sides, refuse_stream, sides
from prunescope.models.variants import Variant
from prunescope.report.terminal.comparing import show_mcq
from prunescope.results import McqResult
from prunescope.runs.provenance import run_record

__all__ = ["McqOptions", "run"]


@dataclass(frozen=True)
class McqOptions(Options):
    """See `prunescope.mcq`."""

    dense: Model
    target: Model
    questions: str | None
    template: Template
    shots: int
    subjects: str | None
    stream: Stream
    limit: int | None
    metric_temperature: float
    seed: int
    batch_size: int
    memory_mb: int
    ladder: str | None
    cache: bool
    spread: SpreadOptions
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: at least one question is needed")
        super().check()
        check_rungs(self.ladder)
        refuse_stream(self.stream, self.hindrance)
        if self.shots and self.template != "cue":
            raise UserError(f"--shots {self.shots} go with --template cue, not with {self.template}")

    @property
    def hindrance(self) -> str | None:
        """Why the models cannot stay on disk."""
        ladder = None if self.ladder is None else "the ladder quantises the dense model in memory; leave --ladder out"
        return self.spread.hindrance or ladder


def run(options: McqOptions) -> McqResult:
    started = time.monotonic()
    options.check()
    subjects = listed(options.subjects) if options.subjects else []
    questions, shots = read_questions(options.questions, shots=options.shots, subjects=subjects)
    questions = questions[: options.limit]
    with sides(
        options.dense, options.target, options.loading, options.output, options.stream, options.memory_mb, options.hindrance
    ) as found:  # fmt: skip
        result, complete = _asked(options, found, questions, shots, started)
    if complete:
        options.output.say_complete()
        return result
    show_mcq(result.info)
    options.output.say_written()
    return result


def _asked(
    options: McqOptions,
    both: Sides,
    questions: Sequence[Question],
    shots: dict[str, list[Question]],
    started: float,
) -> tuple[McqResult, bool]:
    """The result, and whether it was there already."""
    pair = both.pair
    asked = ask(pair.dense, questions, options.template, shots)
    for other in pair.models[1:]:
        ask(other, questions, options.template, shots)  # its context may be shorter
    tokens: list[Any] = [[q.tokens, q.option_tokens, q.question.answer] for q in asked]
    key = run_key(pair.dense, pair.target, tokens, "mcq", options.batch_size, options.metric_temperature)
    if done := options.output.complete(key):
        return McqResult.of_run(done), True
    passes = mcq_passes(asked, options.batch_size)
    options.output.require_space(len(asked) * 8000 + 2**24 + both.bytes_read(*passes))
    with (
        both.reading(options.output, key, *passes) as parts,
        options.spread.started(load_pair, [options.dense, options.target], options.loading, pair.dense) as workers,
    ):
        found = mcq_rows(
            pair.dense, pair.pruned, asked, batch_size=options.batch_size, temperature=options.metric_temperature,
            memory=options.memory_mb * 2**20, parts=parts, key=key, workers=workers,
        )  # fmt: skip
        info = {
            **run_record("mcq", options.config(), pair.dense.device, pair.describe(), started),
            "placement": both.placement.describe(),
            "key": key,
            "questions": len(asked),
            "noise_floor": found.floor,
            **mcq_summary(found.table, options.seed),
        }
        ladders = _ladders(options, pair, asked)
        info["ladder"] = {space: [asdict(rung) for rung in rungs] for space, rungs in ladders.items()}
        info["like"] = {
            space: words
            for space, rungs in ladders.items()
            for words in likenesses(
                {space: info["summary_by_space"][space]["p"]["kl_dense_target"]["mean"]}, rungs
            ).values()
        }
        decode = pair.dense.tokenizer.decode
        samples = [_sample(decode, number, question, found.tops[number]) for number, question in enumerate(asked)]
        result = McqResult(info, found.table, samples)
        if parts is not None and options.output.out is not None:
            result.write(parts)
    return result, False


def _ladders(options: McqOptions, pair: Pair, asked: Sequence[Asked]) -> dict[str, list[Rung]]:
    """The dense model's rungs on these questions, over the whole vocabulary and over the options: those asked for, else those that are cached."""
    text = hashlib.sha256(repr([(q.tokens, q.option_tokens) for q in asked]).encode()).hexdigest()
    temperature, found = options.metric_temperature, {}

    def measure(space: str, variant: Variant) -> tuple[float, float]:
        name = str(variant.spec)
        if name not in found:
            found[name] = mcq_rows(
                pair.dense, variant, asked, batch_size=options.batch_size, temperature=temperature, memory=options.memory_mb * 2**20
            ).table  # fmt: skip
        kls = found[name].filter(pc.equal(found[name]["space"], space))["kl_dense_target"].to_numpy()
        return float(kls.mean()), float(kls.std() / math.sqrt(max(1, len(kls) - 1)))

    return {
        space: remembered_ladder(
            pair.dense, f"{text} {space}", check_rungs(options.ladder) or usual_ladder(),
            None if options.ladder is None else lambda variant, space=space: measure(space, variant),  # type: ignore[misc]
            temperature=temperature, cache=cache_folder() if options.cache else None,
        )
        for space in ("global", "options")
    }  # fmt: skip


def _sample(decode: Callable[[list[int]], str], number: int, asked: Asked, tops: dict[str, Any]) -> dict[str, Any]:
    """What `samples.jsonl` holds of a question: the prompt, the options, and the most likely tokens of both models."""
    row: dict[str, Any] = {
        "question": number,
        "id": asked.question.id,
        "subject": asked.question.subject,
        "text": asked.text,
        "choices": list(asked.question.choices),
        "gold": asked.question.answer,
        "option_strings": asked.options,
        "option_tokens": [tokens[0] for tokens in asked.option_tokens] if asked.by_token else None,
    }
    for side, ours, theirs in (("dense", "p_dense", "p_target"), ("target", "p_target", "p_dense")):
        row[f"top_{side}"] = [
            {"token": int(token), "text": decode([int(token)]), ours: p, theirs: q}
            for token, p, q in zip(*tops[side], strict=True)
        ]
    return row
