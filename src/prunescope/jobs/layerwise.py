"""`prunescope layerwise`: h, z and p after every sublayer, in the same context."""

from __future__ import annotations

import time
from dataclasses import dataclass

from prunescope.compare.context import run_key
from prunescope.compare.layerwise import Lens, layerwise_rows
from prunescope.compare.summary import layerwise_summary
from prunescope.data.prompts import read_prompts
from prunescope.data.tokens import encode
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions
from prunescope.jobs.pair import Pair
from prunescope.models.generating import Sampling
from prunescope.report.terminal.comparing import show_layerwise
from prunescope.results import LayerwiseResult
from prunescope.runs.provenance import run_record

__all__ = ["LayerwiseOptions", "run"]


@dataclass(frozen=True)
class LayerwiseOptions(Options):
    """See `prunescope.layerwise`."""

    dense: Model
    target: Model | None
    prompts: str | None
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
    loading: LoadOptions
    output: OutputOptions


def run(options: LayerwiseOptions) -> LayerwiseResult:
    started = time.monotonic()
    options.check()
    prompts = read_prompts(options.prompts)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    sampling.check()
    pair = Pair.load(options.dense, options.target, options.loading, blocks=True)
    steps, stop = options.max_new_tokens, not options.ignore_eos
    encoded = encode(pair.dense, prompts, steps, chat=options.chat)
    settings = (steps, sampling, stop, options.batch_size, options.lens, options.metric_temperature)
    if done := options.output.complete(run_key(pair.dense, pair.target, encoded, *settings)):
        options.output.say_complete()
        return LayerwiseResult.of_run(done)
    options.output.require_space(2 * len(encoded) * steps * 2 * len(pair.dense.anatomy) * 60 * 8 + 2**24)
    with options.output.staged() as staging, pair.blaming():
        found = layerwise_rows(
            pair.dense, pair.target, encoded, max_new_tokens=steps, sampling=sampling, stop=stop, batch_size=options.batch_size,
            lens=options.lens, temperature=options.metric_temperature, memory=options.memory_mb * 2**20, parts=staging,
        )  # fmt: skip
        info = {
            **run_record("layerwise", options.config(), pair.dense.device, pair.describe(), started),
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
    show_layerwise(found.table, info)
    options.output.say_written()
    return result
