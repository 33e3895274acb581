"""All z and p columns from sums that one sweep over the logits can gather: what the fast kernels share.

`metrics.py` takes about fifty elementwise passes over the logits of a pair. A GPU, and a CPU too, spends that time moving bytes. Here the
same columns are put together, in float64, from two short lists of sums, and a kernel has to read each logit once per list:

* of every row: `ROW_SUMS` and its ten most likely tokens;
* of every pair of rows: `PAIR_SUMS`.

One sweep is enough, and loses nothing, because every quantity that would need a sweep of its own (the means that variances are taken
about, the factor along the dense vector, the log of the ratio of normalisers) is guessed first: `pilots`, from the row sums, the ten
most likely tokens and a sample of the vocabulary. The sums are taken about the guess, and the guess is corrected exactly
afterwards. A guess that is off costs digits only where it is off by many standard deviations.

The correction of the normalisers. With L~ = log(q/p) + e, where e is the rounding error of the guessed ratio, the identities
sum p expm1(L~) = expm1(e) and sum p (exp(L~) - 1 - L~) = KL(p||q) + expm1(e) - e hold, so that e is measured by the same sweep, and a KL of
1e-13 is still right.

A backend is a module with the functions of `Backend`, which accumulate in float32 over at most `SEGMENT` tokens at a time: `triton_sums` for
GPUs, `numba_sums` for CPUs. Symbols as in `metrics.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from math import log
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "PAIR_SUMS",
    "PILOTS",
    "ROW_SUMS",
    "SEGMENT",
    "TOP",
    "Backend",
    "Gathered",
    "Prepared",
    "RowStats",
    "backend",
    "check_finite",
    "columns_of",
    "finish",
    "gather",
    "merged",
    "padded",
    "pilots",
    "prepare",
    "row_stats",
    "segments",
]

SEGMENT = 16_384  # tokens that one float32 accumulation covers; sums of segments are added in float64
TOP = 10  # most likely tokens kept of every row
_RUNS, _RUN = 16, 128  # runs of tokens that the factor along the dense vector is guessed from

ROW_SUMS = (
    "peak",  # m = max z of the segment
    "rest",  # sum exp((z - m) / T) over all tokens but one at the maximum, whose own is 1: nothing is lost beside it
    "lowered",  # sum exp((z - m) / T) (z - m) / T
    "shift",  # any value near the mean of the segment
    "off",  # sum (z - shift)
    "off2",  # sum (z - shift)^2
)
PAIR_SUMS = (
    # with d = z' - z, and r = (z' if far else d) - z_coef z
    *("rz2", "rzz"),  # sum r^2, sum r z
    *("dz1", "dc", "dc2"),  # sum |d|; c = d - mean_d: sum c, sum c^2
    "zc",  # sum (z - mean) (z' - mean' if far else c)
    # v = d - anchor, a sum and a sum of squares under p, q, p^2, q^2
    *("p_v", "p_v2", "q_v", "q_v2", "r_v", "r_v2", "t_v", "t_v2"),
    *("p2", "q2"),  # sum p^2, sum q^2
    # L = (d - anchor_p) / T - offset; near where |L| < 1/2
    "m",  # sum dp, dp = p expm1(L) where near, else q - p
    "g",  # sum p (e^L - 1 - L) where near, else dp - p L
    "g_rev",  # sum q (e^-L - 1 + L) where near, with q = p + dp; else q L - dp
    "js",  # sum of the terms of the Jensen-Shannon divergence
    "dp1",  # sum |dp|
    "sq",  # sum sign(dp) (p + dp) where near
    *("rp2", "rpp"),  # r = (q if far else dp) - p_coef p: sum r^2, sum r p
    "rank",  # how many z' are larger than z' at the dense argmax
)
PILOTS = (
    *("z_coef", "z_far", "mean", "mean_target", "mean_d"),
    *("peak", "log_mass", "peak_target", "log_mass_target"),  # log p = (z - peak) / T - log_mass
    *("anchor_p", "anchor_q", "anchor_r", "anchor_t", "offset"),
    *("p_coef", "p_far", "best_in_target"),  # z' at the dense argmax
)


class RowStats(NamedTuple):
    """What one row of logits says of itself, ``(rows,)`` float64 where not said otherwise."""

    peak: Tensor  # largest logit
    log_mass: Tensor  # log sum exp((z - peak) / T)
    entropy: Tensor  # nats
    mean: Tensor
    square: Tensor  # sum z^2
    spread: Tensor  # sum (z - mean)^2
    top: Tensor  # (rows, <= TOP) int64
    top_z: Tensor  # (rows, <= TOP)
    finite: Tensor  # (rows,) bool: no NaN, no infinite logit

    def take(self, index: Tensor) -> RowStats:
        return RowStats(*(field[index] for field in self))


class Prepared(NamedTuple):
    """What is known before the pairs are swept."""

    rows: RowStats
    guess: Tensor  # (pairs, len(PILOTS)) float32
    top_z: Tensor  # (pairs, <= TOP) float64, z' at the dense row's most likely tokens
    next_z: Tensor  # (pairs, 3) float64: z at the token that follows, z' at the one that follows there, z' at the former; NaN where none does
    coarse: Tensor | None = None  # a backend's own guesses


class Backend(Protocol):
    """Gathers the sums. Logits are ``(rows, V)`` float32 with unit stride along V."""

    def row_sums(self, z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """``(rows, segments, len(ROW_SUMS))``, float32 or float64, and ``(rows, TOP)`` int64 ids of the most likely tokens, most likely first, ties by
        lower id; where V < TOP, only the first V count."""

    def prepare(
        self,
        z: Tensor,
        pairs: Tensor,
        sums: Tensor,
        top: Tensor,
        temperature: float,
        next_token: Tensor | None,
        next_token_target: Tensor | None,
    ) -> Prepared:
        """`prepare`, or kernels that do the same."""

    def sweep(self, z: Tensor, pairs: Tensor, known: Prepared, temperature: float) -> Tensor:
        """``(pairs, len(PAIR_SUMS))`` float64 for ``pairs`` (m, 2) rows of z."""

    def hidden_change(self, h: Tensor, pairs: Tensor) -> Tensor:
        """``(pairs, 3)`` float64: alpha, along and orth of `metrics.relative_change` for pairs of rows of h ``(rows, d)``."""


def backend(device: torch.device, dtype: torch.dtype) -> Backend | None:
    """The kernels for logits of ``dtype`` on ``device``; None where there are none, and `metrics` computes in plain tensor operations."""
    module = {"cuda": "triton_sums", "cpu": "numba_sums"}.get(device.type)
    if dtype != torch.float32 or module is None:
        return None
    try:
        return importlib.import_module(f"prunescope.compare.kernels.{module}")
    except ImportError:  # not installed, or not for this machine's numpy or torch
        return None


def padded(vocab: int) -> int:
    """The stride of a matrix of logits whose rows shall be aligned to 16 bytes."""
    return -(-vocab // 4) * 4


def segments(vocab: int) -> int:
    """How many float32 accumulations cover a vocabulary."""
    return -(-vocab // SEGMENT)


def row_stats(z: Tensor, sums: Tensor, top: Tensor, temperature: float) -> RowStats:
    """Put the sums of the segments of each row together, in float64."""
    vocab = z.shape[1]
    peak_k, rest_k, lowered_k, shift, off, off2 = sums.double().unbind(-1)
    start = torch.arange(segments(vocab), device=z.device) * SEGMENT
    count = (vocab - start).clamp(max=SEGMENT).double()
    top_z = z.gather(1, top).double()
    peak = top_z[:, 0]
    below = (peak_k - peak[:, None]) / temperature
    weight = below.exp()
    rest_mass = (rest_k * weight).sum(1) + (weight.sum(1) - 1)
    log_mass = torch.log1p(rest_mass)
    lowered = ((lowered_k + (1 + rest_k) * below) * weight).sum(1)
    mean = (off + count * shift).sum(1) / vocab
    rest = mean[:, None] - shift
    return RowStats(
        peak=peak,
        log_mass=log_mass,
        entropy=(log_mass - lowered / (1 + rest_mass)).clamp(min=0),
        mean=mean,
        square=(off2 + 2 * shift * off + count * shift * shift).sum(1),
        spread=(off2 - 2 * rest * off + count * rest * rest).sum(1).clamp(min=0),
        top=top,
        top_z=top_z,
        finite=torch.isfinite(off2).all(1) & torch.isfinite(rest_mass),
    )


class _Likeliest(NamedTuple):
    """The change at the most likely tokens of one side, ``(pairs, <= TOP)`` float64."""

    delta: Tensor
    p: Tensor


def _likeliest(z: Tensor, mine: RowStats, other: Tensor, sign: float, temperature: float) -> _Likeliest:
    delta = sign * (z[other[:, None], mine.top].double() - mine.top_z)
    return _Likeliest(delta, ((mine.top_z - mine.peak[:, None]) / temperature - mine.log_mass[:, None]).exp())


def pilots(z: Tensor, pairs: Tensor, rows: RowStats, temperature: float) -> Tensor:
    """The guesses that a sweep starts from, ``(pairs, len(PILOTS))`` float32; any of them may be off, none may be NaN.

    Args:
        z: ``(rows, V)`` float32.
        pairs: ``(m, 2)`` int64, rows of z: dense, target.
        rows: of the rows of z.
    """
    i, j = pairs.unbind(1)
    a, b = rows.take(i), rows.take(j)
    ours, theirs = _likeliest(z, a, j, 1.0, temperature), _likeliest(z, b, i, -1.0, temperature)
    mean_d = b.mean - a.mean
    anchors = [(x.p * x.delta).sum(1) + (1 - x.p.sum(1)) * mean_d for x in (ours, theirs)]
    anchors += [(x.p**2 * x.delta).sum(1) / (x.p**2).sum(1) for x in (ours, theirs)]
    anchor_p = anchors[0].float()
    log_ratio = (b.peak - a.peak) / temperature + (b.log_mass - a.log_mass)
    p_alpha = (ours.p**2 * torch.expm1((ours.delta / temperature - log_ratio[:, None]).clamp(max=80))).sum(1) / (
        ours.p**2
    ).sum(1)
    sample = _sampled(z)
    x, y = sample[i], sample[j]
    z_alpha = ((x * (y - x)).sum(1) / (x * x).sum(1)).nan_to_num(0, 0, 0).double()
    z_far, p_far = ((alpha.abs() > 0.5).double() for alpha in (z_alpha, p_alpha))
    values = (
        *(z_alpha + z_far, z_far, a.mean, b.mean, mean_d),
        *(a.peak, a.log_mass, b.peak, b.log_mass),
        *(*anchors, log_ratio - anchor_p.double() / temperature),
        *(p_alpha + p_far, p_far, z[j, a.top[:, 0]].double()),
    )
    return torch.stack(values, 1).float()


def _sampled(z: Tensor) -> Tensor:
    """The logits of some tokens from all over the vocabulary, ``(rows, tokens)``, in runs that a memory bus likes; of a small vocabulary the last one
    more than once."""
    vocab = z.shape[1]
    if vocab // _RUNS >= _RUN:
        return torch.cat(
            [z[:, start : start + _RUN] for start in range(0, _RUNS * (vocab // _RUNS), vocab // _RUNS)], 1
        )
    runs = torch.arange(_RUNS, device=z.device)[:, None] * (vocab // _RUNS) + torch.arange(_RUN, device=z.device)
    return z[:, runs.flatten().clamp(max=vocab - 1)]


def _variance(first: Tensor, second: Tensor, total: Tensor | float) -> Tensor:
    return (second / total - (first / total) ** 2).clamp(min=0)


class Gathered(NamedTuple):
    """All that the columns of some pairs follow from; the logits are no longer needed."""

    rows: RowStats
    pairs: Tensor  # (m, 2) int64, into rows: dense, target
    guess: Tensor  # (m, len(PILOTS)) float32
    sums: Tensor  # (m, len(PAIR_SUMS)) float64
    top_z: Tensor  # as in `Prepared`
    next_z: Tensor


def gather(
    backend: Backend,
    z: Tensor,
    pairs: Tensor,
    temperature: float,
    next_token: Tensor | None = None,
    next_token_target: Tensor | None = None,
) -> Gathered:
    """Sweep over the logits.

    Args:
        z: ``(rows, V)`` float32, unit stride along V.
        pairs: ``(m, 2)`` int64 on the device of z, rows of z: dense, target.
        next_token, next_token_target: ``(m,)`` int64 on the device of z, as in `metrics.compare_final`.
    """
    sums, top = backend.row_sums(z, temperature)
    known = backend.prepare(z, pairs, sums, top, temperature, next_token, next_token_target)
    swept = backend.sweep(z, pairs, known, temperature)
    return Gathered(known.rows, pairs, known.guess, swept, known.top_z, known.next_z)


def prepare(
    z: Tensor,
    pairs: Tensor,
    sums: Tensor,
    top: Tensor,
    temperature: float,
    next_token: Tensor | None,
    next_token_target: Tensor | None,
) -> Prepared:
    """From the sums of the rows to the guesses for the pairs, in plain tensor operations."""
    rows = row_stats(z, sums, top[:, : min(TOP, z.shape[1])], temperature)
    i, j = pairs.unbind(1)
    next_z = z.new_full((len(pairs), 3), torch.nan, dtype=torch.float64)
    if next_token is not None:
        other = next_token if next_token_target is None else next_token_target
        for column, (row, token) in enumerate(((i, next_token), (j, other), (j, next_token))):
            next_z[:, column] = torch.where(token >= 0, z[row, token.clamp(min=0)].double(), torch.nan)
    return Prepared(rows, pilots(z, pairs, rows, temperature), z[j[:, None], rows.top[i]].double(), next_z)


def merged(parts: list[Gathered]) -> Gathered:
    """One after the other."""
    starts = torch.tensor([len(part.rows.peak) for part in parts]).cumsum(0).tolist()
    pairs = [part.pairs + start - len(part.rows.peak) for part, start in zip(parts, starts, strict=True)]
    rows = RowStats(*(torch.cat(field) for field in zip(*(part.rows for part in parts), strict=True)))
    others = [torch.cat([getattr(part, name) for part in parts]) for name in ("guess", "sums", "top_z", "next_z")]
    return Gathered(rows, torch.cat(pairs), *others)


def finish(
    found: Gathered,
    vocab: int,
    temperature: float,
    change: Callable[[Tensor, Tensor, Tensor], object],
) -> dict[str, Tensor]:
    """All z and p columns of each pair, and ``confidence_dense`` and ``confidence_target``, ``(pairs,)`` float64 each.

    Args:
        found: from `gather`.
        vocab: V.
        temperature: T, the same as for `gather`.
        change: ``(alpha, along, orth)`` -> the geometry of a change (`metrics.Change`).
    Raises:
        FloatingPointError: a NaN or infinite logit.
    """
    check_finite(found.rows.finite)
    return columns_of(found, vocab, temperature, change)


def check_finite(finite: Tensor) -> None:
    """Raise FloatingPointError where not all are."""
    if not bool(finite.all()):
        raise FloatingPointError("a logit is NaN or infinite")


def columns_of(
    found: Gathered, vocab: int, temperature: float, change: Callable[[Tensor, Tensor, Tensor], object]
) -> dict[str, Tensor]:
    """`finish` without its check, so that nothing waits for the device."""
    t = temperature
    i, j = found.pairs.unbind(1)
    a, b = found.rows.take(i), found.rows.take(j)
    s = dict(zip(PAIR_SUMS, found.sums.unbind(1), strict=True))
    g = dict(zip(PILOTS, found.guess.double().unbind(1), strict=True))

    def geometry(coef: Tensor, far: Tensor, rest2: Tensor, rest_x: Tensor, x2: Tensor) -> object:
        along_or_alpha = coef + rest_x / x2
        orth = ((rest2 - rest_x**2 / x2).clamp(min=0) / x2).sqrt()
        is_far = far > 0
        return change(
            torch.where(is_far, along_or_alpha - 1, along_or_alpha),
            torch.where(is_far, along_or_alpha, along_or_alpha + 1),
            orth,
        )

    # logits
    of_z = geometry(g["z_coef"], g["z_far"], s["rz2"], s["rzz"], a.square)
    centred_d2 = s["dc2"] - s["dc"] ** 2 / vocab
    near_covariance, near_spread = a.spread + s["zc"], a.spread + 2 * s["zc"] + centred_d2
    far = g["z_far"] > 0
    covariance, spread = torch.where(far, s["zc"], near_covariance), torch.where(far, b.spread, near_spread)
    delta_top = found.top_z - a.top_z
    out = {
        **_geometry_columns("z", of_z),
        "z_cos_centred": (covariance / (a.spread * spread).sqrt()).clamp(-1, 1),
        "var_uniform": (centred_d2 / vocab).clamp(min=0),
        "dz_l1": s["dz1"] / vocab,
        "dz_rms": ((s["dc2"] + 2 * g["mean_d"] * s["dc"]) / vocab + g["mean_d"] ** 2).clamp(min=0).sqrt(),
        "dz_top5_l1": delta_top[:, :5].abs().mean(1),
        "dz_top5_rms": delta_top[:, :5].square().mean(1).sqrt(),
    }

    # probabilities: what the guessed ratio of normalisers was off by, and everything without it
    off = torch.log1p(s["m"])
    log_ratio_top = delta_top / t - (g["anchor_p"] / t + g["offset"] + off)[:, None]
    top_p = ((a.top_z - a.peak[:, None]) / t - a.log_mass[:, None]).exp()
    of_p = geometry(g["p_coef"], g["p_far"], s["rp2"], s["rpp"], s["p2"])
    var_p, var_q = _variance(s["p_v"], s["p_v2"], 1.0), _variance(s["q_v"], s["q_v2"], 1.0)
    var_r, var_t = _variance(s["r_v"], s["r_v2"], s["p2"]), _variance(s["t_v"], s["t_v2"], s["q2"])
    p_columns = _geometry_columns("p", of_p)
    out |= {
        "p_cos": p_columns["p_cos"],
        "p_cos_dev": p_columns["p_cos_dev"],
        "kl_dense_target": (s["g"] - (s["m"] - off)).clamp(min=0),
        "kl_target_dense": (s["g_rev"] - (off * (1 + s["m"]) - s["m"])).clamp(min=0),
        "js": s["js"].clamp(0, log(2)),
        "tv": ((s["dp1"] - off * s["sq"]) / 2).clamp(0, 1),
        "dp_top1": top_p[:, 0] * torch.expm1(log_ratio_top[:, 0]),
        "var_p": var_p,
        "var_r": var_r,
        "var_top5": _small_variance(delta_top[:, :5], top_p[:, :5]),
        "var_top10": _small_variance(delta_top, top_p),
        "kl_est": var_p / (2 * t * t),
        "kl_est_target": var_q / (2 * t * t),
        "p_cos_dev_est": var_r / (2 * t * t),
        "p_cos_dev_est_target": var_t / (2 * t * t),
        "entropy_dense": a.entropy,
        "entropy_target": b.entropy,
    }

    # ranks and tokens
    shared = (a.top[:, :5, None] == b.top[:, None, :5]).sum((1, 2))
    out |= {
        "top1_agree": (a.top[:, 0] == b.top[:, 0]).double(),
        "top5_overlap": shared.double() / min(5, a.top.shape[1]),
        "rank_in_target": s["rank"],
    }
    of_next = (("nll_dense", a), ("nll_target", b), ("nll_target_of_dense", b))
    for column, (name, side) in enumerate(of_next):
        out[name] = side.log_mass - (found.next_z[:, column] - side.peak) / t
    out |= {"confidence_dense": torch.exp(-a.log_mass), "confidence_target": torch.exp(-b.log_mass)}
    return out


def _geometry_columns(space: str, change: object) -> dict[str, Tensor]:
    names = {
        "cos": "cos",
        "cos_dev": "cos_dev",
        "cos_dev_est": "cos_dev_est",
        "alpha": "alpha",
        "orth_rel": "orth",
    }
    found = {f"{space}_{name}": getattr(change, attribute) for name, attribute in names.items()}
    return found | {f"{space}_para_rel": found[f"{space}_alpha"].abs()}


def _small_variance(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight / weight.sum(1, keepdim=True)
    centred = x - (weight * x).sum(1, keepdim=True)
    return (weight * centred.square()).sum(1)
