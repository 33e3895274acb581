"""What can be said of two texts, and of one that has gone wrong, from their token ids alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

__all__ = ["degeneration", "distinct", "first_difference", "loop_length", "repeated", "survival", "text_columns"]

_LOOP_TIMES, _LOOP_TOKENS = 3, 12  # a loop is at least three rounds and twelve tokens of an unbroken period at the end


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first step at which two texts differ, None if they are the same; a text that ends while the other goes on differs there."""
    for step, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return step
    return None if len(a) == len(b) else min(len(a), len(b))


def survival(first: Sequence[int | None], steps: int) -> list[float]:
    """``survival[t]``: the share of texts that are still the same after step t. Texts that never differ survive all steps."""
    return [sum(step is None or step > t for step in first) / len(first) for t in range(steps)]


def repeated(tokens: Sequence[int], n: int) -> float | None:
    """The share of n-grams that have come before in the text (rep-n: 1 - distinct n-grams / n-grams); None for a text shorter than n."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """distinct-n: distinct n-grams over n-grams."""
    share = repeated(tokens, n)
    return None if share is None else 1 - share


def loop_length(tokens: Sequence[int]) -> int:
    """How many tokens at the end of the text go round in a loop, 0 if none: the last p tokens repeat without a break, at least three
    rounds and twelve tokens, for some period p."""
    longest = 0
    for period in range(1, len(tokens) // _LOOP_TIMES + 1):
        same = 0
        while same + period < len(tokens) and tokens[-1 - same] == tokens[-1 - same - period]:
            same += 1
        length = same + period
        if same and length >= max(_LOOP_TIMES * period, _LOOP_TOKENS):
            longest = max(longest, length)
    return longest


def text_columns(tokens: Sequence[int], ends: Sequence[int]) -> dict[str, Any]:
    """What one free text is like: its length, whether it reached an end token, repeated n-grams, distinct-n, loop.

    End tokens at the end are not part of what is measured.
    """
    ended = bool(tokens) and tokens[-1] in ends
    body = list(tokens[:-1]) if ended else list(tokens)
    return {
        "tokens": len(body),
        "ended": ended,
        **{f"rep_{n}": repeated(body, n) for n in (2, 3, 4)},
        **{f"distinct_{n}": distinct(body, n) for n in (1, 2)},
        "loop_tokens": loop_length(body),
    }


def degeneration(texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all texts: means of `text_columns`, shares of texts that loop and that never reach an end token."""
    result: dict[str, Any] = {"texts": len(texts), "tokens": fmean(text["tokens"] for text in texts)}
    for name in ("rep_2", "rep_3", "rep_4", "distinct_1", "distinct_2"):
        known = [text[name] for text in texts if text[name] is not None]
        result[name] = fmean(known) if known else None
    result["looping"] = fmean(text["loop_tokens"] > 0 for text in texts)
    result["never_ended"] = fmean(not text["ended"] for text in texts)
    return result
