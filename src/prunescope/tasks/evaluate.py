"""A model's scores on tasks: the built-in quick ones, or those of lm-evaluation-harness.

`evaluate_model` works on whatever is in the `LoadedModel` right now, sublayers dropped or weights pruned, with no export. What it
returns follows from the model and the options alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prunescope.data.tokens import check_tokens, tokens_with_options
from prunescope.errors import UserError
from prunescope.models.generating import end_tokens
from prunescope.models.loaded import LoadedModel
from prunescope.progress import progress
from prunescope.tasks import quick
from prunescope.tasks.answering import Asking, answer
from prunescope.tasks.scores import ITEMS_SCHEMA, score

__all__ = ["Evaluation", "evaluate_model", "expand_tasks"]


@dataclass
class Evaluation:
    """What a model scored.

    ``items`` has a row per task and item (`ITEMS_SCHEMA`). ``scores`` says of each task: ``metric``, ``kind``, ``value``,
    ``stderr``, ``ci95``, ``n``, ``chance`` (what guessing gets; None where that is not known), ``shots`` and ``note`` (None, or what one must
    know to read it). ``harness`` is what lm-evaluation-harness itself returned.
    """

    items: pa.Table = field(repr=False)
    scores: dict[str, dict[str, Any]]
    harness: dict[str, Any] = field(default_factory=dict, repr=False)


def expand_tasks(tasks: Sequence[str]) -> list[str]:
    """Names with our groups (``quick``, ``quick-gen``, ``quick-mc``) spelt out, each once. Harness names stay as they are."""
    named = [name for task in tasks for name in quick.GROUPS.get(task, (task,))]
    if not named or not all(named):
        raise UserError("--tasks: no task named; give for example quick, or gsm8k,mmlu")
    return list(dict.fromkeys(named))


def evaluate_model(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    data: Path | None = None,
    allow_code_execution: bool = False,
    max_new_tokens: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score a model as it stands.

    Args:
        tasks: quick tasks and groups of them, see `quick`; any other name is one of lm-evaluation-harness.
        limit: only the first so many items of each task; None is all, and 100 of a quick task.
        shots: solved examples before each item; None is the task's own number.
        batch_size: items at a time; changes nothing but speed and rounding.
        seed: of the quick tasks' items, and of the harness's choice of shots.
        data: folder of local files for the harness's tasks.
        allow_code_execution: run what a model wrote, in a sandbox; without it tasks that need it are refused.
        max_new_tokens: at most so many new tokens in the harness's generative tasks; None is the task's own number.
        advance: told how many items of the running task are done; left out, each task shows its progress itself.
    Raises:
        UserError: an unknown task, missing data, code execution not allowed, items past the model's context.
    """
    names = expand_tasks(tasks)
    for name, value, least in (
        ("limit", limit, 1),
        ("shots", shots, 0),
        ("batch-size", batch_size, 1),
        ("max-new-tokens", max_new_tokens, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: it must be at least {least}")
    builtin = [name for name in names if name in quick.QUICK]
    others = [name for name in names if name not in quick.QUICK]
    tables, scores = [], {}
    for pair in dict.fromkeys(map(quick.pair_of, builtin)):
        chosen = [name for name in builtin if quick.pair_of(name) == pair]
        count = quick.DEFAULT_ITEMS if limit is None else limit
        with _advancing(", ".join(chosen), count, advance) as tell:
            table = _quick_pair(loaded, pair, chosen, count, shots, batch_size, seed, tell)
        tables.append(table)
        for name in chosen:
            rows = [row for row in table.to_pylist() if row["task"] == name]
            guess = 0.0 if quick.kind_of(name) == "generative" else 1 / quick.OPTIONS
            used = quick.DEFAULT_SHOTS if shots is None else shots
            scores[name] = score([row["score"] for row in rows], rows[0]["metric"], quick.kind_of(name), guess, used)
    harness: dict[str, Any] = {}
    for name in others:
        from prunescope.tasks.harness import evaluate_harness

        with _advancing(name, limit or 0, advance) as tell:
            rows, found, whole = evaluate_harness(
                loaded, name, limit=limit, shots=shots, batch_size=batch_size, seed=seed, data=data, advance=tell,
                allow_code_execution=allow_code_execution, max_new_tokens=max_new_tokens,
            )  # fmt: skip
        tables.append(pa.Table.from_pylist(rows, schema=ITEMS_SCHEMA))
        scores |= found
        harness[name] = whole
    order = {name: i for i, name in enumerate([*names, *scores])}
    rows = [row for table in tables for row in table.to_pylist()]
    rows.sort(key=lambda row: order[row["task"]])  # stable: items stay in their order
    table = pa.Table.from_pylist(rows, schema=ITEMS_SCHEMA)
    return Evaluation(table, {name: scores[name] for name in sorted(scores, key=order.__getitem__)}, harness)


@contextmanager
def _advancing(stage: str, count: int, advance: Callable[[int], None] | None) -> Iterator[Callable[[int], None]]:
    if advance is not None:
        yield advance
    else:
        with progress(f"{stage}: {count} items" if count else stage, count) as shown:
            yield shown


# --- quick tasks -------------------------------------------------------------------------------------------------------


def _quick_pair(
    loaded: LoadedModel,
    pair: str,
    tasks: Sequence[str],
    count: int,
    shots: int | None,
    batch_size: int,
    seed: int,
    advance: Callable[[int], None],
) -> pa.Table:
    """Items of one or both tasks of a pair, from the same forward passes."""
    items = quick.items(pair, count, seed)
    solved = quick.items(pair, quick.DEFAULT_SHOTS if shots is None else shots, seed, what="shot")
    asked = [_asking(loaded, quick.prompt(item, solved), item.options) for item in items]
    longest = max(len(option) for question in asked for option in question.options)
    most = longest + 2  # room for the end of the line, however the tokenizer cuts it
    needed = max(len(question.tokens) for question in asked) + most
    if loaded.context and needed > loaded.context:
        raise UserError(
            f"{tasks[0]}: items have {needed} tokens, past the context of {loaded.ref}, {loaded.context}; lower --shots"
        )
    decode, ends = loaded.tokenizer.decode, set(end_tokens(loaded))
    kinds = {quick.kind_of(name): name for name in tasks}
    answers = answer(
        loaded,
        asked,
        write="generative" in kinds,
        choose="choice" in kinds,
        ended=lambda tokens: tokens[-1] in ends or "\n" in decode(tokens),
        max_new_tokens=most,
        batch_size=batch_size,
        advance=advance,
    )
    rows: list[dict[str, Any]] = []
    for number, (item, found) in enumerate(zip(items, answers, strict=True)):
        gold = item.answer.strip()
        for kind, name in kinds.items():
            if kind == "generative":
                written = decode([token for token in found.written if token not in ends])
                text, metric = written.partition("\n")[0].strip(), "exact_match"
            else:
                text, metric = item.options[int(np.argmax(found.scores))].strip(), "acc"
            rows.append(
                {"task": name, "kind": kind, "item": number, "key": item.key, "metric": metric}
                | {"score": float(text == gold), "prediction": text, "gold": gold}
            )
    return pa.Table.from_pylist(rows, schema=ITEMS_SCHEMA)


def _asking(loaded: LoadedModel, prompt: str, options: Sequence[str]) -> Asking:
    """Tokens of a prompt, and of each option those that the tokenizer makes of prompt + option after the prompt's."""
    tokens, after = tokens_with_options(loaded, prompt, options)
    where = f"{loaded.ref}: {prompt[-30:]!r}"
    check_tokens(loaded, where, tokens, *after, empty=" gives no tokens; quick tasks need letters, digits and brackets")
    return Asking(tokens, after)
