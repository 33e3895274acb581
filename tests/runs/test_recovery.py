"""Erased or demoted, against draws and against logits by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest

from prunescope.runs.recovery import Standing, at_least_once, of_forks, of_questions, recovery


@pytest.mark.parametrize(("p", "n"), [(0.3, 1), (0.01, 100), (1e-12, 10), (1.0, 3), (0.0, 7), (0.999, 2)])
def test_chance_against_exact_fractions(p, n):
    """Catches n - 1 draws, and 1 - (1 - p)^n in floats, which is 0 for 1e-17 and 1e-4 off for 1e-12."""
    exact = 1 - (1 - Fraction(p)) ** n
    assert at_least_once(p, n) == pytest.approx(float(exact), rel=1e-12)


def test_chance_against_draws():
    """Twenty thousand times ten draws of one token of eight. Catches a chance for all draws in place of one of them."""
    rng = np.random.default_rng(0)
    hit = (rng.random((20_000, 10)) < 0.125).any(axis=1).mean()
    assert at_least_once(0.125, 10) == pytest.approx(hit, abs=0.01)


def test_fates():
    """The border lies where 100 draws are even: p = 0.00691. A most likely token is first however small its p."""
    fates = [Standing(0, place, p).fate for place, p in ((1, 1e-5), (2, 0.4), (9, 0.0070), (9, 0.0068), (None, 0.02))]
    assert fates == ["first", "demoted", "demoted", "erased", "demoted"]
    found = recovery([Standing(0, 1, 0.5), Standing(1, 4, 0.25), Standing(2, None, 0.0)])
    assert found == {
        **{"count": 3, "first": 1, "demoted": 1, "erased": 1, "median_place": 2.5},
        "chance": pytest.approx(
            {"1": 0.25, "10": (1 - 0.5**10 + 1 - 0.75**10) / 3, "100": (1 - 0.5**100 + 1 - 0.75**100) / 3}
        ),
    }
    assert recovery([]) is None


def test_questions_against_logits():
    """Three questions over 50 tokens, softmax by hand. Catches a place from 0, the other model, a question scored by sequence, options for
    the vocabulary."""
    rng = np.random.default_rng(1)
    z = {side: 3 * rng.normal(size=(3, 50)) for side in ("dense", "target")}
    p = {side: np.exp(v) / np.exp(v).sum(-1, keepdims=True) for side, v in z.items()}
    options, gold = [4, 7, 9], [0, 2, 1]
    right = [options[g] for g in gold]
    rows = {"question": [0, 1, 2], "gold": gold, "space": ["global"] * 3}
    for side in z:
        rows[f"gold_rank_{side}"] = [int((z[side][i] > z[side][i, right[i]]).sum()) for i in range(2)] + [None]
        rows[f"loglik_{side}"] = np.log(p[side][:, options]).tolist()
    table = pa.table(rows)
    table = pa.concat_tables([table, table.set_column(2, "space", pa.array(["options"] * 3))])
    for side in z:
        found = of_questions(table, side)
        places = [int(np.argsort(-z[side][i]).tolist().index(right[i])) + 1 for i in range(2)]
        assert [(one.number, one.place) for one in found] == list(enumerate(places))
        assert [one.p for one in found] == pytest.approx([p[side][i, right[i]] for i in range(2)])


def test_forks():
    """Catches a row of the free-running regime, a step beside the fork, the target's token, a place that is not known."""
    rows = [
        {"prompt": prompt, "step": step, "regime": regime, "dense_token": token, "rank_in_target": 6.0 + step, "nll_target": nll,
         "top_dense": [3, 5], "top_target": [8, 2]}
        for prompt, token, nll in ((0, 3, 1.0), (1, 2, 2.0), (2, 11, 3.0), (3, 3, 4.0))
        for step in range(3)
        for regime in ("free-running", "teacher-forced")
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    found = of_forks(table, [1, 0, 2, None])
    assert [(one.number, one.place) for one in found] == [(0, 8), (1, 2), (2, None)]
    assert [one.p for one in found] == pytest.approx(np.exp([-1.0, -2.0, -3.0]))
    assert of_forks(table.drop_columns(["top_target"]), [1, 0, 2, None]) == []
