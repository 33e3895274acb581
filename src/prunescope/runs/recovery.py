"""Erased or demoted: where the right token stands in the target's distribution, and whether sampling brings it back. Reads tables only.

A token of probability p is drawn at least once in n independent draws with probability 1 - (1 - p)^n. That is computed from p; nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, expm1, log1p
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DRAWS", "Standing", "at_least_once", "of_forks", "of_questions", "place_of", "recovery"]

DRAWS = (1, 10, 100)
_EVEN = 0.5  # a token that the most draws bring back less often than this counts as erased


def at_least_once(p: float, n: int) -> float:
    """The chance that something of probability ``p`` comes up in ``n`` independent draws, 1 - (1 - p)^n, exact for tiny ``p`` too."""
    return 1.0 if p >= 1 else -expm1(n * log1p(-p))


@dataclass(frozen=True)
class Standing:
    """A token in a distribution.

    ``place`` is 1 for the most likely token, None where it is not known; ``p`` is its probability.
    """

    number: int  # of the question or prompt
    place: int | None
    p: float

    @property
    def fate(self) -> Literal["first", "demoted", "erased"]:
        """``first``: still the most likely token; ``demoted``: 100 draws bring it back more often than not; ``erased``: they do not."""
        if self.place == 1:
            return "first"
        return "demoted" if at_least_once(self.p, DRAWS[-1]) >= _EVEN else "erased"

    def chances(self) -> list[float]:
        """Of coming up at least once, for each of `DRAWS`."""
        return [at_least_once(self.p, n) for n in DRAWS]


def of_questions(table: pa.Table, side: str) -> list[Standing]:
    """The right option's token in the vocabulary, for every question whose options are one token each.

    Args:
        table: rows of an mcq run; log-likelihoods are those of T = 1.
        side: ``dense`` or ``target``.
    """
    if f"gold_rank_{side}" not in table.column_names:
        return []
    names = ("space", "question", "gold", f"gold_rank_{side}", f"loglik_{side}")
    rows = zip(*(table[name].to_pylist() for name in names), strict=True)
    return [
        Standing(question, rank + 1, exp(loglik[gold]))
        for space, question, gold, rank, loglik in rows
        if space == "global" and rank is not None
    ]


def of_forks(table: pa.Table, first: Sequence[int | None]) -> list[Standing]:
    """The dense model's token in the target's distribution, at the step at which the two texts part; texts that never part have none.

    Args:
        table: rows of a generate run with the teacher-forced regime; probabilities are those of the metric temperature.
        first: per prompt the first step at which the texts differ, None where they do not.
    """
    names = ["prompt", "step", "regime", "dense_token", "rank_in_target", "nll_target"]
    names += ["top_dense", "top_target"]
    if not set(names) <= set(table.column_names):
        return []
    return [
        Standing(row["prompt"], place_of(row), exp(-row["nll_target"]))
        for row in table.select(names).to_pylist()
        if row["regime"] == "teacher-forced" and first[row["prompt"]] == row["step"]
    ]


def place_of(row: Mapping[str, Any]) -> int | None:
    """The place of the dense model's token among the target's, from a row of a generate run: 1 is the most likely; None beyond those kept."""
    token, most_likely = row["dense_token"], row["top_target"]
    if token == row["top_dense"][0]:
        return int(row["rank_in_target"]) + 1
    return most_likely.index(token) + 1 if token in most_likely else None


def recovery(standings: Sequence[Standing]) -> dict[str, Any] | None:
    """What run.json keeps of them: counts by fate, the median place, the mean chance in each number of draws; None of nothing."""
    if not standings:
        return None
    places = [one.place for one in standings if one.place is not None]
    return {
        "count": len(standings),
        **{fate: sum(one.fate == fate for one in standings) for fate in ("first", "demoted", "erased")},
        "median_place": median(places) if places else None,
        "chance": {
            str(n): fmean(chances)
            for n, chances in zip(DRAWS, zip(*(o.chances() for o in standings), strict=True), strict=True)
        },
    }
