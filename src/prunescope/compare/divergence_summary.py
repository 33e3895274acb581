"""What the rows of a divergence run say: llama.cpp's table, the same by groups of tokens, and the worst passages. Reads tables only.

Values with an error are pairs ``[value, error]``. An error is one standard error of the mean with tokens taken for independent, and what
follows from it by propagation, as in llama.cpp's table; tokens of one chunk are not quite independent, so the summary has a bootstrap over
chunks beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from math import exp, nan, sqrt
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prunescope.runs.summary import summarise
from prunescope.stats import worst_windows

__all__ = ["divergence_summary", "grouped", "kl_table", "worst_passages"]

Values = NDArray[np.float64]
_SPACES = {"p": ("kl_dense_target", "kl_target_dense", "js", "tv", "dp", "nll_dense", "nll_target")}
KL_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
DP_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)
CONFIDENCE_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99, 1.0)  # of the dense model's most likely token
_POSITION_BINS = 8
_PASSAGE, _BEFORE = 16, 48  # tokens of a passage, and of what is shown before it


def divergence_summary(table: pa.Table, *, seed: int = 0) -> dict[str, Any]:
    """The parts of run.json that say what was found in rows of `divergence_rows`."""
    chunks = table.append_column("prompt", table["chunk"])
    return {
        "tokens": len(table),
        "chunks": len(np.unique(table["chunk"].to_numpy())),
        "table": kl_table(table),
        "by": grouped(table),
        "summary_rows": "tokens, resampled by chunk",
        "summary": summarise(chunks, _SPACES, seed=seed),
    }


# --- llama.cpp's table -------------------------------------------------------------------------------------------------


def kl_table(table: pa.Table) -> dict[str, Any]:
    """Every row of the table that llama.cpp's ``llama-perplexity --kl-divergence`` ends with, and what this adds to it.

    Probabilities are shares, not percent. ``same_sampled`` is the chance that both models sample the same token, each on its own: the mean of
    sum p q; ``same_sampled_dense`` is that of the dense model with itself, which it would be if nothing had changed. ``overlap`` is the mean
    of sum min(p, q) = 1 - tv: the chance where both sample as alike as their distributions allow, and the rate at which speculative decoding
    accepts the one model's tokens for the other's (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5).
    """
    of = {name: table[name].to_numpy() for name in table.column_names if pa.types.is_floating(table[name].type)}
    dense, target, dp = of["nll_dense"], of["nll_target"], of["dp"]
    ln_dense, ln_target = _mean(dense), _mean(target)
    covariance = _covariance(dense, target)
    ratio = ln_target[0] - ln_dense[0]
    # the variance of a difference of correlated means; rounding may put that of equal models below zero
    ratio_error = sqrt(max(0.0, ln_target[1] ** 2 + ln_dense[1] ** 2 - 2 * covariance))
    ppl, ppl_dense = ([exp(mean), exp(mean) * error] for mean, error in (ln_target, ln_dense))
    difference_error = sqrt(max(0.0, ppl[1] ** 2 + ppl_dense[1] ** 2 - 2 * ppl[0] * ppl_dense[0] * covariance))
    spread = ln_target[1] * ln_dense[1]
    square = _mean(dp**2)
    rms = sqrt(square[0])
    return {
        "ppl_target": ppl,
        "ppl_dense": ppl_dense,
        "ln_ppl_correlation": covariance / spread if spread else nan,
        "ln_ppl_ratio": [ratio, ratio_error],
        "ppl_ratio": [exp(ratio), exp(ratio) * ratio_error],
        "ppl_difference": [ppl[0] - ppl_dense[0], difference_error],
        **{name: _distribution(of[name], KL_PERCENTILES) for name in ("kl_dense_target", "kl_target_dense", "js")},
        "dp": _distribution(dp, DP_PERCENTILES),
        "dp_rms": [rms, square[1] / (2 * rms) if rms else 0.0],
        "same_top": _share(table["top1_agree"].to_numpy()),
        **{name: _mean(of[name]) for name in ("same_sampled", "same_sampled_dense")},
        "overlap": _mean(1 - of["tv"]),
    }


def _mean(values: Values) -> list[float]:
    """Mean and its standard error, the population variance over n - 1."""
    return [float(values.mean()), float(np.sqrt(values.var() / max(1, len(values) - 1)))]


def _share(values: Values) -> list[float]:
    share = float(values.mean())
    return [share, sqrt(share * (1 - share) / max(1, len(values) - 1))]


def _covariance(a: Values, b: Values) -> float:
    """Of the two means."""
    return float(((a - a.mean()) * (b - b.mean())).mean() / max(1, len(a) - 1))


def _distribution(values: Values, percentiles: tuple[float, ...]) -> dict[str, Any]:
    found = np.percentile(values, percentiles)  # linear between neighbours, as llama.cpp's
    return {
        "mean": _mean(values),
        "max": float(values.max()),
        **{f"p{percent:g}": float(value) for percent, value in zip(percentiles, found, strict=True)},
        "min": float(values.min()),
    }


# --- groups of tokens --------------------------------------------------------------------------------------------------


def grouped(table: pa.Table) -> dict[str, list[dict[str, Any]]]:
    """The main rows of the table by slice, chunk, position in the chunk, and probability of the dense model's most likely token.

    Bins of positions and probabilities are [from, to), the last one closed; bins without tokens are left out.
    """
    slices, chunks = table["slice"].to_numpy(zero_copy_only=False), table["chunk"].to_numpy()
    position = table["position"].to_numpy()
    first, end = int(position.min()), int(position.max()) + 1
    edges = np.unique(np.linspace(first, end, min(_POSITION_BINS, end - first) + 1).round())
    in_table_order: Callable[[Any], list[Any]] = lambda values: list(dict.fromkeys(values.tolist()))  # noqa: E731
    return {
        "slice": [{"slice": name, **_main(table, slices == name)} for name in in_table_order(slices)],
        "chunk": [
            {"chunk": int(chunk), "slice": str(slices[chunks == chunk][0]), **_main(table, chunks == chunk)}
            for chunk in in_table_order(chunks)
        ],
        "position": _binned(table, position, edges.tolist()),
        "confidence": _binned(table, table["confidence_dense"].to_numpy(), CONFIDENCE_EDGES),
    }


def _binned(table: pa.Table, values: Values, edges: Any) -> list[dict[str, Any]]:
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return [
        {"from": float(low), "to": float(high), **_main(table, bins == number)}
        for number, (low, high) in enumerate(pairwise(edges))
        if (bins == number).any()
    ]


def _main(table: pa.Table, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    of = {
        name: table[name].to_numpy()[chosen]
        for name in ("kl_dense_target", "kl_target_dense", "js", "dp", "top1_agree", "same_sampled", "nll_dense", "nll_target")
    }  # fmt: skip
    return {
        "tokens": int(chosen.sum()),
        "share": float(chosen.mean()),
        **{name: _mean(of[name]) for name in ("kl_dense_target", "kl_target_dense", "js", "same_sampled")},
        "kl_median": float(np.median(of["kl_dense_target"])),
        "dp_rms": float(np.sqrt((of["dp"] ** 2).mean())),
        "same_top": _share(of["top1_agree"]),
        "ppl_dense": exp(of["nll_dense"].mean()),
        "ppl_target": exp(of["nll_target"].mean()),
    }


# --- worst passages ----------------------------------------------------------------------------------------------------


def worst_passages(
    table: pa.Table, chunks: Mapping[int, list[int]], decode: Callable[[list[int]], str], count: int = 10
) -> list[dict[str, Any]]:
    """The passages of 16 tokens whose mean KL is largest, none overlapping another, the worst first.

    Args:
        table: rows of `divergence_rows`.
        chunks: the tokens of every chunk, by its number.
        decode: token ids -> text.
    Returns:
        Of each its place, its mean KL, the text before it, and per token its text, KL, dp and both models' five most likely tokens.
    """
    number, kl = table["chunk"].to_numpy(), table["kl_dense_target"].to_numpy()
    length = min(_PASSAGE, int((number == number[0]).sum()))
    starts = worst_windows(kl, number, length, count)
    return [_passage(table.slice(start, length).to_pylist(), chunks, decode) for start in starts]


def _passage(rows: list[dict[str, Any]], chunks: Mapping[int, list[int]], decode: Any) -> dict[str, Any]:
    chunk, start = rows[0]["chunk"], rows[0]["position"] + 1
    return {
        "slice": rows[0]["slice"],
        "chunk": chunk,
        "position": start,
        "kl_dense_target": float(np.mean([row["kl_dense_target"] for row in rows])),
        "before": decode(chunks[chunk][max(0, start - _BEFORE) : start]),
        "text": decode([row["token"] for row in rows]),
        "tokens": [dict(_token(row, decode)) for row in rows],
    }


def _token(row: dict[str, Any], decode: Any) -> Iterator[tuple[str, Any]]:
    yield from {"token": row["token"], "text": decode([row["token"]])}.items()
    yield from ((name, row[name]) for name in ("kl_dense_target", "dp"))
    for side in ("dense", "target"):
        pairs = zip(row[f"top_{side}"], row[f"top_{side}_p"], strict=True)
        yield f"top_{side}", [{"token": token, "text": decode([token]), "p": p} for token, p in pairs]
