"""`prunescope generate` and `prunescope mcq` from their options to a finished run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from prunescope.commands import GenerateResult, McqResult
from prunescope.compare.generation import GenerationRows, check_pair, generation_key, generation_rows
from prunescope.compare.layerwise import encode, run_key
from prunescope.compare.mcq import Asked, ask, mcq_rows
from prunescope.compare.summary import generation_summary, mcq_summary
from prunescope.data.prompts import read_prompts
from prunescope.data.questions import read_questions
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import Sampling, end_tokens
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.report.terminal import show_generation, show_mcq
from prunescope.runs import folder as results
from prunescope.runs.provenance import describe_target, run_record

__all__ = ["run_generate", "run_mcq"]


@dataclass
class Pair:
    """The two sides of a comparison: a target model of its own, or sublayers dropped from the dense one."""

    dense: LoadedModel
    target: LoadedModel | DropSpec


def open_pair(config: dict[str, Any], *, headless: bool = False) -> Pair:
    """Load what ``dense`` and ``target`` of a command's options name; see `load_model` for ``headless``. Raises UserError."""
    target = config["target"]
    options = {**{key: config[key] for key in ("dtype", "device", "trust_remote_code")}, "headless": headless}
    spec = None
    if isinstance(target, str) and target.startswith("drop:"):
        spec = DropSpec.parse(target.removeprefix("drop:"))
    dense = load_model(config["dense"], revision=config["revision"], **options)
    pair = Pair(dense, spec if spec is not None else load_model(target, **options))
    check_pair(pair.dense, pair.target)
    return pair


@contextmanager
def blaming(pair: Pair) -> Iterator[None]:
    """A NaN among the logits becomes a line for the user."""
    try:
        yield
    except FloatingPointError as error:
        raise UserError(
            f"{pair.dense.ref} against {pair.target}: {error}; the activations of one of them overflow in {pair.dense.dtype}, try --dtype float32"
        ) from error


def check_options(config: dict[str, Any]) -> None:
    """What can be said before anything is loaded. Raises UserError."""
    for name in ("batch_size", "memory_mb", "max_length", "depth"):
        if config.get(name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} {config[name]}: it must be at least 1")
    if not 0 <= config["seed"] < 2**31:
        raise UserError(f"--seed {config['seed']}: it must be from 0 to {2**31 - 1}")
    if not config.get("metric_temperature", 1.0) > 0:
        raise UserError(f"--metric-temperature {config['metric_temperature']}: it must be positive")
    if config["out"] is not None:
        results.check_free(config["out"], overwrite=config["overwrite"], resume=config.get("resume", False))


def finished(
    config: Mapping[str, Any], key: str, made_with: str = "other models, prompts or options"
) -> results.Run | None:
    """The run that ``--resume`` finds complete. Raises UserError if it was made of something else, which ``made_with`` names."""
    out = config["out"]
    if not config["resume"] or out is None or not Path(out).expanduser().exists():
        return None
    run = results.open_run(out)
    if run.info.get("key") != key:
        raise UserError(f"{out} is complete, but was made with {made_with}; choose another --out or give --overwrite")
    return run


def run_generate(config: dict[str, Any]) -> GenerateResult:
    """See `prunescope.generate`, whose options ``config`` holds."""
    started = time.monotonic()
    check_options(config)
    chosen = read_prompts(config["prompts"])
    sampling = Sampling(config["temperature"], config["top_k"], config["top_p"], config["seed"])
    sampling.check()
    pair = open_pair(config)
    steps, regime, temperature = config["max_new_tokens"], config["regime"], config["metric_temperature"]
    encoded = encode(pair.dense, chosen, steps, chat=config["chat"])
    if isinstance(pair.target, LoadedModel):
        encode(pair.target, chosen, steps, chat=config["chat"])  # its context may be shorter
    stop = not config["ignore_eos"]
    key = generation_key(
        pair.dense, pair.target, encoded, steps, sampling, stop, regime, config["batch_size"], temperature
    )
    if run := finished(config, key):
        return GenerateResult(run.info, run.table(), run.samples())
    out = config["out"]
    if out is not None:
        results.require_space(out, 2 * len(encoded) * steps * 2 * 60 * 8 + 2**24)
    folder = (
        results.staged(out, overwrite=config["overwrite"], resume=config["resume"])
        if out is not None
        else nullcontext()
    )
    with folder as staging, blaming(pair):
        found = generation_rows(
            pair.dense, pair.target, encoded, max_new_tokens=steps, sampling=sampling, stop=stop, regime=regime,
            batch_size=config["batch_size"], temperature=temperature, memory=config["memory_mb"] * 2**20, parts=staging, key=key,
        )  # fmt: skip
        ours, theirs = [s.continuation for s in found.dense], None
        if found.target is not None:
            theirs = [s.continuation for s in found.target]
        ends = (end_tokens(pair.dense), end_tokens(pair.target if isinstance(pair.target, LoadedModel) else pair.dense))
        info = {
            **run_record("generate", config, pair.dense, describe_target(pair.dense, pair.target), started),
            "key": key,
            "prompts": [{"id": prompt.id, "kind": prompt.kind} for prompt in chosen],
            "steps": sum(map(len, ours)),
            "noise_floor": found.floor,
            "decoding": found.decoding,
            **generation_summary(found.table, ours, theirs, ends, steps, config["seed"]),
        }
        samples = [_sample(pair, i, prompt, found, info) for i, prompt in enumerate(chosen)]
        result = GenerateResult(info, found.table, samples)
        if staging is not None:
            result._write(staging)
    show_generation(info)
    return result


def _sample(pair: Pair, number: int, prompt: Any, found: GenerationRows, info: dict[str, Any]) -> dict[str, Any]:
    """What `samples.jsonl` holds of a prompt: the texts whole and token by token, and the text of every token among the likeliest."""
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


def run_mcq(config: dict[str, Any]) -> McqResult:
    """See `prunescope.mcq`, whose options ``config`` holds."""
    started = time.monotonic()
    check_options(config)
    limit, template = config["limit"], config["template"]
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least one question is needed")
    if config["shots"] and template != "cue":
        raise UserError(f"--shots {config['shots']} go with --template cue, not with {template}")
    subjects = [name.strip() for name in config["subjects"].split(",")] if config["subjects"] else []
    questions, shots = read_questions(config["questions"], shots=config["shots"], subjects=subjects)
    questions = questions if limit is None else questions[:limit]
    pair = open_pair(config)
    asked = ask(pair.dense, questions, template, shots)
    if isinstance(pair.target, LoadedModel):
        ask(pair.target, questions, template, shots)  # its context may be shorter
    temperature, batch_size = config["metric_temperature"], config["batch_size"]
    tokens = [[q.tokens, q.option_tokens, q.question.answer] for q in asked]
    key = run_key(pair.dense, pair.target, tokens, "mcq", batch_size, temperature)  # type: ignore[arg-type]
    if run := finished(config, key):
        return McqResult(run.info, run.table(), run.samples())
    out = config["out"]
    if out is not None:
        results.require_space(out, len(asked) * 8000 + 2**24)
    folder = (
        results.staged(out, overwrite=config["overwrite"], resume=config["resume"])
        if out is not None
        else nullcontext()
    )
    with folder as staging, blaming(pair):
        found = mcq_rows(
            pair.dense, pair.target, asked, batch_size=batch_size, temperature=temperature, memory=config["memory_mb"] * 2**20, parts=staging, key=key
        )  # fmt: skip
        info = {
            **run_record("mcq", config, pair.dense, describe_target(pair.dense, pair.target), started),
            "key": key,
            "questions": len(asked),
            "noise_floor": found.floor,
            **mcq_summary(found.table, config["seed"]),
        }
        decode = pair.dense.tokenizer.decode
        samples = [_question_sample(decode, i, question, found.tops[i]) for i, question in enumerate(asked)]
        result = McqResult(info, found.table, samples)
        if staging is not None:
            result._write(staging)
    show_mcq(info)
    return result


def _question_sample(decode: Any, number: int, asked: Asked, tops: dict[str, Any]) -> dict[str, Any]:
    """What `samples.jsonl` holds of a question: the prompt, the options, and the likeliest tokens of both models."""
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
