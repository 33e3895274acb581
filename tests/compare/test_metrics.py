"""Every column against independent computations: the paper's printed numbers, float64 numpy, and 60-digit arithmetic."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunescope.compare.columns import compare, compare_final
from prunescope.compare.head import Head
from prunescope.compare.metrics import (
    COLUMNS,
    ERROR_BOUND,
    H_COLUMNS,
    P_COLUMNS,
    Z_COLUMNS,
    compare_hidden,
    compare_logits,
    space_of,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the paper's own numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_reference_rows_to_the_printed_digits(reference: Path, temperature: float) -> None:
    """Would catch a wrong base of the change, the wrong weights in an estimate, and a variance with n - 1."""
    inputs = {name: value.double() for name, value in load_file(reference / "metrics_inputs.safetensors").items()}
    expected = json.loads((reference / "metrics_expected.json").read_text())["rows"]
    count = len(inputs["h_dense"])
    pairs = torch.stack([torch.arange(count), torch.arange(count) + count], 1)
    streams = torch.cat([inputs["h_dense"], inputs["h_target"]])
    head = Head(inputs["lm_head.weight"])
    found = compare(streams, pairs, head, temperature=temperature)
    z = head.logits(streams, torch.float64)
    checked = 0
    for row in (r for r in expected if r["temperature"] == temperature):
        for column, value in row.items():
            if column in found:
                digits = 4 if column in ("h_cos", "z_cos", "p_cos") else 6
                assert round(found[column][row["row"]].item(), digits) == pytest.approx(value, abs=1e-12), column
                checked += 1
        assert z[row["row"]].topk(5).indices.tolist() == row["top5_dense"]
        assert z[row["row"] + count].topk(5).indices.tolist() == row["top5_target"]
    assert checked == count * 16


# --- float64 by hand ---------------------------------------------------------------------------------------------------


def by_hand(z: np.ndarray, y: np.ndarray, t: float, following: int) -> dict[str, float]:
    """One row, from the spec's definitions in the plainest float64: no shared code, no clever forms."""
    z, y = z.astype(np.float64), y.astype(np.float64)
    p, q = (np.exp(v / t - np.max(v / t)) for v in (z, y))
    log_p, log_q = (v / t - np.max(v / t) - np.log(np.sum(w)) for v, w in ((z, p), (y, q)))
    p, q = p / p.sum(), q / q.sum()
    d = y - z

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    def var(w: np.ndarray, values: np.ndarray = d) -> float:
        w = w / w.sum()
        return float(w @ (values - w @ values) ** 2)

    def kl(a: np.ndarray, log_a: np.ndarray, log_b: np.ndarray) -> float:
        return float(np.sum(a * (log_a - log_b)))

    m = (p + q) / 2
    alpha = float(d @ z / (z @ z))
    order, order_q = np.argsort(-z, kind="stable"), np.argsort(-y, kind="stable")
    best = order[0]
    return {
        "z_cos": cos(z, y),
        "z_cos_dev": 0.5 * float(np.sum((z / np.linalg.norm(z) - y / np.linalg.norm(y)) ** 2)),
        "z_cos_dev_est": float(np.sum((d - alpha * z) ** 2) / (2 * z @ z)),
        "z_cos_centred": cos(z - z.mean(), y - y.mean()),
        "z_alpha": alpha,
        "z_para_rel": float(np.linalg.norm(alpha * z) / np.linalg.norm(z)),
        "z_orth_rel": float(np.linalg.norm(d - alpha * z) / np.linalg.norm(z)),
        "var_uniform": float(np.var(d)),
        "dz_l1": float(np.abs(d).mean()),
        "dz_rms": float(np.sqrt((d**2).mean())),
        "dz_top5_l1": float(np.abs(d[order[:5]]).mean()),
        "dz_top5_rms": float(np.sqrt((d[order[:5]] ** 2).mean())),
        "p_cos": cos(p, q),
        "p_cos_dev": 0.5 * float(np.sum((p / np.linalg.norm(p) - q / np.linalg.norm(q)) ** 2)),
        "p_cos_dev_est": var(p**2) / (2 * t * t),
        "p_cos_dev_est_target": var(q**2) / (2 * t * t),
        "kl_dense_target": kl(p, log_p, log_q),
        "kl_est": var(p) / (2 * t * t),
        "kl_target_dense": kl(q, log_q, log_p),
        "kl_est_target": var(q) / (2 * t * t),
        "js": (kl(p, log_p, np.log(m)) + kl(q, log_q, np.log(m))) / 2,
        "tv": float(np.abs(p - q).sum() / 2),
        "var_p": var(p),
        "var_r": var(p**2),
        "var_top5": var(p[order[:5]], d[order[:5]]),
        "var_top10": var(p[order[:10]], d[order[:10]]),
        "entropy_dense": float(-np.sum(p * log_p)),
        "entropy_target": float(-np.sum(q * log_q)),
        "top1_agree": float(best == order_q[0]),
        "top5_overlap": len(set(order[:5]) & set(order_q[:5])) / 5,
        "rank_in_target": float(np.sum(y > y[best])),
        "dp_top1": float(q[best] - p[best]),
        "nll_dense": float(-log_p[following]),
        "nll_target": float(-log_q[following]),
    }


def test_by_hand_covers_every_column() -> None:
    assert set(by_hand(np.arange(12.0), np.arange(12.0)[::-1], 1.0, 3)) == {*Z_COLUMNS, *P_COLUMNS}
    assert [space_of(name) for name in ("h_cos", "dz_l1", "js")] == ["h", "z", "p"]
    with pytest.raises(KeyError):
        space_of("prompt")


def logits(rows: int, vocab: int, spread: float, change: float, seed: int) -> tuple[Tensor, Tensor]:
    z = torch.randn(rows, vocab, dtype=torch.float64, generator=generator(seed)) * spread
    return z, z + change * torch.randn(rows, vocab, dtype=torch.float64, generator=generator(seed + 1))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(("spread", "change"), [(1.0, 1e-2), (3.0, 0.5), (10.0, 3.0), (4.0, 40.0)])
def test_float64_equals_by_hand(spread: float, change: float, temperature: float) -> None:
    z, y = logits(4, 257, spread, change, seed=5)
    following = torch.tensor([3, 0, 256, 17])
    found = compare_logits(z, y, temperature, following)
    for row in range(4):
        expected = by_hand(z[row].numpy(), y[row].numpy(), temperature, int(following[row]))
        for column, value in expected.items():
            assert found[column][row].item() == pytest.approx(value, rel=1e-8, abs=1e-13), column


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(
    ("spread", "change"), [(1.0, 1e-6), (1.0, 1e-4), (3.0, 1e-3), (3.0, 0.1), (3.0, 1.0), (10.0, 3.0), (4.0, 40.0)]
)
def test_low_precision_keeps_its_error_bound(
    spread: float, change: float, temperature: float, dtype: torch.dtype
) -> None:
    """The same logits in float32 and in float64: every column within ERROR_BOUND. Would catch eps in a log and bf16 sums."""
    z, y = (v.to(dtype) for v in logits(6, 5003, spread, change, seed=11))
    following = torch.arange(6)
    found = compare_logits(z, y, temperature, following)
    exact = compare_logits(z.double(), y.double(), temperature, following)
    for column in (*Z_COLUMNS, *P_COLUMNS):
        relative, absolute = ERROR_BOUND[column]
        error = (found[column] - exact[column]).abs()
        assert (error <= relative * exact[column].abs() + absolute).all(), (column, error.max(), exact[column])


@pytest.mark.parametrize("case", ["long dense, short target", "one-hot, to flat", "opposite"])
def test_a_target_that_is_tiny_against_the_dense_vector(case: str) -> None:
    """1 + alpha near zero: would catch a cosine taken from it in float32."""
    z, y = (v.float() for v in logits(4, 20_000, 1.0, 1.0, seed=41))
    if case == "long dense, short target":
        z = z * 1000
    elif case == "one-hot, to flat":
        z = torch.zeros_like(z).index_fill_(1, torch.tensor([77]), 60.0)
    else:
        y = -0.001 * z + 0.0001 * y
    found, exact = compare_logits(z, y), compare_logits(z.double(), y.double())
    for column in ("z_cos", "z_cos_centred", "p_cos", "z_cos_dev", "p_cos_dev", "z_orth_rel", "z_cos_dev_est"):
        relative, absolute = ERROR_BOUND[column]
        assert ((found[column] - exact[column]).abs() <= relative * exact[column].abs() + absolute).all(), column


def test_hidden_columns_are_float64_whatever_the_input() -> None:
    h = torch.randn(5, 96, generator=generator(1)).bfloat16()
    g = (h.float() + 0.01 * torch.randn(5, 96, generator=generator(2))).bfloat16()
    found, exact = compare_hidden(h, g), {}
    a, b = h.double().numpy(), g.double().numpy()
    d = b - a
    alpha = (d * a).sum(1) / (a * a).sum(1)
    unit_a, unit_b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    orth = np.linalg.norm(d - alpha[:, None] * a, axis=1) / np.linalg.norm(a, axis=1)
    exact["h_cos"] = (unit_a * unit_b).sum(1)
    exact["h_cos_dev"] = 0.5 * ((unit_a - unit_b) ** 2).sum(1)
    exact |= {"h_alpha": alpha, "h_para_rel": abs(alpha), "h_orth_rel": orth, "h_cos_dev_est": orth**2 / 2}
    assert set(exact) == set(H_COLUMNS)
    for column, value in exact.items():
        np.testing.assert_allclose(found[column].numpy(), value, rtol=1e-9)


@pytest.mark.parametrize("deviation", [1e-9, 1e-6, 1e-3])
def test_cosine_deviation_of_almost_equal_vectors(deviation: float) -> None:
    """1 - cos of 1e-18 must not come out as 0 or 1e-16. Checked in 60-digit arithmetic; also where the change is mostly along X."""
    mpmath.mp.dps = 60
    x = torch.randn(40, dtype=torch.float64, generator=generator(3))
    noise = torch.randn(40, dtype=torch.float64, generator=generator(4))
    for y in (x + deviation * noise, 1.5 * x + deviation * noise, -2.0 * x + deviation * noise):
        a, b = ([mpmath.mpf(v) for v in w.tolist()] for w in (x, y))
        dot, aa, bb = (mpmath.fdot(u, v) for u, v in ((a, b), (a, a), (b, b)))
        exact = 1 - dot / mpmath.sqrt(aa * bb)
        assert compare_hidden(x[None], y[None])["h_cos_dev"].item() == pytest.approx(float(exact), rel=1e-6)


# --- the identity of KL ------------------------------------------------------------------------------------------------


def identity_of_kl(z: Tensor, y: Tensor, t: float) -> mpmath.mpf:
    """log E_p[exp(dz / T)] - E_p[dz] / T, in 250-digit arithmetic."""
    mpmath.mp.dps = 250
    s = [mpmath.mpf(v) / mpmath.mpf(t) for v in z.tolist()]
    d = [(mpmath.mpf(b) - mpmath.mpf(a)) / mpmath.mpf(t) for a, b in zip(z.tolist(), y.tolist(), strict=True)]
    top = max(s)
    weights = [mpmath.exp(v - top) for v in s]
    total = mpmath.fsum(weights)
    mean = mpmath.fsum(w * x for w, x in zip(weights, d, strict=True)) / total
    return mpmath.log(mpmath.fsum(w * mpmath.exp(x - mean) for w, x in zip(weights, d, strict=True)) / total)


KL_CASES: dict[str, tuple[Tensor, Tensor]] = {
    "random": logits(1, 41, 3.0, 0.7, seed=21),
    "deviation 1e-9": logits(1, 41, 3.0, 1e-9, seed=22),
    "deviation 1e-5": logits(1, 41, 3.0, 1e-5, seed=23),
    "wide": logits(1, 41, 40.0, 20.0, seed=24),
    "a common shift": tuple(v + s for v, s in zip(logits(1, 41, 3.0, 1e-3, seed=25), (0.0, 7.0), strict=True)),  # type: ignore[dict-item]
}
_one_hot = torch.full((1, 41), -80.0, dtype=torch.float64)
_one_hot[0, 7] = 80.0
_other = torch.full((1, 41), -80.0, dtype=torch.float64)
_other[0, 9] = 80.0
_noise = torch.randn(1, 41, dtype=torch.float64, generator=generator(26))
KL_CASES |= {
    "one-hot, deviation 1e-9": (_one_hot, _one_hot + 1e-9 * _noise),
    "one-hot, deviation 1": (_one_hot, _one_hot + _noise),
    "one-hot, to another": (_one_hot, _other),
    "one-hot, to flat": (_one_hot, torch.zeros_like(_one_hot)),
    "flat, to one-hot": (torch.zeros_like(_one_hot), _one_hot),
}


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("case", KL_CASES)
def test_kl_identity_to_1e_6(case: str, temperature: float) -> None:
    """Both directions, wherever the exact value is representable; would catch any cancellation, overflow or eps."""
    z, y = KL_CASES[case]
    found = compare_logits(z, y, temperature)
    for column, exact in (
        ("kl_dense_target", identity_of_kl(z[0], y[0], temperature)),
        ("kl_target_dense", identity_of_kl(y[0], z[0], temperature)),
    ):
        assert exact >= 0
        assert found[column].item() == pytest.approx(float(exact), rel=1e-6, abs=1e-250), column
    assert all(torch.isfinite(found[name]).all() for name in P_COLUMNS if name in found)
    assert 0 <= found["js"].item() <= np.log(2) * (1 + 1e-12)
    assert 0 <= found["tv"].item() <= 1 + 1e-12


def test_bounded_divergences_keep_their_bounds_in_float32() -> None:
    """Total disagreement: js is at most ln 2 and tv at most 1, to the last digit."""
    z, y = (v.float() for v in logits(200, 5000, 4.0, 60.0, seed=61))
    found = compare_logits(z, y)
    assert found["tv"].max() > 0.999999
    assert found["tv"].max() <= 1
    assert found["js"].max() <= np.log(2)


def test_small_divergences_in_float32_are_not_rounding_noise() -> None:
    """A deviation of 1e-4 in float32: KL is about 1e-8, far under the rounding of one log-probability, and still right."""
    z, y = (v.float() for v in logits(8, 4096, 2.0, 1e-4, seed=31))
    found, exact = compare_logits(z, y), compare_logits(z.double(), y.double())
    for column in ("kl_dense_target", "kl_target_dense", "js", "p_cos_dev", "z_cos_dev"):
        assert exact[column].max() < 1e-7
        torch.testing.assert_close(found[column], exact[column], rtol=1e-3, atol=0)


# --- a model against itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_against_itself_is_exactly_zero(dtype: torch.dtype) -> None:
    z = (torch.randn(5, 3001, generator=generator(6)) * 6).to(dtype)
    h = torch.randn(5, 64, generator=generator(7)).to(dtype)
    found = compare_logits(z, z.clone(), 0.7) | compare_hidden(h, h.clone())
    for column in ("h_cos", "z_cos", "p_cos", "top1_agree", "top5_overlap"):
        assert (found[column] == 1).all(), column
    torch.testing.assert_close(found["z_cos_centred"], torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-15)
    zero = set(found) - {
        "h_cos",
        "z_cos",
        "p_cos",
        "z_cos_centred",
        "top1_agree",
        "top5_overlap",
        "entropy_dense",
        "entropy_target",
    }
    for column in zero:
        assert (found[column] == 0).all(), column


def test_ties_and_tiny_vocabularies() -> None:
    z = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    y = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    found = compare_logits(z, y)
    assert found["rank_in_target"].tolist() == [0, 2]
    assert found["top1_agree"].tolist() == [1, 0]
    assert found["top5_overlap"].tolist() == [1, 1]


def test_ties_go_to_the_lower_token() -> None:
    """bf16 logits tie all the time; `topk` alone gives whichever it likes."""
    z = (torch.randn(200, 3000, generator=generator(51)) * 8).round().bfloat16()
    y = (z.float() + torch.randn(200, 3000, generator=generator(52))).round().bfloat16()
    found = compare_logits(z, y)
    order = np.argsort(-z.float().numpy(), axis=1, kind="stable")
    best, best_target = order[:, 0], np.argsort(-y.float().numpy(), axis=1, kind="stable")[:, 0]
    assert (found["top1_agree"].numpy() == (best == best_target)).all()
    delta = (y.double() - z.double()).numpy()
    np.testing.assert_allclose(
        found["dz_top5_l1"].numpy(), np.abs(np.take_along_axis(delta, order[:, :5], 1)).mean(1), rtol=1e-5
    )
    assert (z.float().topk(2).values[:, 0] == z.float().topk(2).values[:, 1]).sum() > 10


# --- many rows in bounded memory ---------------------------------------------------------------------------------------


def chain(layers: int, steps: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Streams and pairs as the drop analysis makes them: neighbours share rows."""
    streams = torch.randn(steps * (layers + 1), width, generator=generator(seed))
    one = torch.stack([torch.arange(1, layers + 1), torch.arange(layers)], 1)
    return streams, torch.cat([one + step * (layers + 1) for step in range(steps)])


def test_chunks_change_nothing() -> None:
    streams, pairs = chain(6, 9, 32)
    head = Head(
        torch.randn(2048, 32, generator=generator(9)),
        bias=torch.randn(2048, generator=generator(10)),
        scale=0.3,
        softcap=5.0,
    )
    following = torch.randint(-1, 2048, (len(pairs),), generator=generator(12))
    whole = compare(streams, pairs, head, next_token=following)
    pieces = compare(streams, pairs, head, next_token=following, memory=26 * 2**20)
    z = streams @ head.weight.T
    z = torch.tanh((z + head.bias) * 0.3 / 5.0) * 5.0
    direct = compare_logits(z[pairs[:, 0]], z[pairs[:, 1]], 1.0, following) | compare_hidden(
        streams[pairs[:, 0]], streams[pairs[:, 1]]
    )
    assert set(whole) == set(COLUMNS)
    for column in COLUMNS:
        torch.testing.assert_close(whole[column], pieces[column], rtol=1e-4, atol=1e-7, equal_nan=True)
        torch.testing.assert_close(whole[column], direct[column], rtol=1e-3, atol=2e-6, equal_nan=True)
    assert torch.equal(whole["nll_dense"].isnan(), following < 0)


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors alive that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                if size and key not in self.known:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, size)
        return out


@pytest.mark.parametrize("memory", [40 * 2**20, 80 * 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_its_bound_whatever_the_number_of_tokens(memory: int, dtype: torch.dtype) -> None:
    """40 000 logits x up to 1,300 rows would be 208 MB: would catch any tensor of tokens x V, also in a temporary."""
    head = Head(torch.randn(40_000, 16, generator=generator(1)).to(dtype))
    for steps in (1, 20, 100):
        streams, pairs = chain(12, steps, 16)
        held = _Held()
        with held:
            compare(streams.to(dtype), pairs, head, memory=memory)
        assert 2**20 < held.peak <= memory


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    z = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="temperature"):
        compare_logits(z, z, 0.0)
    with pytest.raises(ValueError, match="one shape"):
        compare_logits(z, torch.zeros(2, 6))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        compare_logits(torch.tensor([[0.0, float("nan")]]), torch.zeros(1, 2))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        compare_logits(torch.zeros(1, 2), torch.tensor([[0.0, float("inf")]]))
    with pytest.raises(ValueError, match="give at least"):
        compare(torch.zeros(2, 4), torch.tensor([[0, 1]]), Head(torch.zeros(9, 4)), memory=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_most_likely_tokens_of_both_sides(dtype: torch.dtype) -> None:
    """With the kernels and without, against a stable sort and a softmax in float64. Would catch the sides exchanged, a dense row that is read
    at the place of a target row, a temperature left out, and ties in another order."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(40, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    for weight in weights:
        weight[30] = weight[7]  # equal logits
    h, h_target = (torch.randn(n, 8, generator=generator, dtype=torch.float64).to(dtype) for n in (3, 5))
    index = torch.tensor([2, 0, 0, 1, 2])
    found = compare_final(h, h_target, Head(weights[0]), Head(weights[1]), index, temperature=0.7, tops=10)
    for side, states, weight in (("dense", h[index], weights[0]), ("target", h_target, weights[1])):
        z = (states.double() @ weight.double().T) / 0.7
        p, order = z.softmax(-1).sort(dim=-1, descending=True, stable=True)
        assert found[f"top_{side}"].tolist() == order[:, :10].tolist()
        torch.testing.assert_close(found[f"top_{side}_p"].double(), p[:, :10], rtol=2e-6 if dtype == torch.float32 else 1e-12, atol=0)  # fmt: skip
        assert found[f"top_{side}_p"].dtype == dtype
