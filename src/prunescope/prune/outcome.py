"""What was done to a matrix, as a row of the report."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from prunescope.models.matrices import Matrix
from prunescope.prune.calibrate import InputStatistic
from prunescope.prune.plan import PruningPlan

__all__ = ["matrix_row"]


def matrix_row(
    layer: int,
    matrix: Matrix,
    plan: PruningPlan,
    old: Tensor,
    new: Tensor,
    statistic: InputStatistic | None,
    damping: float | None,
) -> dict[str, Any]:
    goal = plan.goals[matrix.name]
    zeros = new.numel() - int(new.count_nonzero())
    tokens = None if statistic is None else statistic.tokens
    error = math.nan if statistic is None else statistic.relative_error(old, new)
    return {
        "layer": layer,
        "name": matrix.name,
        "outputs": new.shape[0],
        "inputs": new.shape[1],
        "asked": str(goal),
        "zeros": zeros,
        "sparsity": zeros / new.numel(),
        "error": None if math.isnan(error) else error,
        "dead_inputs": None if statistic is None else int((statistic.norm() == 0).sum()),
        "damping": damping,
        "tokens": tokens,
        "few_tokens": matrix.fused and statistic is not None and statistic.tokens < new.shape[1],
    }
