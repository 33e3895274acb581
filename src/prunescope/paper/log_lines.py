"""The lines that the paper's code logs, from the rows of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    Column = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["against_target", "generation_lines", "option_lines", "transition_lines"]

_RATIOS = ("para_perp(mean):   ", "para_perp(median): ", "ratio_of_means:    ")


def against_target(alpha: Column, orth: Column) -> tuple[Column, Column]:
    """alpha and the orthogonal part of the way back, dense - target, relative to the target's vector; ``(rows,)`` each.

    With X dense, Y target, and everything relative to the dense vector: a = <Y, X>/|X|^2 = 1 + alpha, o = |Y across X|/|X| and |Y|^2/|X|^2
    = a^2 + o^2. So <X - Y, Y>/|Y|^2 = -(a alpha + o^2) / (a^2 + o^2), and |X across Y|/|Y| = o / (a^2 + o^2). NaN where Y is zero.
    """
    import numpy as np

    a, o2 = 1 + alpha, orth * orth
    length2 = a * a + o2
    with np.errstate(divide="ignore", invalid="ignore"):
        return -(a * alpha + o2) / length2, orth / length2


def transition_lines(rows: pa.Table, dropped: bool) -> Iterator[str]:
    """The lines of sublayers at steps, in the order of ``rows``. In dropped mode the paper's code takes the dropped side as the base.

    The mean, the median and the ratio of means of the parallel over the orthogonal part are one number, for a row is one place.
    """
    import numpy as np

    def column(name: str) -> Column:
        return rows[name].to_numpy()  # type: ignore[no-any-return]

    side = "" if dropped else "_target"
    columns = [
        ("emb sim:         ", 4, column("h_cos")),
        ("head sim:        ", 4, column("z_cos")),
        ("vocab sim:       ", 4, column("p_cos")),
        ("REAL_KL:         ", 6, column("kl_dense_target" if dropped else "kl_target_dense")),
        ("KL_estimate:     ", 6, column(f"kl_est{side}")),
        ("REAL(1-cos):     ", 6, column("p_cos_dev")),
        ("1-cos_estimate:  ", 6, column(f"p_cos_dev_est{side}")),
        ("Uniform_Var:     ", 6, column("var_uniform")),
    ]
    for space in "zh":
        alpha, orth = column(f"{space}_alpha"), column(f"{space}_orth_rel")
        alpha, orth = against_target(alpha, orth) if dropped else (alpha, orth)
        para = np.abs(alpha)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = para / orth
        capital = space.upper()
        columns += [
            (f"{capital}_real(1-cos):   ", 6, column(f"{space}_cos_dev")),
            (f"{capital}_para_rel:      ", 6, para),
            (f"{capital}_orth_rel:      ", 6, orth),
            *((f"{capital}_{name}", 6, ratio) for name in _RATIOS),
            (f"alpha_{space}_mean:    ", 6, alpha),
        ]
    formats = [f"{name}{{:.{decimals}f}}".format for name, decimals, _ in columns]
    values = zip(*(values.tolist() for _, _, values in columns), strict=True)
    places = zip(*(rows[name].to_pylist() for name in ("layer", "sublayer", "step")), strict=True)
    for (layer, kind, step), row in zip(places, values, strict=True):
        label = f"{layer} {'dropped_' if dropped else ''}{kind}_step{step} "
        yield from (label + line(value) for line, value in zip(formats, row, strict=True))
        yield from ("", "")


def generation_lines(table: pa.Table, prompt: int, name: str, temperature: float) -> list[str]:
    """The lists of one prompt over its free-running steps, scaled as the paper's code scales them."""
    import pyarrow.compute as pc

    rows = table.filter(pc.and_(pc.equal(table["prompt"], prompt), pc.equal(table["regime"], "free-running")))

    def column(key: str) -> Column:
        return rows[key].to_numpy()  # type: ignore[no-any-return]

    half = 2 * temperature * temperature
    logits = {
        "global_l1": column("dz_l1"),
        "global_l2": column("dz_rms"),
        "top5_l1": 5 * column("dz_top5_l1"),  # a sum over the five tokens there, a mean here
        "top5_l2": column("dz_top5_rms"),
    }
    estimates = {
        "kl_estimates": column("kl_est"),
        "cos_estimates": column("p_cos_dev_est"),
        "uniform_var": column("var_uniform") / half,
        "top5_var": column("var_top5") / half,
        "top10_var": column("var_top10") / half,
    }
    return [
        f"=== Cosine Similarity (dense vs {name}) ===",
        *(
            f"{key}_cos_sim_flat: {column(f'{space}_cos').tolist()}"
            for key, space in (("emb", "h"), ("logits", "z"), ("prob", "p"))
        ),
        f"=== KL Divergence (dense vs {name}) ===",
        f"kl_divergence_flat: {column('kl_dense_target').tolist()}",
        f"analysis_temperature: {temperature}",
        *(f"{key}: {values.tolist()}" for key, values in estimates.items()),
        # over the vocabulary there is a list of one prompt a step
        *(
            f"{key}: {(values[:, None] if key.startswith('global') else values).tolist()}"
            for key, values in logits.items()
        ),
        *(f"summary_{key}_mean: {values.mean():.6f}" for key, values in logits.items()),
    ]


def option_lines(
    sample: dict[str, Any], whole: dict[str, Any], options: dict[str, Any], temperature: float
) -> list[str]:
    """The blocks of one question, all at the metric temperature. KL is a sum over tokens: the paper's code divides it by their number."""
    letters = "/".join(text.strip() for text in sample["option_strings"])
    tops = [(repr(token["text"]), token["p_dense"], token["p_target"]) for token in sample["top_dense"]]
    both = zip(
        sample["option_strings"],
        _log_probabilities(sample, whole, "dense", temperature),
        _log_probabilities(sample, whole, "target", temperature),
        strict=True,
    )
    return [
        f"Subspace token ids: {sample['option_tokens']}",
        "\n===== GLOBAL =====",
        *_space_lines("Global", whole),
        "\n===== TOP TOKENS (Original vs Dropped) =====",
        *(f"{token:<15} | orig={p:.6f} | drop={q:.6f}" for token, p, q in tops),
        f"\n===== TOP TOKENS {[token for token, _, _ in tops]} =====",
        f"\n===== SUBSPACE ({letters}) =====",
        *_space_lines("Subspace", options),
        "=" * 80,
        "\n===== SUBWORD PROBABILITIES (Original vs Dropped) =====",
        *(f"{text:<10} | orig={p:.6f} | drop={q:.6f}" for text, p, q in both),
    ]


def _space_lines(name: str, row: dict[str, Any]) -> list[str]:
    numbers = {"logits cosine": row["z_cos"], "prob cosine": row["p_cos"], "KL": row["kl_dense_target"]}
    return [f"{name} {what}: [{value}]" for what, value in numbers.items()]


def _log_probabilities(sample: dict[str, Any], whole: dict[str, Any], side: str, temperature: float) -> list[float]:
    """log p of each option's token at the metric temperature T, in nats.

    The table holds them at T = 1, and at T that of the right option (``nll``); two options are 1/T as far apart at T as at 1. Where
    options are not one token each (``option_tokens`` is null) they are sequence log-likelihoods, which know T = 1 only.
    """
    found: list[float] = whole[f"loglik_{side}"]
    if temperature == 1 or sample["option_tokens"] is None:
        return found
    right = found[whole["gold"]]
    return [(value - right) / temperature - whole[f"nll_{side}"] for value in found]
