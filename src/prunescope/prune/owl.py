"""OWL: blocks with more outliers among their scores lose less (Yin et al., arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.models.blockwise import StreamedModel
from prunescope.progress import progress
from prunescope.prune.calibrate import Text, gather
from prunescope.prune.wanda import wanda_scores

__all__ = ["owl_sparsities", "stretch"]


def owl_sparsities(
    streamed: StreamedModel,
    tokens: Tensor,
    sparsity: float,
    *,
    threshold: float,
    spread: float,
    batch_size: int,
    limit: int,
    file: Path,
    used: Tensor | None = None,
) -> list[float]:
    """Sparsity of each block by its outliers.

    A block's outlier ratio is the share of its scores |W| x input norm above ``threshold`` times their mean, in the dense model. Ratios are
    stretched to ``sparsity`` plus or minus ``spread`` at most, their mean kept.
    """
    text = Text(streamed, tokens, batch_size, limit, file, used)
    blocks = len(streamed.blocks)
    ratios = []
    with progress(f"outliers of {blocks} blocks", 2 * blocks * len(tokens)) as advance:
        for layer in range(blocks):
            with streamed.block(layer):
                matrices = streamed.matrices(layer)
                statistics, shares = gather(text, layer, matrices, gram=False, advance=advance)
                norms = {m.name: statistics[shares[m.name]].norm() for m in matrices if m.name in shares}
                scores = [wanda_scores(m.weight, norms[m.name]) for m in matrices if m.name in norms]
                count = sum(score.numel() for score in scores)
                mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
                ratios.append(sum(int((score > threshold * mean).sum()) for score in scores) / count)
                text.run(layer, keep=True, advance=advance)
    text.close()
    return stretch(ratios, sparsity, spread)


def stretch(ratios: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """OWL's rule: the densities ``1 - sparsity`` of blocks follow their ratios over a range of 2 x spread, mean kept."""
    low, high = min(ratios), max(ratios)
    scaled = [(ratio - low) / (high - low) * 2 * spread if high > low else 0.0 for ratio in ratios]
    mean = sum(scaled) / len(scaled)
    found = [sparsity - (value - mean) for value in scaled]
    if not all(0 <= value < 1 for value in found):
        raise UserError(
            f"sparsity {sparsity} with a spread of {spread} gives a block {min(found):.2f} or {max(found):.2f}; choose a smaller --owl-spread"
        )
    return found
