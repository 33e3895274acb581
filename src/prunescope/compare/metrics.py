"""Every number that prunescope reports about a dense and a target model, as pure functions of tensors.

A model computes ``h`` (hidden state) -> ``z = W h`` (logits) -> ``p = softmax(z / T)``. Given the same place in a dense
and in a target model, this file says how far apart they are in each of the three spaces. Symbols and theorem numbers are
those of "Demystifying When Pruning Works via Representation Hierarchies" (arXiv 2603.24652).

Two ideas carry the file:

* The dense side is the base, and the change is what we compute with: ``delta = target - dense``. A cosine close to 1 is
  never found by subtracting two nearly equal numbers; `relative_change` splits delta into a part along the dense
  vector (alpha) and a part across it (orth), and every cosine follows from these two.
* Probabilities stay in log space, and only *differences* of log-probabilities enter. A KL divergence is a sum of terms
  ``p (e^x - 1 - x) >= 0``, so nothing cancels, however small the divergence is (`excess`).
The forms written here are the reference: plain tensor operations, about fifty sweeps over the logits of a pair. `columns.py` applies them to many
places in bounded memory, and where a kernel is at hand takes the same columns from sums that one sweep gathers, within the same bounds.

Precision. Rows are handled in float32, or in float64 if the inputs are float64; hidden states always in float64. The
relative error against float64 brute force on the same logits, for deviations of 1e-6 up to total disagreement, is below
``ERROR_BOUND[column]`` plus the absolute error there; tests hold every column to it. bf16 and fp16 inputs are upcast
first, so the bounds are those of float32.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from prunescope.models.divergence import excess, kl_divergence, lowered_exp

__all__ = [
    "COLUMNS",
    "ERROR_BOUND",
    "FLOOR_COLUMNS",
    "H_COLUMNS",
    "P_COLUMNS",
    "SPACES",
    "Z_COLUMNS",
    "Change",
    "RowFacts",
    "check_temperature",
    "compare_hidden",
    "compare_logits",
    "describe_rows",
    "hidden_columns",
    "pair_columns",
    "relative_change",
    "space_of",
    "working_dtype",
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
SPACES = {"h": H_COLUMNS, "z": Z_COLUMNS, "p": P_COLUMNS}
FLOOR_COLUMNS = tuple(  # columns that are zero where nothing differs
    name
    for name in COLUMNS
    if not name.endswith("_cos") and not name.startswith(("nll_", "entropy_", "top", "rank_", "z_cos_centred"))
)

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

_TOP = 10  # most likely tokens kept of every row


def space_of(column: str) -> str:
    """The representation space, ``h``, ``z`` or ``p``, that a column belongs to. Raises KeyError for other names."""
    for space, names in SPACES.items():
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


class RowFacts(NamedTuple):
    """What one distribution says of itself; found once for a row, however many comparisons it takes part in."""

    peak_logit: Tensor  # (rows, 1) largest logit
    log_mass: Tensor  # (rows, 1) float64, log sum exp((z - peak_logit) / T)
    top: Tensor  # (rows, <= 10) ids of the most likely tokens, most likely first
    entropy: Tensor  # (rows,) float64, nats

    def take(self, index: Tensor) -> RowFacts:
        return RowFacts(*(field[index] for field in self))


def most_likely(z: Tensor) -> Tensor:
    """Ids of the 10 largest logits of each row, largest first, ties by lower id (`topk` promises nothing about ties)."""
    value, top = z.topk(min(_TOP + 1, z.shape[-1]), dim=-1)
    top = top[:, :_TOP].contiguous()
    tied = (value[:, 1:] == value[:, :-1]).any(-1).nonzero()[:, 0]
    if len(tied):
        top[tied] = z[tied].sort(dim=-1, descending=True, stable=True).indices[:, :_TOP]
    return top


def describe_rows(z: Tensor, temperature: float) -> RowFacts:
    top = most_likely(z)
    peak = z.gather(-1, top[:, :1])
    lowered = (z - peak).div_(temperature)
    # the mass of all but the most likely token, whose own is 1: nothing is lost beside it
    mass = lowered_exp(lowered).scatter_(-1, top[:, :1], 0.0)
    rest = mass.sum(-1, keepdim=True).double()
    log_mass = torch.log1p(rest)
    entropy = log_mass[:, 0] - (mass * lowered).sum(-1).double() / (1 + rest[:, 0])
    if not torch.isfinite(entropy).all() or not torch.isfinite(peak).all():
        raise FloatingPointError("a logit is NaN or infinite")
    return RowFacts(peak, log_mass, top, entropy)


def _log_softmax(z: Tensor, rows: RowFacts, temperature: float) -> Tensor:
    return (z - rows.peak_logit).div_(temperature).sub_(rows.log_mass.to(z.dtype))


def pair_columns(
    z: Tensor,
    z_target: Tensor,
    a: RowFacts,
    b: RowFacts,
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
    p, q = lowered_exp(log_p), lowered_exp(log_q)
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
    return hidden_columns(relative_change(h, h_target, h_target - h))


def hidden_columns(change: Change) -> dict[str, Tensor]:
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
    check_temperature(temperature)
    dtype = working_dtype(z, z_target)
    z, z_target = z.to(dtype), z_target.to(dtype)
    return pair_columns(
        z, z_target, describe_rows(z, temperature), describe_rows(z_target, temperature), temperature, next_token
    )


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that columns are computed in: float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the metric temperature must be positive, not {temperature}")
