"""Every number that prunescope reports about a dense and a target model, as pure functions of tensors.

A model computes ``h`` (hidden state) -> ``z = W h`` (logits) -> ``p = softmax(z / T)``. Given the same place in a dense
and in a target model, this file says how far apart they are in each of the three spaces. Symbols and theorem numbers are
those of "Demystifying When Pruning Works via Representation Hierarchies" (arXiv 2603.24652).

Three ideas carry the file:

* The dense side is the base, and the change is what we compute with: ``delta = target - dense``. A cosine close to 1 is
  never found by subtracting two nearly equal numbers; `relative_change` splits delta into a part along the dense
  vector (alpha) and a part across it (orth), and every cosine follows from these two.
* Probabilities stay in log space, and only *differences* of log-probabilities enter. A KL divergence is a sum of terms
  ``p (e^x - 1 - x) >= 0``, so nothing cancels, however small the divergence is (`excess`).
* No tensor of tokens x vocabulary is ever held. `compare` projects a few rows at a time, and rows that take part in
  several comparisons (the stream after sublayer i is the stream before sublayer i + 1) are projected once.

The forms written here are the reference: plain tensor operations, about fifty sweeps over the logits of a pair. Where a kernel is at hand
(`fused.backend`), `compare` and `compare_final` take the same columns from sums that one sweep gathers, within the same bounds.

Precision. Rows are handled in float32, or in float64 if the inputs are float64; hidden states always in float64. The
relative error against float64 brute force on the same logits, for deviations of 1e-6 up to total disagreement, is below
``ERROR_BOUND[column]`` plus the absolute error there; tests hold every column to it. bf16 and fp16 inputs are upcast
first, so the bounds are those of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import factorial, log
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from prunescope.compare.kernels import sums as fused

__all__ = [
    "COLUMNS",
    "ERROR_BOUND",
    "H_COLUMNS",
    "P_COLUMNS",
    "Z_COLUMNS",
    "Head",
    "compare",
    "compare_final",
    "compare_hidden",
    "compare_logits",
    "least_memory",
    "space_of",
    "uses_tensor_cores",
]

H_COLUMNS = ("h_cos", "h_cos_dev", "h_cos_dev_est", "h_alpha", "h_para_rel", "h_orth_rel")
Z_COLUMNS = (
    *("z_cos", "z_cos_dev", "z_cos_dev_est", "z_cos_centred", "z_alpha", "z_para_rel", "z_orth_rel"),
    *("var_uniform", "dz_l1", "dz_rms", "dz_top5_l1", "dz_top5_rms"),
)
P_COLUMNS = (
    *("p_cos", "p_cos_dev", "p_cos_dev_est", "p_cos_dev_est_target"),
    *("kl_dense_target", "kl_est", "kl_target_dense", "kl_est_target", "js", "tv"),
    *("var_p", "var_r", "var_top5", "var_top10", "entropy_dense", "entropy_target"),
    *("top1_agree", "top5_overlap", "rank_in_target", "dp_top1", "nll_dense", "nll_target"),
)
COLUMNS = (*H_COLUMNS, *Z_COLUMNS, *P_COLUMNS)

ERROR_BOUND: dict[str, tuple[float, float]] = {
    # column: (relative, absolute) error in float32 against float64 brute force on the same logits
    **dict.fromkeys(COLUMNS, (1e-4, 1e-9)),
    **dict.fromkeys(H_COLUMNS, (1e-9, 1e-15)),  # float64 throughout
    **dict.fromkeys(("z_alpha", "z_para_rel"), (2e-5, 5e-8)),  # signed sum over V, terms cancel
    **dict.fromkeys(("kl_dense_target", "kl_target_dense", "js"), (1e-4, 1e-12)),
    **dict.fromkeys(
        ("z_cos", "z_cos_centred", "p_cos"), (1e-5, 2e-7)
    ),  # near a cosine of zero only the absolute error is small
    **dict.fromkeys(("p_cos_dev", "tv", "dp_top1"), (1e-4, 2e-7)),
    **dict.fromkeys(("nll_dense", "nll_target", "entropy_dense", "entropy_target"), (2e-5, 2e-6)),
    **dict.fromkeys(("top1_agree", "top5_overlap", "rank_in_target"), (0.0, 0.0)),  # exact
}

DEFAULT_MEMORY = 512 * 2**20
_TOP = 10  # likeliest tokens kept of every row
_GROUP = 2**18  # logits that the elementwise pass handles at once: small enough to stay in the cache
_PRODUCT_ROWS = 128  # rows that one tile of a GPU's matrix product covers
_GATHERED = 1500  # bytes that the kernels' sums and the columns of one pair take
_DEVICE_GROUP = 2**23  # the same where kernels do the rest
_TEMPORARIES = 20  # tensors of one group alive at the same time in `_pair_columns`, rounded up


def space_of(column: str) -> str:
    """The representation space, ``h``, ``z`` or ``p``, that a column belongs to. Raises KeyError for other names."""
    for space, names in (("h", H_COLUMNS), ("z", Z_COLUMNS), ("p", P_COLUMNS)):
        if column in names:
            return space
    raise KeyError(column)


# --- the geometry of a change: used for h, for z and for p -------------------------------------------------------------


class Change(NamedTuple):
    """A change of a vector X to Y = X + delta, split along and across X; all ``(rows,)``, float64."""

    alpha: Tensor  # <delta, X> / |X|^2, signed
    along: Tensor  # <Y, X> / |X|^2 = 1 + alpha, summed on its own: it may be small
    orth: Tensor  # |delta_orth| / |X|

    @property
    def cos(self) -> Tensor:
        """Cosine of X and Y: ``along / sqrt(along^2 + orth^2)``."""
        return self.along / torch.hypot(self.along, self.orth)

    @property
    def cos_dev(self) -> Tensor:
        """1 - cosine without cancellation: ``orth^2 / (s (s + along))`` with s the length of Y over X's."""
        length = torch.hypot(self.along, self.orth)
        return torch.where(self.along > 0, self.orth**2 / (length * (length + self.along)), 1 - self.along / length)

    @property
    def cos_dev_est(self) -> Tensor:
        """Theorem 1: ``|delta_orth|^2 / (2 |X|^2)``."""
        return self.orth**2 / 2


def relative_change(x: Tensor, y: Tensor, delta: Tensor) -> Change:
    """Split ``delta = y - x`` along and across ``x``, all ``(rows, n)``.

    What lies across x is the same of delta and of y; it is taken from the one that is nearly across already, so that it is exact both
    for a tiny change and for a y that is tiny against x.
    """
    length2 = (x * x).sum(-1, keepdim=True)
    alpha = (x * delta).sum(-1, keepdim=True) / length2
    along = (x * y).sum(-1, keepdim=True) / length2
    far = (alpha.abs() > 0.5).to(x.dtype)
    rest = torch.lerp(delta, y, far).addcmul_(x, torch.lerp(alpha, along, far), value=-1)
    orth = torch.linalg.vector_norm(rest, dim=-1) / length2[:, 0].sqrt()
    return Change(alpha[:, 0].double(), torch.where(far > 0, along, 1 + alpha.double())[:, 0].double(), orth.double())


def weighted_variance(x: Tensor, weight: Tensor, peak: Tensor) -> Tensor:
    """Variance of ``x`` (rows, n) under ``weight`` (rows, n, normalised here), in two passes; ``(rows,)`` float64.

    ``peak`` (rows, 1) is where the weight is largest: x is taken relative to it, so that weights that are almost one-hot lose nothing.
    """
    total = weight.sum(-1, keepdim=True)
    x = x - x.gather(-1, peak)
    centred = x.sub_((weight * x).sum(-1, keepdim=True) / total)
    return ((weight * centred.square_()).sum(-1) / total[:, 0]).double()


def variance(x: Tensor) -> Tensor:
    """Population variance of ``x`` (rows, n) under uniform weights, in two passes; ``(rows,)`` float64."""
    return (x - x.mean(-1, keepdim=True)).square_().mean(-1).double()


# --- divergences of distributions that may be almost equal -------------------------------------------------------------


def excess(p: Tensor, x: Tensor, tilted: Tensor) -> Tensor:
    """``sum p (e^x - 1 - x)`` over the last dimension, given ``tilted = p e^x``; ``(rows,)`` float64.

    Every term is >= 0. Below |x| = 1/2 the power series is summed, above it ``tilted - p - p x`` loses nothing.
    """
    near = x.clamp(-0.5, 0.5)
    series = torch.full_like(x, 1 / factorial(_SERIES[x.dtype]))
    for k in range(_SERIES[x.dtype] - 1, 1, -1):
        series.mul_(near).add_(1 / factorial(k))
    series.mul_(near).mul_(near).mul_(p)
    far = (tilted - p).addcmul_(p, x, value=-1)
    is_near = (0.5 - x.abs()).sign_().clamp_(min=0)  # a float mask: comparisons and `where` are slow on a CPU
    return torch.lerp(far, series, is_near).sum(-1).double().clamp_(min=0)


_SERIES = {torch.float32: 8, torch.float64: 14}  # the last power of x that still matters at |x| = 1/2


def kl_divergence(
    p: Tensor, log_p: Tensor, shift: Tensor, peak: Tensor, log_mass_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(p || q) for ``log q - log p = shift - log_mass_ratio``, all over the last dimension.

    With x = shift - E_p[shift] the identity KL = log E_p[e^x] holds, and E_p[x] = 0 turns it into
    log(1 + E_p[e^x - 1 - x]): a sum of terms that are >= 0. The mean is taken relative to the likeliest token, so that it is
    exact also where p is nearly one-hot. Where KL > 1 the plain ``log_mass_ratio - E_p[shift]`` is just as good and cannot overflow.

    Args:
        p, log_p, shift: ``(rows, V)``; shift is overwritten.
        peak: ``(rows, 1)`` int64, argmax of p.
        log_mass_ratio: ``(rows, 1)`` float64, log of (normaliser of q / normaliser of p), in the units of shift.
    Returns:
        KL in nats ``(rows,)`` float64, and log q - log p ``(rows, V)``.
    """
    anchor = shift.gather(-1, peak)
    x = shift.sub_(anchor)
    mean = (p * x).sum(-1, keepdim=True)
    x = x.sub_(mean)
    plain = (log_mass_ratio - anchor.double() - mean.double())[:, 0]
    near = torch.log1p(excess(p, x, _exp(log_p + x)))
    kl = torch.where(plain > 1, plain, near)
    return kl, x - kl[:, None].to(x.dtype)


def js_divergence(p: Tensor, q: Tensor, log_ratio: Tensor, loss: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats (at most ln 2), ``(rows,)`` float64: the mean KL of p and of q to their middle m.

    ``log_ratio`` is log q - log p and ``loss`` is expm1(-|log_ratio|), both ``(rows, V)``. The likelier side has log(m / .) =
    log1p(loss / 2), the other side |log_ratio| more.
    """
    middle = (p + q).div_(2)
    base = torch.log1p(loss / 2)
    both = excess(p, base + log_ratio.relu(), middle) + excess(q, base + (-log_ratio).relu_(), middle)
    return (both / 2).clamp_(max=log(2))  # rounding must not pass the bound


# --- one place in both models ------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """What one distribution says of itself; found once for a row, however many comparisons it takes part in."""

    peak_logit: Tensor  # (rows, 1) largest logit
    log_mass: Tensor  # (rows, 1) float64, log sum exp((z - peak_logit) / T)
    top: Tensor  # (rows, <= 10) ids of the likeliest tokens, likeliest first
    entropy: Tensor  # (rows,) float64, nats

    def take(self, index: Tensor) -> _Rows:
        return _Rows(*(field[index] for field in self))


def _likeliest(z: Tensor) -> Tensor:
    """Ids of the 10 largest logits of each row, largest first, ties by lower id (`topk` promises nothing about ties)."""
    value, top = z.topk(min(_TOP + 1, z.shape[-1]), dim=-1)
    top = top[:, :_TOP].contiguous()
    tied = (value[:, 1:] == value[:, :-1]).any(-1).nonzero()[:, 0]
    if len(tied):
        top[tied] = z[tied].sort(dim=-1, descending=True, stable=True).indices[:, :_TOP]
    return top


def _describe(z: Tensor, temperature: float) -> _Rows:
    top = _likeliest(z)
    peak = z.gather(-1, top[:, :1])
    lowered = (z - peak).div_(temperature)
    # the mass of all but the likeliest token, whose own is 1: nothing is lost beside it
    mass = _exp(lowered).scatter_(-1, top[:, :1], 0.0)
    rest = mass.sum(-1, keepdim=True).double()
    log_mass = torch.log1p(rest)
    entropy = log_mass[:, 0] - (mass * lowered).sum(-1).double() / (1 + rest[:, 0])
    if not torch.isfinite(entropy).all() or not torch.isfinite(peak).all():
        raise FloatingPointError("a logit is NaN or infinite")
    return _Rows(peak, log_mass, top, entropy)


def _exp(x: Tensor) -> Tensor:
    """e^x, but never a denormal number, which costs a CPU ten times an ordinary one; what is added is far below any rounding."""
    return x.clamp(min=_LOWEST[x.dtype]).exp_()


_LOWEST = {torch.float32: -60.0, torch.float64: -600.0}


def _log_softmax(z: Tensor, rows: _Rows, temperature: float) -> Tensor:
    return (z - rows.peak_logit).div_(temperature).sub_(rows.log_mass.to(z.dtype))


def _pair_columns(
    z: Tensor,
    z_target: Tensor,
    a: _Rows,
    b: _Rows,
    temperature: float,
    next_token: Tensor | None,
    next_token_target: Tensor | None = None,
) -> dict[str, Tensor]:
    """All z and p columns of pairs of rows ``(rows, V)``; a describes the dense rows, b the target rows.

    ``next_token_target`` is the token that follows in the target's own text, where that is not the dense one's.
    """
    t = temperature
    delta = z_target - z
    best, best_target = a.top[:, :1], b.top[:, :1]

    # logits
    change = relative_change(z, z_target, delta)
    centred = relative_change(*(v - v.mean(-1, keepdim=True) for v in (z, z_target, delta)))
    out = {
        "z_cos": change.cos,
        "z_cos_dev": change.cos_dev,
        "z_cos_dev_est": change.cos_dev_est,
        "z_cos_centred": centred.cos,
        "z_alpha": change.alpha,
        "z_para_rel": change.alpha.abs(),
        "z_orth_rel": change.orth,
        "var_uniform": variance(delta),
        "dz_l1": delta.abs().mean(-1),
        "dz_rms": delta.square().mean(-1).sqrt(),
    }
    delta_top = delta.gather(-1, a.top)
    out["dz_top5_l1"] = delta_top[:, :5].abs().mean(-1)
    out["dz_top5_rms"] = delta_top[:, :5].square().mean(-1).sqrt()

    # probabilities
    log_p, log_q = _log_softmax(z, a, t), _log_softmax(z_target, b, t)
    p, q = _exp(log_p), _exp(log_q)
    log_mass_ratio = (b.peak_logit.double() - a.peak_logit.double()) / t + (b.log_mass - a.log_mass)
    out["kl_dense_target"], log_ratio = kl_divergence(p, log_p, delta / t, best, log_mass_ratio)
    out["kl_target_dense"], _ = kl_divergence(q, log_q, -delta / t, best_target, -log_mass_ratio)
    loss = torch.expm1(-log_ratio.abs())
    dp = (log_ratio.sign().mul_(torch.maximum(p, q))).mul_(loss).neg_()  # q - p, right also where they agree to 1e-9
    change = relative_change(p, q, dp)
    out |= {
        "p_cos": change.cos,
        "p_cos_dev": change.cos_dev,
        "js": js_divergence(p, q, log_ratio, loss),
        "tv": (dp.abs().sum(-1) / 2).clamp_(max=1),
        "dp_top1": dp.gather(-1, best)[:, 0],
    }

    # theorems 2 and 3: both divergences are, to second order, variances of the change of the logits
    var_p, var_q = weighted_variance(delta, p, best), weighted_variance(delta, q, best_target)
    var_r, var_r_target = weighted_variance(delta, p.square(), best), weighted_variance(delta, q.square(), best_target)
    top_p = p.gather(-1, a.top)
    first = torch.zeros_like(best)
    out |= {
        "var_p": var_p,
        "var_r": var_r,
        "var_top5": weighted_variance(delta_top[:, :5], top_p[:, :5], first),
        "var_top10": weighted_variance(delta_top, top_p, first),
        "kl_est": var_p / (2 * t * t),
        "kl_est_target": var_q / (2 * t * t),
        "p_cos_dev_est": var_r / (2 * t * t),
        "p_cos_dev_est_target": var_r_target / (2 * t * t),
        "entropy_dense": a.entropy,
        "entropy_target": b.entropy,
    }

    # ranks and tokens
    shared = (a.top[:, :5, None] == b.top[:, None, :5]).sum((1, 2))
    out |= {
        "top1_agree": (best == best_target)[:, 0],
        "top5_overlap": shared.double() / min(5, a.top.shape[1]),
        "rank_in_target": (z_target - z_target.gather(-1, best)).sign_().clamp_(min=0).sum(-1),
    }
    if next_token is not None:
        other = next_token if next_token_target is None else next_token_target
        wanted = [("nll_dense", log_p, next_token), ("nll_target", log_q, other)]
        if next_token_target is not None:
            wanted.append(("nll_target_of_dense", log_q, next_token))
        for name, log_prob, token in wanted:
            nll = -log_prob.gather(-1, token.clamp(min=0)[:, None])[:, 0].double()
            out[name] = torch.where(token >= 0, nll, torch.nan)
    return {name: value.double() for name, value in out.items()}


@torch.no_grad()
def compare_hidden(h: Tensor, h_target: Tensor) -> dict[str, Tensor]:
    """The h columns of ``h`` and ``h_target``, both ``(rows, d)``; each column ``(rows,)`` float64. Theorem 1, section 5, section 6.1."""
    h, h_target = h.double(), h_target.double()
    return _hidden_columns(relative_change(h, h_target, h_target - h))


def _hidden_columns(change: Change) -> dict[str, Tensor]:
    return {
        "h_cos": change.cos,
        "h_cos_dev": change.cos_dev,
        "h_cos_dev_est": change.cos_dev_est,
        "h_alpha": change.alpha,
        "h_para_rel": change.alpha.abs(),
        "h_orth_rel": change.orth,
    }


@torch.no_grad()
def compare_logits(
    z: Tensor, z_target: Tensor, temperature: float = 1.0, next_token: Tensor | None = None
) -> dict[str, Tensor]:
    """The z and p columns of two tensors of logits, both ``(rows, V)``; each column ``(rows,)`` float64.

    Computed in float64 if the logits are float64, else in float32. Holds about 20 temporaries of the size of ``z``; `compare`
    is the form for many rows.

    Args:
        z, z_target: logits before the temperature, as the lens gives them (soft-capping and scales applied).
        temperature: metric temperature T > 0 of p = softmax(z / T).
        next_token: ``(rows,)`` int64, the token that follows, -1 where none does. Without it there are no nll columns.
    Raises:
        ValueError: shapes that differ, or T <= 0.
        FloatingPointError: a NaN or infinite logit.
    """
    if z.shape != z_target.shape or z.dim() != 2:
        raise ValueError(f"logits must be two matrices of one shape, not {tuple(z.shape)} and {tuple(z_target.shape)}")
    _check_temperature(temperature)
    dtype = _working_dtype(z, z_target)
    z, z_target = z.to(dtype), z_target.to(dtype)
    return _pair_columns(
        z, z_target, _describe(z, temperature), _describe(z_target, temperature), temperature, next_token
    )


# --- many places, in bounded memory ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """The map from a residual stream to logits: ``z = cap(scale * (W norm(h) + bias))``.

    ``norm`` is the final norm, in float32 or better, for the `final-norm` lens and None for the `raw` lens; scale and soft-capping belong to
    the architecture and apply in both.
    """

    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def logits(self, h: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Logits ``(rows, V)`` in ``dtype`` of ``h`` (rows, d), a tile of the vocabulary at a time.

        Residual streams hold a few huge entries, and logits are small sums of large terms: a float32 product of SmolLM2's streams is
        off by 1e-3, and a KL of 0.1 by 1e-3 of itself. So the product is taken in float64 wherever that costs at most twice as
        much (`_product_dtype`), and rounded once. A head in half precision on a GPU is multiplied on its tensor cores: the
        products are exact there, and summed in float32.

        Args:
            out: where to write, ``(rows, V)`` of ``dtype``.
        """
        h = self.norm(h.to(dtype)) if self.norm else h
        z = h.new_empty(h.shape[0], self.vocab_size, dtype=dtype) if out is None else out
        if dtype == torch.float32 and _on_tensor_cores(h, self.weight):
            _half_product(h, self.weight, z)
            self._finish(z, self.bias)
            return z
        product = torch.float64 if dtype == torch.float64 else _product_dtype(h.device)
        h = h.to(product)
        tile = _vocab_tile(self)
        for start in range(0, self.vocab_size, tile):
            part = h @ self.weight[start : start + tile].to(product).T
            self._finish(part, None if self.bias is None else self.bias[start : start + tile])
            z[:, start : start + tile] = part
        return z

    def _finish(self, z: Tensor, bias: Tensor | None) -> None:
        """Bias, scale and soft-capping, in place."""
        if bias is not None:
            z += bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)


def uses_tensor_cores(h: Tensor, head: Head) -> bool:
    """Whether `Head.logits` sums the product of ``h`` in float32, on the tensor cores of a GPU."""
    return _on_tensor_cores(h, head.weight)


def _on_tensor_cores(h: Tensor, weight: Tensor) -> bool:
    """Whether W h can be had from exact products of half-precision numbers: h has W's dtype, or can be split into three bfloat16 parts."""
    return weight.is_cuda and (
        weight.dtype == torch.bfloat16 or (weight.dtype == torch.float16 and h.dtype == torch.float16)
    )


def _half_product(h: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = h W^T`` in float32 from half-precision operands; a wider h as the sum of three parts of 8 bits, the smallest first."""
    parts = [h]
    if h.dtype != weight.dtype:
        rest = h.float()
        parts = []
        for _ in range(3):
            parts.insert(0, rest.to(weight.dtype))
            rest = rest - parts[0].float()
    torch.mm(parts[0], weight.T, out_dtype=torch.float32, out=out)
    for part in parts[1:]:
        torch.addmm(out, part, weight.T, out_dtype=torch.float32, out=out)


def _product_dtype(device: torch.device) -> torch.dtype:
    """float64 on a CPU and on GPUs with full-rate float64 (A100, H100 and their kin), float32 elsewhere."""
    full_rate = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))
    )
    return torch.float64 if full_rate else torch.float32


@torch.no_grad()
def compare(
    streams: Tensor,
    pairs: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    next_token: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
) -> dict[str, Tensor]:
    """All columns for many pairs of hidden states, in bounded memory.

    Args:
        streams: ``(n, d)`` hidden states of the dense and of the target model, any float dtype.
        pairs: ``(m, 2)`` int64, rows of ``streams``: the dense one and the target one. A row may stand in any number of
            pairs; within a chunk it is projected once, so keep pairs that share rows together.
        head: from hidden state to logits, for dense and target rows alike.
        temperature: metric temperature T.
        next_token: ``(m,)`` int64, the token that follows each pair, -1 where none does.
        memory: bytes that this function may hold beyond its inputs and its result.
    Returns:
        Column name -> ``(m,)`` float64 on the CPU.
    Raises:
        ValueError: T <= 0, or a ``memory`` too small for a single pair (it says what is needed).
        FloatingPointError: a NaN or infinite logit.
    """
    _check_temperature(temperature)
    dtype = _working_dtype(streams, head.weight)
    backend = fused.backend(streams.device, dtype)
    if backend is not None:
        return _compare_fused(backend, streams, pairs, head, temperature, next_token, memory)
    parts: dict[str, list[Tensor]] = {}
    for chunk in _chunks(pairs, head, dtype, memory):
        columns = _compare_chunk(
            streams, pairs[chunk], head, temperature, None if next_token is None else next_token[chunk], dtype
        )
        for name, value in columns.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(value) for name, value in parts.items()}


@torch.no_grad()
def compare_final(
    h: Tensor,
    h_target: Tensor,
    head: Head,
    target_head: Head,
    index: Tensor | None = None,
    *,
    temperature: float = 1.0,
    next_token: Tensor | None = None,
    next_token_target: Tensor | None = None,
    also: Callable[[slice, Tensor, Tensor], dict[str, Tensor]] = lambda rows, z, z_target: {},
    memory: int = DEFAULT_MEMORY,
) -> dict[str, Tensor]:
    """All columns of the final states of two models, each through its own head, in bounded memory.

    Args:
        h: ``(n, d)``, what enters the head of the dense model, any float dtype.
        h_target: ``(rows, d)``, the same of the target. If the widths differ, the h columns are NaN.
        index: ``(rows,)`` int64, the row of ``h`` that each target row is compared with; left out, its own. A dense row that stands in
            neighbouring rows is projected once.
        head, target_head: of one vocabulary.
        temperature: metric temperature T.
        next_token: ``(rows,)`` int64, the token that follows, -1 where none does. ``next_token_target`` where the target reads a
            text of its own; there is a column ``nll_target_of_dense`` then, what the target gives the dense text's token.
        also: more columns from the logits of some rows, each ``(rows of the slice, ...)``, while these are there.
        memory: bytes that this function may hold beyond its inputs and its result.
    Returns:
        Column name -> ``(rows,)`` float64 on the CPU: the spec's columns, and ``confidence_dense`` and ``confidence_target``, the
        probability of the likeliest token.
    Raises:
        ValueError: T <= 0, a vocabulary that differs, or a ``memory`` too small for one pair.
        FloatingPointError: a NaN or infinite logit.
    """
    _check_temperature(temperature)
    index = torch.arange(len(h_target)) if index is None else index
    if len(index) != len(h_target) or head.vocab_size != target_head.vocab_size:
        raise ValueError("every target row needs a dense row, and both models the same vocabulary")
    dtype = _working_dtype(h, h_target, head.weight, target_head.weight)
    fixed, row = (max(pair) for pair in zip(_bytes(head, dtype), _bytes(target_head, dtype), strict=True))
    if memory < fixed + 2 * row:
        raise ValueError(f"memory={memory} bytes is too little: give at least {fixed + 2 * row}")
    index = index.to(h.device)
    kernels = fused.backend(h.device, dtype)

    def of_chunk(chunk: slice) -> dict[str, Tensor]:
        used, place = torch.unique(index[chunk], return_inverse=True)
        theirs = h_target[chunk].to(h.device)
        if h.shape[1] == theirs.shape[1]:
            columns = compare_hidden(h[index[chunk]], theirs)
        else:
            columns = {name: torch.full((len(theirs),), torch.nan, dtype=torch.float64) for name in H_COLUMNS}
        z = h.new_empty(len(used) + len(theirs), fused.padded(head.vocab_size), dtype=dtype)[:, : head.vocab_size]
        z_used, z_target = z[: len(used)], z[len(used) :]
        head.logits(h[used], dtype, out=z_used)
        target_head.logits(theirs, dtype, out=z_target)

        def following(part: slice) -> list[Tensor | None]:
            rows = slice(chunk.start + part.start, chunk.start + part.stop)
            return [None if token is None else token[rows].to(z.device) for token in (next_token, next_token_target)]

        def more(part: slice) -> dict[str, Tensor]:
            rows = slice(chunk.start + part.start, chunk.start + part.stop)
            return also(rows, z_used[place[part]], z_target[part])

        def of_group(part: slice) -> dict[str, Tensor]:
            a, b = (_describe(side, temperature) for side in (z_used[place[part]], z_target[part]))
            found = _pair_columns(z_used[place[part]], z_target[part], a, b, temperature, *following(part))
            found |= {f"confidence_{side}": torch.exp(-x.log_mass[:, 0]) for side, x in (("dense", a), ("target", b))}
            return found | more(part)

        if kernels is None:
            columns |= _by_groups(len(theirs), max(1, _GROUP // head.vocab_size), of_group)
        else:
            pairs = torch.stack([place, torch.arange(len(theirs), device=z.device) + len(used)], 1)
            tokens = following(slice(0, len(theirs)))
            found = fused.finish(fused.gather(kernels, z, pairs, temperature, *tokens), z.shape[1], temperature, Change)
            absent = [token is None for token in (tokens[0], tokens[0], tokens[1])]
            names = ("nll_dense", "nll_target", "nll_target_of_dense")
            left_out = {name for name, gone in zip(names, absent, strict=True) if gone}
            columns |= _to_host({name: value for name, value in found.items() if name not in left_out})
            columns |= _by_groups(len(theirs), max(1, _DEVICE_GROUP // head.vocab_size), more)
        return {name: value.cpu() for name, value in columns.items()}

    return _by_groups(len(h_target), (memory - fixed) // (2 * row), of_chunk)


def _compare_fused(
    backend: fused.Backend,
    streams: Tensor,
    pairs: Tensor,
    head: Head,
    temperature: float,
    next_token: Tensor | None,
    memory: int,
) -> dict[str, Tensor]:
    """`compare` with the kernels of a backend. The host runs ahead of the device: nothing is read back before the end of a flush."""
    device, pairs = streams.device, pairs.cpu()
    chunks = list(_chunks(pairs, head, torch.float32, memory))
    uniques = [torch.unique(pairs[chunk], return_inverse=True) for chunk in chunks]
    used = torch.cat([rows for rows, _ in uniques]).to(device).split([len(rows) for rows, _ in uniques])
    index = torch.cat([places for _, places in uniques]).to(device)
    following = None if next_token is None else next_token.to(device)
    buffer = torch.empty(max(map(len, used)), fused.padded(head.vocab_size), device=device)[:, : head.vocab_size]
    gathered: list[fused.Gathered] = []
    hidden: list[Tensor] = []
    result: list[dict[str, Tensor]] = []

    def flush() -> None:
        found = fused.finish(fused.merged(gathered), head.vocab_size, temperature, Change)
        found |= _hidden_columns(Change(*torch.cat(hidden).unbind(1)))
        result.append(_to_host({name: found[name] for name in COLUMNS}))
        gathered.clear()
        hidden.clear()

    for chunk, rows in zip(chunks, used, strict=True):
        own = index[chunk]
        h = streams[rows]
        z = head.logits(h, out=buffer[: len(rows)])
        gathered.append(fused.gather(backend, z, own, temperature, None if following is None else following[chunk]))
        hidden.append(backend.hidden_change(h, own))
        if sum(len(part.pairs) for part in gathered) * _GATHERED > memory // 8:
            flush()
    if gathered:
        flush()
    found = {name: torch.cat([part[name] for part in result]) for name in COLUMNS}
    return found if next_token is not None else {name: v for name, v in found.items() if not name.startswith("nll_")}


def _to_host(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """All columns in one copy."""
    stacked = torch.stack(list(columns.values()))
    host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=stacked.is_cuda)
    return dict(zip(columns, host.copy_(stacked).unbind(), strict=True))


def _compare_chunk(
    streams: Tensor, pairs: Tensor, head: Head, temperature: float, next_token: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    pairs = pairs.to(streams.device)
    columns = compare_hidden(streams[pairs[:, 0]], streams[pairs[:, 1]])
    used, index = torch.unique(pairs, return_inverse=True)
    z = head.logits(streams[used], dtype)
    group = max(1, _GROUP // head.vocab_size)
    rows = _Rows(*_by_groups(len(z), group, lambda part: dict(enumerate(_describe(z[part], temperature)))).values())

    def pair_columns(part: slice) -> dict[str, Tensor]:
        dense, target = index[part].unbind(-1)
        following = None if next_token is None else next_token[part].to(z.device)
        return _pair_columns(z[dense], z[target], rows.take(dense), rows.take(target), temperature, following)

    return columns | _by_groups(len(index), group, pair_columns)


_Key = TypeVar("_Key")


def _by_groups(count: int, group: int, work: Callable[[slice], dict[_Key, Tensor]]) -> dict[_Key, Tensor]:
    """Run ``work`` on ``group`` rows at a time, each result copied into its place at once.

    Small results kept alive between large temporaries would keep the allocator from giving memory back.
    """
    result: dict[_Key, Tensor] = {}
    for start in range(0, count, group):
        part = slice(start, min(start + group, count))
        for name, value in work(part).items():
            if start == 0:
                result[name] = value.new_empty((count, *value.shape[1:]))
            result[name][part] = value
    return result


def _chunks(pairs: Tensor, head: Head, dtype: torch.dtype, memory: int) -> Iterator[slice]:
    """Slices of ``pairs`` whose distinct rows, projected, fit into ``memory`` beside the temporaries."""
    fixed, row = _bytes(head, dtype)
    rows = (memory - fixed) // row
    if head.weight.is_cuda and rows > _PRODUCT_ROWS:
        rows -= rows % _PRODUCT_ROWS  # whole tiles of the matrix product
    if rows < 2:
        need = fixed + 2 * row
        raise ValueError(
            f"memory={memory} bytes is too little for a vocabulary of {head.vocab_size}: give at least {need}"
        )
    start, pairs = 0, pairs.cpu()
    while start < len(pairs):
        # the pair that would bring one row too many begins the next chunk
        window = pairs[start : start + rows].flatten().numpy()
        first_seen = np.sort(np.unique(window, return_index=True)[1])
        stop = start + (min(rows, len(pairs) - start) if len(first_seen) <= rows else int(first_seen[rows]) // 2)
        yield slice(start, stop)
        start = stop


def least_memory(head: Head, dtype: torch.dtype = torch.float32) -> int:
    """The smallest ``memory`` in bytes that `compare` can work with."""
    fixed, row = _bytes(head, dtype)
    return fixed + 2 * row


def _bytes(head: Head, dtype: torch.dtype) -> tuple[int, int]:
    """What `compare` holds however few rows there are, and what each distinct row adds."""
    width, vocab = head.weight.shape[1], head.vocab_size
    if fused.backend(head.weight.device, dtype) is not None and _on_tensor_cores(head.weight, head.weight):
        return 2**22, fused.padded(vocab) * 4 + 20 * width + vocab // 16 + _GATHERED  # logits, parts of h, maxima, sums
    tile = _vocab_tile(head)
    group = max(1, _GROUP // vocab)
    fixed = _TEMPORARIES * group * vocab * dtype.itemsize + 8 * tile * width
    return fixed, vocab * dtype.itemsize + 8 * (8 * width + tile)  # logits, float64 copies of h, a float64 tile


def _vocab_tile(head: Head) -> int:
    """Tokens of the vocabulary projected at a time: as many as fit into 16 MB of float64 weights."""
    return min(head.vocab_size, max(256, 2**21 // head.weight.shape[1]))


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the metric temperature must be positive, not {temperature}")
