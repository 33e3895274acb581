"""The Triton kernels, on a GPU where there is one and in Triton's interpreter elsewhere: every column against float64 on the same logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from prunescope.compare.kernels import sums as fused
from prunescope.compare.metrics import ERROR_BOUND, P_COLUMNS, Z_COLUMNS, Change, compare_logits, relative_change

pytest.importorskip("triton", reason="the kernels for GPUs need triton, which is not installed")
from prunescope.compare.kernels import triton_sums as fused_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [  # the interpreter computes in numpy, which speaks of overflows that a `where` then drops
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(rows: int, vocab: int, spread: float, change: float, seed: int) -> tuple[Tensor, Tensor]:
    z = torch.randn(rows, vocab, dtype=torch.float64, generator=generator(seed)) * spread
    y = z + change * torch.randn(rows, vocab, dtype=torch.float64, generator=generator(seed + 1))
    return z.float().to(DEVICE), y.float().to(DEVICE)


def by_kernels(z: Tensor, y: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    both = torch.cat([z, y])
    number = torch.arange(len(z), device=z.device)
    pairs = torch.stack([number, number + len(z)], 1)
    found = fused.gather(fused_triton, both, pairs, temperature, number)
    return fused.finish(found, both.shape[1], temperature, Change)


def check(z: Tensor, y: Tensor, temperature: float = 1.0) -> None:
    assert_bounds(by_kernels(z, y, temperature), z, y, temperature)


def assert_bounds(found: dict[str, Tensor], z: Tensor, y: Tensor, temperature: float) -> None:
    exact = compare_logits(z.double(), y.double(), temperature, torch.arange(len(z), device=z.device))
    for column in (*Z_COLUMNS, *P_COLUMNS):
        relative, absolute = ERROR_BOUND[column]
        error = (found[column] - exact[column]).abs()
        assert (error <= relative * exact[column].abs() + absolute).all(), (column, found[column], exact[column])


@pytest.mark.parametrize(("spread", "change", "temperature"), [(1.0, 1e-6, 1.0), (3.0, 0.1, 0.3), (4.0, 40.0, 5.0)])
def test_every_column_keeps_its_error_bound(spread: float, change: float, temperature: float) -> None:
    """Would catch a wrong order of the stored sums, float32 sums over too many tokens, and a mask that is off: two segments, the last
    block not full; then with common shifts and blocks that are all full."""
    check(*logits(2, 17_003, spread, change, 11), temperature)
    z, y = logits(2, 4096, spread, change, 17)
    check(z + 10, y + 13 + 0.01 * z, temperature)


@pytest.mark.parametrize("case", ["long dense, short target", "one-hot, to flat", "opposite"])
def test_extreme_pairs(case: str) -> None:
    z, y = logits(2, 3000, 1.0, 1.0, 41)
    if case == "long dense, short target":
        z = z * 1000
    elif case == "one-hot, to flat":
        z = torch.zeros_like(z).index_fill_(1, torch.tensor([77], device=DEVICE), 60.0)
    else:
        y = -0.001 * z + 0.0001 * y
    check(z, y)


@pytest.mark.parametrize("wish", [0.0, 1.0])
def test_the_coarse_kernel_is_believed_only_where_it_keeps_the_digits(wish: float) -> None:
    """The pilots are overruled: every pair is first tried by the coarse kernel, then none. A pair that differs by 1e-4, one that is one-hot at another
    token, a common shift of 1000, and a change along z must keep every bound either way. Would catch a sum of the coarse kernel that is settled
    although its digits have cancelled, a constant whose rounding is not given back, and a pair that neither kernel sweeps."""
    noise = torch.randn(4, 2600, dtype=torch.float64, generator=generator(91))
    z = torch.randn(4, 2600, dtype=torch.float64, generator=generator(92)) * 3
    y = z + torch.tensor([1e-4, 0.5, 1.0, 0.01], dtype=torch.float64)[:, None] * noise
    z[1, 7], y[1, 9] = 24.0, 24.0
    z[2] += 1000
    y[2] += 1003
    y[3] += 0.3 * z[3]
    both = torch.cat([z, y]).float().to(DEVICE)
    number = torch.arange(4, device=DEVICE)
    pairs = torch.stack([number, number + 4], 1)
    sums, top = fused_triton.row_sums(both, 1.0)
    known = fused_triton.prepare(both, pairs, sums, top, 1.0, number, None)
    assert known.coarse is not None
    known.coarse[:, 0] = wish
    swept = fused_triton.sweep(both, pairs, known, 1.0)
    gathered = fused.Gathered(known.rows, pairs, known.guess, swept, known.top_z, known.next_z)
    assert_bounds(fused.finish(gathered, 2600, 1.0, Change), both[:4], both[4:], 1.0)


def test_entropy_of_a_nearly_one_hot_row_keeps_its_digits() -> None:
    """1e-8 of mass beside a token of mass 1: would be lost if both were added in float32."""
    z, y = logits(2, 3000, 1.0, 0.1, 43)
    z[:, 5], y[:, 5] = 27.0, 27.5
    found, exact = by_kernels(z, y), compare_logits(z.double(), y.double())
    assert exact["entropy_dense"].max() < 1e-6
    for column in ("entropy_dense", "entropy_target"):
        torch.testing.assert_close(found[column], exact[column], rtol=1e-4, atol=0)


def test_a_row_against_itself_is_exactly_zero() -> None:
    z, _ = logits(3, 5001, 6.0, 0.0, 6)
    found = by_kernels(z, z.clone(), 0.7)
    for column in ("z_cos", "p_cos", "top1_agree", "top5_overlap"):
        assert (found[column] == 1).all(), column
    for column in (
        "z_cos_dev",
        "p_cos_dev",
        "kl_dense_target",
        "kl_target_dense",
        "js",
        "tv",
        "dz_rms",
        "var_p",
        "kl_est",
        "dp_top1",
    ):
        assert (found[column] == 0).all(), column


@pytest.mark.parametrize("vocab", [3, 129, 3000])
def test_likeliest_tokens_with_ties_to_the_lower(vocab: int) -> None:
    z = (torch.randn(6, vocab, generator=generator(51)) * 8).round()
    z = torch.cat([z, -z.abs() - 1, torch.arange(vocab)[None].float(), torch.zeros(1, vocab)])
    _, top = fused_triton.row_sums(z.to(DEVICE), 1.0)
    keep = min(10, vocab)
    assert (top.cpu().numpy()[:, :keep] == np.argsort(-z.numpy(), axis=1, kind="stable")[:, :keep]).all()


def test_nan_is_seen() -> None:
    z, y = logits(2, 3000, 1.0, 0.1, 71)
    z[1, 2999] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        by_kernels(z, y)


def test_hidden_states_as_relative_change_has_them() -> None:
    """Also where the target is opposite, or tiny against the dense state."""
    h = torch.randn(4, 1500, generator=generator(81))
    h = torch.cat([h, -1.5 * h[:1] + 1e-4 * h[1:2], 1e-3 * h[:1] + 1e-5 * h[1:2]]).to(DEVICE)
    pairs = torch.tensor([[0, 1], [0, 4], [0, 5], [2, 2]], device=DEVICE)
    x, y = (h[rows].double() for rows in pairs.unbind(1))
    exact = torch.stack(relative_change(x, y, y - x), 1)
    torch.testing.assert_close(fused_triton.hidden_change(h, pairs), exact, rtol=1e-10, atol=1e-14)
