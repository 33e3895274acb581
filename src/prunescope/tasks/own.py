"""Tasks of a user's own file: rows with options are chosen from, rows with an answer are written.

Rows are asked as they stand, without solved examples. Of options the one of the highest summed log-likelihood counts, as in the quick tasks and in
lm-evaluation-harness's ``acc``; a question is put as its ``arc`` tasks put it. What is written is right if it begins with the answer,
whatever its case.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prunescope.data.asked import Asked, Written, is_file_of_rows, read_asked, sha256_of
from prunescope.data.questions import Question
from prunescope.data.tokens import check_tokens, tokens_with_options
from prunescope.errors import UserError
from prunescope.models.generating import end_tokens
from prunescope.models.loaded import LoadedModel
from prunescope.tasks import quick
from prunescope.tasks.answering import Asking, answer
from prunescope.tasks.scores import ITEMS_SCHEMA, score

__all__ = ["begins_with", "evaluate_own", "is_own", "own_files", "own_rows", "own_tasks"]

_ROOM = 2  # tokens past the longest answer, to see whether its last word goes on


def is_own(task: str) -> bool:
    """Whether a task is a file of the user's, by its ending."""
    return task not in quick.QUICK and is_file_of_rows(task)


def own_files(tasks: Sequence[str]) -> dict[str, str]:
    """Those of ``tasks`` that are files, with the sha256 of each. Raises UserError where one cannot be read."""
    return {task: sha256_of(task) for task in tasks if is_own(task)}


def own_rows(source: str) -> Asked:
    """Rows of a file with answers. Raises UserError where it has prompts alone."""
    asked = read_asked(source)
    if asked.prompts:
        raise UserError(
            f"{source}: its rows have no answer, so they cannot be scored; compare the writing: sweep --tasks agreement --prompts {source}"
        )
    return asked


def own_tasks(source: str, asked: Asked) -> dict[str, str]:
    """Task -> kind, of the rows that a file has: ``NAME-chosen`` and ``NAME-written``."""
    name = Path(source).name.partition(".")[0]
    both = {f"{name}-chosen": ("choice", asked.chosen), f"{name}-written": ("generative", asked.written)}
    return {task: kind for task, (kind, rows) in both.items() if rows}


def evaluate_own(
    loaded: LoadedModel, source: str, *, limit: int | None, batch_size: int, advance: Callable[[int], None]
) -> tuple[pa.Table, dict[str, dict[str, Any]]]:
    """Items of `ITEMS_SCHEMA`, and scores by task as `evaluate_model` gives them.

    Args:
        limit: only the first so many rows of each task.
        advance: told how many rows are done.
    Raises:
        UserError: a file that `own_rows` refuses, or rows past the model's context.
    """
    asked = own_rows(source)
    rows: list[dict[str, Any]] = []
    scores: dict[str, dict[str, Any]] = {}
    for task, kind in own_tasks(source, asked).items():
        if kind == "choice":
            metric, found = "acc", _choose(loaded, asked.chosen[:limit], batch_size, advance)
            chance = float(np.mean([1 / len(question.choices) for question in asked.chosen[:limit]]))
        else:
            metric, chance, found = "begins_with", 0.0, _write(loaded, asked.written[:limit], batch_size, advance)
        rows += [{"task": task, "kind": kind, "item": i, "metric": metric} | row for i, row in enumerate(found)]
        scores[task] = score([row["score"] for row in found], metric, kind, chance, 0)
    return pa.Table.from_pylist(rows, schema=ITEMS_SCHEMA), scores


def _choose(
    loaded: LoadedModel, questions: Sequence[Question], batch_size: int, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    texts = [f"Question: {question.question.strip()}\nAnswer:" for question in questions]
    asked = [
        _asking(loaded, question.id, text, [f" {choice.strip()}" for choice in question.choices])
        for question, text in zip(questions, texts, strict=True)
    ]
    _check_context(loaded, asked, max(len(option) for one in asked for option in one.options))
    answers = answer(
        loaded, asked, write=False, choose=True, ended=lambda tokens: True, max_new_tokens=1, batch_size=batch_size, advance=advance
    )  # fmt: skip
    found = []
    for question, text, given in zip(questions, texts, answers, strict=True):
        at = int(np.argmax(given.scores))
        gold = question.choices[question.answer]
        found.append(
            {"key": _key(text, gold), "score": float(at == question.answer), "prediction": question.choices[at]}
            | {"gold": gold}
        )
    return found


def _write(
    loaded: LoadedModel, rows: Sequence[Written], batch_size: int, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    asked = [_asking(loaded, row.id, row.prompt, [f" {row.answer}"]) for row in rows]
    most = max(len(one.options[0]) for one in asked) + _ROOM
    _check_context(loaded, asked, most)
    decode, ends = loaded.tokenizer.decode, set(end_tokens(loaded))
    lines = any("\n" in row.answer for row in rows)
    answers = answer(
        loaded, [Asking(one.tokens) for one in asked], write=True, choose=False, max_new_tokens=most, batch_size=batch_size, advance=advance,
        ended=lambda tokens: tokens[-1] in ends or (not lines and "\n" in decode(tokens).lstrip()),
    )  # fmt: skip
    found = []
    for row, given in zip(rows, answers, strict=True):
        text = decode([token for token in given.written if token not in ends]).strip()
        found.append(
            {"key": _key(row.prompt, row.answer), "score": float(begins_with(text, row.answer))}
            | {"prediction": text, "gold": row.answer}
        )
    return found


def begins_with(text: str, answer: str) -> bool:
    """Whether ``text`` begins with ``answer``, whatever the case, and its last word or number ends there: 42 is neither 420 nor 42.5."""
    text, answer = text.strip().casefold(), answer.strip().casefold()
    after = text[len(answer) :]
    goes_on = after[:1].isalnum() or (answer[-1].isdigit() and re.match(r"[.,]\d", after) is not None)
    return text.startswith(answer) and not (answer[-1].isalnum() and goes_on)


def _asking(loaded: LoadedModel, name: str, text: str, options: Sequence[str]) -> Asking:
    tokens, after = tokens_with_options(loaded, text, options)
    check_tokens(loaded, f"row {name!r}", tokens, *after, empty=" gives no tokens; write some text")
    return Asking(tokens, after)


def _check_context(loaded: LoadedModel, asked: Sequence[Asking], more: int) -> None:
    needed = max(len(one.tokens) for one in asked) + more
    if loaded.context and needed > loaded.context:
        raise UserError(f"rows have {needed} tokens, past the context of {loaded.ref}, {loaded.context}; shorten them")


def _key(text: str, answer: str) -> str:
    return hashlib.sha256(f"{text}\x1f{answer}".encode()).hexdigest()[:16]
