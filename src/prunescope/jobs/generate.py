"""`prunescope generate`: h, z and p at every step while both models write."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from prunescope.cache import cache_folder
from prunescope.compare.familiar import check_rungs, likenesses
from prunescope.compare.generation import TEACHER, GenerationRows, Regime, generation_key, generation_rows
from prunescope.compare.summary import generation_summary
from prunescope.data.prompts import Prompt, read_prompts
from prunescope.data.tokens import encode
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, SpreadOptions
from prunescope.jobs.pair import Pair, load_pair
from prunescope.models.generating import Sampling, end_tokens
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


def run(options: GenerateOptions) -> GenerateResult:
    started = time.monotonic()
    options.check()
    prompts = read_prompts(options.prompts)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    sampling.check()
    pair = Pair.load(options.dense, options.target, options.loading)
    steps, stop = options.max_new_tokens, not options.ignore_eos
    encoded = encode(pair.dense, prompts, steps, chat=options.chat)
    for other in pair.models[1:]:
        encode(other, prompts, steps, chat=options.chat)  # its context may be shorter
    key = generation_key(
        pair.dense, pair.target, encoded, steps, sampling, stop, options.regime, options.batch_size, options.metric_temperature
    )  # fmt: skip
    if done := options.output.complete(key):
        options.output.say_complete()
        return GenerateResult.of_run(done)
    options.output.require_space(2 * len(encoded) * steps * 2 * 60 * 8 + 2**24)
    with (
        options.output.staged() as staging,
        pair.blaming(),
        options.spread.started(load_pair, [options.dense, options.target], options.loading, pair.dense) as workers,
    ):
        found = generation_rows(
            pair.dense, pair.pruned, encoded, max_new_tokens=steps, sampling=sampling, stop=stop, regime=options.regime,
            batch_size=options.batch_size, temperature=options.metric_temperature, memory=options.memory_mb * 2**20, parts=staging, key=key,
            workers=workers,
        )  # fmt: skip
        ours = [text.continuation for text in found.dense]
        theirs = None if found.target is None else [text.continuation for text in found.target]
        ends = (end_tokens(pair.dense), end_tokens(pair.models[-1]))
        info = {
            **run_record("generate", options.config(), pair.dense.device, pair.describe(), started),
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
        if staging is not None:
            result.write(staging)
    show_generation(info)
    options.output.say_written()
    return result


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
