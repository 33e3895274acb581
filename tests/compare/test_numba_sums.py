"""The fused sums on a CPU: every column against float64 on the same logits, and what a sum must not depend on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunescope.compare.columns import compare
from prunescope.compare.head import Head
from prunescope.compare.kernels import sums as fused
from prunescope.compare.metrics import ERROR_BOUND, P_COLUMNS, Z_COLUMNS, Change, compare_logits

numba = pytest.importorskip("numba", reason="the fused kernels for CPUs need numba, which is not installed")
from prunescope.compare.kernels import numba_sums as fused_numba  # noqa: E402


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(rows: int, vocab: int, spread: float, change: float, seed: int) -> tuple[Tensor, Tensor]:
    z = torch.randn(rows, vocab, dtype=torch.float64, generator=generator(seed)) * spread
    y = z + change * torch.randn(rows, vocab, dtype=torch.float64, generator=generator(seed + 1))
    return z.float(), y.float()


def by_sums(z: Tensor, y: Tensor, temperature: float, next_token: Tensor) -> dict[str, Tensor]:
    """All columns of ``z`` and ``y``, both (rows, V) float32, from the kernels' sums."""
    both = torch.cat([z, y])
    pairs = torch.stack([torch.arange(len(z)), torch.arange(len(z)) + len(z)], 1)
    gathered = fused.gather(fused_numba, both, pairs, temperature, next_token)
    return fused.finish(gathered, both.shape[1], temperature, Change)


def check(z: Tensor, y: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    following = torch.arange(len(z))
    found = by_sums(z, y, temperature, following)
    exact = compare_logits(z.double(), y.double(), temperature, following)
    for column in (*Z_COLUMNS, *P_COLUMNS):
        relative, absolute = ERROR_BOUND[column]
        error = (found[column] - exact[column]).abs()
        assert (error <= relative * exact[column].abs() + absolute).all(), (column, found[column], exact[column])
    return found


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(
    ("spread", "change"), [(1.0, 1e-6), (1.0, 1e-4), (3.0, 1e-3), (3.0, 0.1), (3.0, 1.0), (10.0, 3.0), (4.0, 40.0)]
)
def test_every_column_keeps_its_error_bound(spread: float, change: float, temperature: float) -> None:
    """Would catch float32 sums over too many tokens, a reordered y - x - anchor, and an exp that is off; with a last block that is not full."""
    check(*logits(6, 5003, spread, change, 11), temperature)
    z, y = logits(6, 40_003, spread, change, 17)  # three segments
    check(z + 100, y + 130 + 0.01 * z, temperature)


@pytest.mark.parametrize(
    "case",
    [
        "long dense, short target",
        "one-hot, to flat",
        "flat, to one-hot",
        "opposite",
        "disagree",
    ],
)
def test_extreme_pairs(case: str) -> None:
    z, y = logits(4, 20_000, 1.0, 1.0, 41)
    if case == "long dense, short target":
        z = z * 1000
    elif case == "one-hot, to flat":
        z = torch.zeros_like(z).index_fill_(1, torch.tensor([77]), 60.0)
    elif case == "flat, to one-hot":
        y = torch.zeros_like(z).index_fill_(1, torch.tensor([0]), 60.0)
    elif case == "opposite":
        y = -0.001 * z + 0.0001 * y
    else:
        z, y = logits(200, 5000, 4.0, 60.0, 61)
    found = check(z, y)
    assert found["js"].max() <= np.log(2)
    assert found["tv"].max() <= 1


def test_small_divergences_are_not_rounding_noise() -> None:
    """A KL of 1e-12 of logits in float32, to 1e-3 of itself. Total variation adds up |p - q| of tokens that are on one side or the other by less
    than a float32 of the logit, which side the processor's rounding says: its bound is absolute."""
    z, y = logits(8, 40_000, 2.0, 1e-6, 31)
    found, exact = by_sums(z, y, 1.0, torch.arange(8)), compare_logits(z.double(), y.double())
    assert exact["kl_dense_target"].max() < 1e-11
    for column in ("kl_dense_target", "kl_target_dense", "js", "z_cos_dev", "tv"):
        torch.testing.assert_close(found[column], exact[column], rtol=1e-3, atol=2e-9 if column == "tv" else 0)


def test_a_row_against_itself_is_exactly_zero() -> None:
    z = torch.randn(5, 20_001, generator=generator(6)) * 6
    found = by_sums(z, z.clone(), 0.7, torch.arange(5))
    one = {"z_cos", "p_cos", "top1_agree", "top5_overlap"}
    for column in one:
        assert (found[column] == 1).all(), column
    torch.testing.assert_close(found["z_cos_centred"], torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-15)
    apart = ("z_cos_centred", "entropy_dense", "entropy_target", "nll_dense", "nll_target", "nll_target_of_dense")
    apart += ("confidence_dense", "confidence_target")
    for column in set(found) - one - set(apart):
        assert (found[column] == 0).all(), column
    assert torch.equal(found["nll_dense"], found["nll_target"])


@pytest.mark.parametrize("vocab", [1, 3, 10, 129, 3000, 40_000])
def test_likeliest_tokens_with_ties_to_the_lower(vocab: int) -> None:
    """Also signed zeros, which tie; ascending rows, where every token is the best so far; and constant rows."""
    z = (torch.randn(60, vocab, generator=generator(51)) * 8).round()
    z = torch.cat([z, -z.abs(), torch.arange(vocab)[None].float(), torch.zeros(1, vocab)])
    _, top = fused_numba.row_sums(z, 1.0)
    order = np.argsort(-z.numpy(), axis=1, kind="stable")[:, : min(10, vocab)]
    assert (top.numpy() == order).all()


def test_ties_in_the_columns() -> None:
    z, y = logits(40, 3000, 8.0, 1.0, 52)
    check(z.round(), y.round())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("place", [0, 1, 5000, 39_999])
def test_nan_and_infinity_are_seen(value: float, place: int) -> None:
    z, _ = logits(3, 40_000, 3.0, 0.0, 71)
    z[1, place] = value
    sums, top = fused_numba.row_sums(z, 1.0)
    assert fused.row_stats(z, sums, top, 1.0).finite.tolist() == [True, False, True]
    assert ((top >= 0) & (top < 40_000)).all()


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_nothing_depends_on_threads_or_on_the_batch(threads: object) -> None:
    """Bit for bit: one thread and three, all pairs at once and one by one, rows side by side or with a gap, and a second time."""
    z = torch.cat(logits(9, 20_003, 3.0, 0.3, 81))
    pairs = torch.randint(0, len(z), (23, 2), generator=generator(82))
    threads(1)  # type: ignore[operator]
    rows = fused_numba.row_sums(z, 0.8)
    guessed = fused.pilots(z, pairs, fused.row_stats(z, *rows, 0.8), 0.8)
    sums = fused_numba.pair_sums(z, pairs, guessed, 0.8)
    wide = torch.full((len(z), 20_100), torch.nan)
    wide[:, 7:20_010] = z
    for count, same in ((1, z), (3, z), (3, z), (2, wide[:, 7:20_010])):
        threads(count)  # type: ignore[operator]
        again = fused_numba.row_sums(same, 0.8)
        assert torch.equal(again[0], rows[0])
        assert torch.equal(again[1], rows[1])
        assert torch.equal(fused_numba.pair_sums(same, pairs, guessed, 0.8), sums)
    for k in range(len(pairs)):
        alone = fused_numba.pair_sums(z[pairs[k]], torch.tensor([[0, 1]]), guessed[k : k + 1], 0.8)
        assert torch.equal(alone[0], sums[k])
    assert torch.equal(torch.cat([fused_numba.row_sums(z[k : k + 1], 0.8)[0] for k in range(len(z))]), rows[0])


def test_nothing_to_do() -> None:
    empty = torch.empty(0, 50)
    sums, top = fused_numba.row_sums(empty, 1.0)
    assert sums.shape == (0, 1, len(fused.ROW_SUMS))
    assert top.shape == (0, 10)
    pairs = torch.empty(0, 2, dtype=torch.int64)
    found = fused_numba.pair_sums(torch.zeros(2, 50), pairs, torch.empty(0, len(fused.PILOTS)), 1.0)
    assert found.shape == (0, 1, len(fused.PAIR_SUMS))


def test_other_logits_are_refused() -> None:
    for z in (torch.zeros(2, 50, dtype=torch.float64), torch.zeros(50, 2).T):
        with pytest.raises(ValueError, match="float32"):
            fused_numba.row_sums(z, 1.0)


_PROBE = """
import torch
from prunescope.compare.kernels import numba_sums as fused_numba
sums, top = fused_numba.row_sums(torch.arange(600.).view(2, 300), 1.0)
print(top[:, 0].tolist(), fused_numba._rows.stats.cache_hits.total())
"""


def test_compiled_kernels_are_kept_and_do_not_need_to_be(tmp_path: Path) -> None:
    """The second process compiles nothing; one whose cache folder cannot be written still computes."""
    source = Path(fused_numba.__file__).parent
    blocked = tmp_path / "a file"
    blocked.write_text("")

    def probe(cache: Path) -> str:
        environment = {**os.environ, "PRUNESCOPE_CACHE": str(cache), "PYTHONPATH": str(source.parents[2])}
        environment.pop("NUMBA_CACHE_DIR", None)
        return subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert probe(tmp_path / "cache") == "[299, 299] 0"
    assert list((tmp_path / "cache").rglob("*.nbi"))
    assert probe(tmp_path / "cache") == "[299, 299] 1"
    assert probe(blocked / "cache").startswith("[299, 299]")


def test_compiling_without_any_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def nowhere(*args: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(numba, "njit", nowhere)
    assert fused_numba._kernel(_twice)(21) == 42


def _twice(x: int) -> int:
    return 2 * x


def test_without_numba_the_plain_operations_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where numba is there but refuses to be imported, as it does beside a numpy that is too new for it."""
    head = Head(torch.randn(700, 24, generator=generator(91)))
    streams = torch.randn(6, 24, generator=generator(92))
    pairs = torch.tensor([[0, 1], [1, 2], [3, 5]])
    following = torch.tensor([3, -1, 699])
    assert fused.backend(streams.device, torch.float32) is fused_numba
    with_kernels = compare(streams, pairs, head, next_token=following)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "prunescope.compare.kernels.numba_sums")
    assert fused.backend(streams.device, torch.float32) is None
    plain = compare(streams, pairs, head, next_token=following)
    for column, values in plain.items():
        relative, absolute = ERROR_BOUND[column]
        torch.testing.assert_close(with_kernels[column], values, rtol=2 * relative, atol=2 * absolute, equal_nan=True)
