"""Multiple-choice questions seen by two models: the whole vocabulary against the answer options (the paper, section 7.2).

One pass over each prompt gives the state at its last position, from which both models would write the answer. ``global`` compares
the two over the whole vocabulary, ``options`` over the tokens of the options alone, renormalised. An option that is not one
token of its own, or that shares it with another, has no place in the vocabulary: then each option is read by the models, and its
sequence log-likelihood stands for its logit (``scoring`` says which it was).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from prunescope.compare.columns import DEFAULT_MEMORY, compare_final
from prunescope.compare.context import (
    Changed,
    Transcript,
    at_least_float32,
    check_memory,
    check_pair,
    final_head,
    largest,
    mark_under_floor,
    read_states,
    switched,
)
from prunescope.compare.metrics import COLUMNS, compare_logits
from prunescope.data.questions import Question, Template, cue_prompt, option_strings, question_text
from prunescope.data.tokens import chat_text, check_tokens, tokens_with_options
from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel
from prunescope.progress import progress
from prunescope.runs.parts import begin, computed, joined, notes_of, with_notes
from prunescope.runs.workers import Compute, Workers, sharing

__all__ = ["TOP", "Asked", "McqRows", "ask", "mcq_passes", "mcq_rows"]

TOP = 30  # most likely tokens kept of each model
_CONFIDENCE = ("confidence_dense", "confidence_target")
_LISTS = ("loglik_dense", "loglik_target")
_FLOOR_QUESTIONS = 4


@dataclass(frozen=True)
class Asked:
    """A question as the models read it."""

    question: Question
    text: str
    tokens: list[int]
    options: list[str]  # what the model would write
    option_tokens: list[list[int]]

    @property
    def by_token(self) -> bool:
        """Whether every option is one token, and no two the same."""
        firsts = {tokens[0] for tokens in self.option_tokens}
        return len(firsts) == len(self.options) and all(len(tokens) == 1 for tokens in self.option_tokens)


def ask(
    model: LoadedModel, questions: Sequence[Question], template: Template, shots: dict[str, list[Question]]
) -> list[Asked]:
    """Prompts and option tokens. Option tokens are what the tokenizer makes of prompt + option after those of the prompt.

    Raises:
        UserError: no chat template, a prompt past the model's context, options that are the same tokens, a tokenizer that gives tokens
            the model does not know.
    """
    if template != "cue" and shots:
        raise UserError(f"--shots go with --template cue, not with {template}")
    asked = []
    for question in questions:
        if template == "cue":
            text = cue_prompt(question, shots.get(question.subject, ()))
        else:
            text = question_text(question, template)
            text = chat_text(model, text, "choose --template cue") if template == "chat" else text
        options = option_strings(template, len(question.choices))
        tokens, option_tokens = tokens_with_options(model, text, options, special=template != "chat")
        _check_asked(model, question, tokens, options, option_tokens)
        asked.append(Asked(question, text, tokens, options, option_tokens))
    return asked


def _check_asked(
    model: LoadedModel, question: Question, tokens: list[int], options: list[str], option_tokens: list[list[int]]
) -> None:
    where = f"question {question.id!r}"
    empty = ": the tokenizer gives no tokens for its prompt or for an option"
    check_tokens(model, where, tokens, *option_tokens, empty=empty)
    longest = len(tokens) + max(map(len, option_tokens)) - 1
    if model.context and longest > model.context:
        raise UserError(
            f"{where} has {longest} tokens, past the context of {model.ref}, {model.context}; shorten it or lower --shots"
        )
    seen: dict[tuple[int, ...], str] = {}
    for option, ids in zip(options, option_tokens, strict=True):
        other = seen.setdefault(tuple(ids), option)
        if other != option:
            raise UserError(
                f"{where}: the options {other!r} and {option!r} are the same tokens {ids} to this tokenizer; choose another --template"
            )


def _prompts(asked: Sequence[Asked]) -> list[Transcript]:
    return [Transcript(question.tokens, [0]) for question in asked]


def _sequences(question: Asked) -> list[Transcript]:
    return [Transcript(question.tokens, tokens) for tokens in question.option_tokens]


def _floor_prompts(asked: Sequence[Asked]) -> list[Transcript]:
    prompts = _prompts(asked[:_FLOOR_QUESTIONS])
    return prompts * 2 if len(prompts) == 1 else prompts


def mcq_passes(asked: Sequence[Asked], batch_size: int) -> tuple[list[list[Transcript]], list[list[Transcript]]]:
    """The batches of texts that `mcq_rows` lets both models read, and those that the dense one reads alone, for its noise floor."""
    both = [_prompts(asked[i : i + batch_size]) for i in range(0, len(asked), batch_size)]
    both += [_sequences(question) for question in asked if not question.by_token]
    prompts = _floor_prompts(asked)
    return both, [*([prompt] for prompt in prompts), prompts]


# --- what the models say -----------------------------------------------------------------------------------------------


def _likelihoods(model: LoadedModel, asked: Sequence[Asked], *, recall: bool = False) -> list[Tensor]:
    """Sequence log-likelihoods of the options of each question, ``(options,)`` float64."""
    result = []
    head = final_head(model)
    for question in asked:
        sequences = _sequences(question)
        log_p = (
            head.logits(torch.cat(read_states(model, sequences, recall=recall)), at_least_float32(model.dtype))
            .double()
            .log_softmax(-1)
        )
        chosen = torch.tensor([token for sequence in sequences for token in sequence.continuation], device=log_p.device)
        each = log_p.gather(-1, chosen[:, None])[:, 0].cpu()
        result.append(torch.stack([steps.sum() for steps in each.split([len(s.continuation) for s in sequences])]))
    return result


@dataclass(frozen=True)
class _Settings:
    temperature: float
    memory: int


def _batch(dense: LoadedModel, target: Changed, asked: Sequence[Asked], first: int, settings: _Settings) -> pa.Table:
    """Two rows a question; the most likely tokens of both models are in the table's metadata."""
    prompts = _prompts(asked)
    by_sequence = [question for question in asked if not question.by_token]
    h = torch.cat(read_states(dense, prompts, recall=True))
    sequence_scores = _likelihoods(dense, by_sequence, recall=True)
    with switched(dense, target) as other:
        h_target, sequence_scores_target = torch.cat(read_states(other, prompts)), _likelihoods(other, by_sequence)
    gold = torch.tensor([q.option_tokens[q.question.answer][0] if q.by_token else -1 for q in asked])
    most = max(len(question.options) for question in asked)
    ids = torch.tensor(
        [[tokens[0] for tokens in q.option_tokens] + [q.option_tokens[0][0]] * (most - len(q.options)) for q in asked]
    )

    def also(rows: slice, z: Tensor, z_target: Tensor) -> dict[str, Tensor]:
        at, right = ids[rows].to(z.device), gold[rows].clamp(min=0).to(z.device)[:, None]
        found: dict[str, Tensor] = {}
        for side, mine in (("dense", z), ("target", z_target)):
            found[f"z_{side}"] = mine.gather(-1, at).double()
            found[f"loglik_{side}"] = mine.double().log_softmax(-1).gather(-1, at)
            found[f"gold_rank_{side}"] = (mine > mine.gather(-1, right)).sum(-1)
            p, q = ((x.double() / settings.temperature).softmax(-1) for x in (mine, z_target if mine is z else z))
            top = mine.topk(min(TOP, mine.shape[-1]), -1).indices
            found |= {f"top_{side}": top, f"top_p_{side}": p.gather(-1, top), f"top_other_{side}": q.gather(-1, top)}
        return found

    found = compare_final(
        h,
        h_target,
        final_head(dense),
        final_head(other),
        temperature=settings.temperature,
        next_token=gold,
        also=also,
        memory=settings.memory,
    )
    scores = {"dense": iter(sequence_scores), "target": iter(sequence_scores_target)}
    rows: list[dict[str, Any]] = []
    tops: list[dict[str, Any]] = []
    for i, question in enumerate(asked):
        rows += _rows(question, first + i, i, found, scores, settings.temperature)
        tops.append(
            {
                side: [found[f"{name}_{side}"][i].tolist() for name in ("top", "top_p", "top_other")]
                for side in ("dense", "target")
            }
        )
    return with_notes(pa.Table.from_pylist(rows, schema=_SCHEMA), {"tops": tops})


def _rows(
    question: Asked, number: int, i: int, found: dict[str, Tensor], scores: dict[str, Any], temperature: float
) -> list[dict[str, Any]]:
    count, gold = len(question.options), question.question.answer
    row: dict[str, Any] = {
        "question": number,
        "id": question.question.id,
        "subject": question.question.subject,
        "gold": gold,
        "scoring": "token" if question.by_token else "sequence",
    }
    z = {}
    for side in ("dense", "target"):
        likelihood = found[f"loglik_{side}"][i, :count] if question.by_token else next(scores[side])
        z[side] = found[f"z_{side}"][i, :count] if question.by_token else likelihood
        others = torch.cat([likelihood[:gold], likelihood[gold + 1 :]])
        row |= {
            f"choice_{side}": int(likelihood.argmax()),
            f"loglik_{side}": likelihood.tolist(),
            f"option_mass_{side}": float(likelihood.exp().sum()),
            f"margin_{side}": float(likelihood[gold] - others.max()),
            f"option_rank_{side}": int((likelihood > likelihood[gold]).sum()),
            f"gold_rank_{side}": int(found[f"gold_rank_{side}"][i]) if question.by_token else None,
            f"option_confidence_{side}": float(likelihood.softmax(-1).max()),
        }
    whole = {name: float(found[name][i]) for name in (*COLUMNS, *_CONFIDENCE)}
    options = compare_logits(z["dense"][None], z["target"][None], temperature, torch.tensor([gold]))
    return [
        {**row, "space": "global", **whole},
        {**row, "space": "options", **{name: float(value) for name, value in options.items()}},
    ]


_SCHEMA = pa.schema(
    [
        ("question", pa.int32()),
        ("id", pa.string()),
        ("subject", pa.string()),
        ("space", pa.string()),
        ("scoring", pa.string()),
        ("gold", pa.int32()),
        *((f"choice_{side}", pa.int32()) for side in ("dense", "target")),
        *((name, pa.list_(pa.float64())) for name in _LISTS),
        *((f"{name}_{side}", pa.float64()) for name in ("option_mass", "margin") for side in ("dense", "target")),
        *((f"{name}_{side}", pa.int32()) for name in ("option_rank", "gold_rank") for side in ("dense", "target")),
        *((f"option_confidence_{side}", pa.float64()) for side in ("dense", "target")),
        *((name, pa.float64()) for name in (*COLUMNS, *_CONFIDENCE)),
    ]
)


# --- the whole run -----------------------------------------------------------------------------------------------------


@dataclass
class McqRows:
    """What `mcq_rows` found; ``tops`` has of each question and model the ids of its most likely tokens, their probabilities under it
    and under the other model."""

    table: pa.Table
    tops: list[dict[str, Any]] = field(repr=False)
    floor: dict[str, Any] = field(repr=False)


def mcq_rows(
    dense: LoadedModel,
    target: Changed,
    asked: Sequence[Asked],
    *,
    batch_size: int = 8,
    temperature: float = 1.0,
    memory: int = DEFAULT_MEMORY,
    parts: Path | None = None,
    key: str = "",
    workers: Workers | None = None,
) -> McqRows:
    """Compare two models at the place where each question is answered: a row a question and space (``global``, ``options``).

    Log-likelihoods, option mass, margins, choices and ``option_confidence`` are those of T = 1, as tasks are scored; the metric columns
    and the most likely tokens use the metric temperature.

    Args:
        asked: from `ask`.
        batch_size: questions at a time; changes nothing but speed and memory.
        temperature: metric temperature T.
        memory: bytes for the metrics, see `compare_final`.
        parts, key: folder for finished batches, and what they must have been made from.
        workers: who share the batches, each with both models of its own; None computes all here.
    Raises:
        UserError: models that cannot be compared, or parts of another run.
        FloatingPointError: a NaN or infinite logit.
    """
    check_pair(dense, target)
    check_memory(memory, dense, target)
    settings = _Settings(temperature, memory)
    begin(parts, key)
    make = partial(_batches, asked=asked, settings=settings)
    with progress(f"{len(asked)} questions", len(asked)) as advance:
        tables = computed(
            parts, len(asked), batch_size, make(dense, target), lambda numbers: advance(len(numbers)), sharing(workers, make)
        )  # fmt: skip
    tops = [top for table in tables for top in notes_of(table)["tops"]]
    table = joined(tables)
    floor = _noise_floor(dense, asked, settings)
    return McqRows(mark_under_floor(table, floor["floor"]), tops, floor)


def _batches(dense: LoadedModel, target: Changed, *, asked: Sequence[Asked], settings: _Settings) -> Compute:
    """Numbers of questions -> their table."""
    return lambda numbers: _batch(dense, target, [asked[i] for i in numbers], numbers[0], settings)


def _noise_floor(dense: LoadedModel, asked: Sequence[Asked], settings: _Settings) -> dict[str, Any]:
    """The dense model against itself: prompts in a padded batch against each alone; per column the largest absolute value."""
    prompts = _floor_prompts(asked)
    alone = torch.cat([read_states(dense, [prompt], recall=True)[0] for prompt in prompts])
    head = final_head(dense)
    columns = compare_final(
        alone,
        torch.cat(read_states(dense, prompts, recall=True)),
        head,
        head,
        temperature=settings.temperature,
        memory=settings.memory,
    )
    return {
        "dtype": str(dense.dtype).removeprefix("torch."),
        "questions": len(prompts),
        "way": "in a padded batch against alone",
        "floor": largest(columns),
    }
