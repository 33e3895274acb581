"""Let a model answer the same prompts in two ways: by writing, and by the log-likelihood of given options.

Prompts of a quick task begin with the same solved examples. What all have in common is read once; then batches hold prompts of equal
length, so that no padding and no mask is needed, and both ways of answering start from the very same forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from prunescope.models.attending import any_length
from prunescope.models.generating import batches, check_cache
from prunescope.models.loaded import LoadedModel

__all__ = ["Answer", "Asking", "answer"]


@dataclass(frozen=True)
class Asking:
    """A prompt as the model reads it. Without options it is answered in writing only."""

    tokens: list[int]
    options: list[list[int]] = field(default_factory=list)  # tokens of each option


@dataclass(frozen=True)
class Answer:
    """``written`` are the new tokens, those that ended it among them; ``scores`` the options' summed log-likelihoods."""

    written: list[int]
    scores: list[float]


@torch.no_grad()
def answer(
    loaded: LoadedModel,
    asked: Sequence[Asking],
    *,
    write: bool,
    choose: bool,
    ended: Callable[[list[int]], bool],
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer every prompt, greedily in writing and by the options' log-likelihoods.

    Args:
        asked: at least one prompt, each of at least one token.
        write, choose: which of the two ways; what is not asked for stays empty.
        ended: whether the tokens written so far are a whole answer.
        batch_size: prompts at a time; changes nothing but rounding.
        advance: told how many prompts are done, batch by batch.
    """
    shared = _shared_length([question.tokens for question in asked])
    prefix = _read(loaded, None, [asked[0].tokens[:shared]])[1] if shared else None
    answers: dict[int, Answer] = {}
    lengths = sorted({len(question.tokens) for question in asked})
    for length in lengths:
        group = [i for i, question in enumerate(asked) if len(question.tokens) == length]
        for chosen in batches(group, batch_size):
            cache = _repeated(prefix, [len(chosen)])
            logits, cache = _read(loaded, cache, [asked[i].tokens[shared:] for i in chosen])
            last = logits[:, -1]
            scores = (
                _scores(loaded, last, cache, [asked[i].options for i in chosen]) if choose else [[] for _ in chosen]
            )
            written = _write(loaded, last, cache, ended, max_new_tokens) if write else [[] for _ in chosen]
            answers |= {i: Answer(w, s) for i, w, s in zip(chosen, written, scores, strict=True)}
            advance(len(chosen))
    return [answers[i] for i in range(len(asked))]


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, short of the last one of each: every prompt has one left to be read."""
    shortest = min(map(len, prompts)) - 1
    first = prompts[0]
    return next((i for i in range(shortest) if any(prompt[i] != first[i] for prompt in prompts)), shortest)


@any_length()
def _read(loaded: LoadedModel, cache: Cache | None, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Cache]:
    """Logits ``(rows, 1, vocab)`` after the last token of each row, all of one length, and the cache that has read them."""
    check_cache(loaded)
    out = loaded.model(
        input_ids=torch.tensor(rows, device=loaded.device),
        past_key_values=DynamicCache(config=loaded.model.config) if cache is None else cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits, out.past_key_values


def _repeated(cache: Cache | None, times: Sequence[int]) -> Cache | None:
    """A copy of the cache in which row i stands ``times[i]`` times."""
    if cache is None:
        return None
    result = copy.deepcopy(cache)
    rows = torch.arange(len(times)).repeat_interleave(torch.tensor(times))
    result.batch_select_indices(rows)
    return result


@any_length()
def _scores(
    loaded: LoadedModel, last: Tensor, cache: Cache, options: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Summed log-likelihoods of the options of each row; ``last`` are the logits ``(rows, vocab)`` before their first token."""
    first = last.double().log_softmax(-1).cpu()
    found = [[float(first[row, option[0]]) for option in each] for row, each in enumerate(options)]
    # what is read of an option, all but its last token, is read once where several of a prompt's options begin so
    read = [list(dict.fromkeys(tuple(option[:-1]) for option in each if len(option) > 1)) for each in options]
    longest = max((len(begin) for each in read for begin in each), default=0)
    if not longest:
        return found
    own = _repeated(cache, [len(each) for each in read])
    flat = [begin for each in read for begin in each]
    rows = [[*begin, *[begin[0]] * (longest - len(begin))] for begin in flat]  # what is padded is not looked at
    out = loaded.model(input_ids=torch.tensor(rows, device=loaded.device), past_key_values=own, use_cache=True)
    rest = out.logits.double().log_softmax(-1).cpu()
    first_row = 0
    for scores, each, begins in zip(found, options, read, strict=True):
        for i, option in enumerate(each):
            if len(option) > 1:
                row = rest[first_row + begins.index(tuple(option[:-1]))]
                scores[i] += sum(float(row[step, token]) for step, token in enumerate(option[1:]))
        first_row += len(begins)
    return found


def _write(
    loaded: LoadedModel, last: Tensor, cache: Cache, ended: Callable[[list[int]], bool], max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuation of each row until it has ended."""
    rows: list[list[int]] = [[] for _ in last]
    done = [False] * len(rows)
    for step in range(max_new_tokens):
        tokens = last.argmax(-1).tolist()
        for row, token in enumerate(tokens):
            if not done[row]:
                rows[row].append(token)
                done[row] = ended(rows[row])
        if all(done) or step + 1 == max_new_tokens:
            break
        logits, cache = _read(loaded, cache, [[token] for token in tokens])
        last = logits[:, -1]
    return rows
