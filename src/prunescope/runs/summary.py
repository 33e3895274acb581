"""Summary statistics of a run's rows: what `run.json` keeps under ``summary``. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["summarise"]


def summarise(
    table: pa.Table, spaces: Mapping[str, Sequence[str]], *, seed: int = 0, resamples: int = 1000
) -> dict[str, Any]:
    """Summary statistics per space and column.

    The 95 % confidence interval of the mean is a bootstrap over prompts, not over rows: steps and layers of one prompt are not
    independent. With a single prompt there is none (null).

    Args:
        table: rows with a column ``prompt``; none gives an empty summary.
        spaces: space -> columns; columns that the table lacks are left out.
    """
    import numpy as np

    if not len(table):
        return {space: {} for space in spaces}
    prompts, row_prompt = np.unique(table["prompt"].to_numpy(), return_inverse=True)
    draws = np.random.default_rng(seed).integers(0, len(prompts), (resamples, len(prompts)))
    result: dict[str, Any] = {}
    for space, columns in spaces.items():
        result[space] = {}
        for column in columns:
            if column not in table.column_names:
                continue
            values = table[column].to_numpy().astype(np.float64)
            known = np.isfinite(values)
            if not known.any():
                continue
            kept = values[known]
            q = np.quantile(kept, [0.01, 0.05, 0.5, 0.95, 0.99])
            sums = np.bincount(row_prompt[known], kept, len(prompts))
            counts = np.bincount(row_prompt[known], minlength=len(prompts))
            interval: list[float | None] = [None, None]
            if len(prompts) > 1:
                total = counts[draws].sum(1)
                means = sums[draws].sum(1)[total > 0] / total[total > 0]
                interval = [float(v) for v in np.quantile(means, [0.025, 0.975])]
            result[space][column] = {
                **{"mean": kept.mean(), "median": q[2], "min": kept.min(), "max": kept.max()},
                **{"p1": q[0], "p5": q[1], "p95": q[3], "p99": q[4]},
            }
            result[space][column] = {key: float(value) for key, value in result[space][column].items()} | {
                "ci95": interval,
                "count": int(known.sum()),
            }
    return result
