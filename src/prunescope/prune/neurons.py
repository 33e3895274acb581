"""Remove whole MLP neurons of a block, and check that removing them is what silencing them would be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunescope.errors import UserError, first_line
from prunescope.models.blockwise import StreamedModel
from prunescope.models.matrices import Matrix, Neurons, find_neurons, remove_neurons
from prunescope.progress import console
from prunescope.prune.calibrate import InputStatistic, Text
from prunescope.prune.outcome import matrix_row
from prunescope.prune.plan import PruningPlan, removed_neurons
from prunescope.prune.structured import structured

__all__ = ["check_shapes", "cut_again", "prune_neurons"]


def prune_neurons(
    plan: PruningPlan,
    layer: int,
    matrices: Sequence[Matrix],
    statistics: dict[str, InputStatistic],
    shares: dict[str, str],
    text: Text | None,
) -> dict[str, Any]:
    assert text is not None
    units = find_neurons(matrices)
    kept: list[Tensor] = []
    rows = []
    for neurons in units:
        statistic = statistics.get(shares.get(neurons.reader.name, ""))
        unseen = statistic is None or statistic.tokens == 0
        if statistic is None or unseen:
            statistic = InputStatistic.uniform(neurons.reader.weight, gram=False)
            console.print(
                f"{neurons.name}: no calibration token reached it; pruned as if all its inputs were alike", markup=False
            )
        weight = neurons.reader.weight
        stay = structured(weight, statistic.norm(), removed_neurons(plan, neurons))
        kept.append(stay)
        zeroed = torch.zeros_like(weight).index_copy_(1, stay, weight.index_select(1, stay))
        row = matrix_row(layer, neurons.reader, plan, weight, zeroed, None if unseen else statistic, None)
        rows.append(
            row | {"neurons": neurons.count, "removed": neurons.count - len(stay)} | ({"tokens": 0} if unseen else {})
        )
    expected = _zeroed_output(text, layer, units, kept)
    remove_neurons(units, kept)
    _check_cut(text, layer, expected)
    for row, neurons in zip(rows, units, strict=True):
        outputs, inputs = neurons.reader.weight.shape
        row |= {"outputs": outputs, "inputs": inputs, "zeros": 0, "sparsity": row["removed"] / row["neurons"]}
        row["zeros"] = int(neurons.reader.weight.numel() - neurons.reader.weight.count_nonzero())
    return {"rows": rows, "kept": [stay.tolist() for stay in kept]}


def _zeroed_output(text: Text, layer: int, units: Sequence[Neurons], kept: Sequence[Tensor]) -> Tensor:
    """The block's output on the first batch with the neurons silenced instead of removed."""
    saved = []
    for neurons, stay in zip(units, kept, strict=True):
        weight = neurons.reader.weight
        saved.append((neurons.reader, weight.clone()))
        neurons.reader.set(torch.zeros_like(weight).index_copy_(1, stay, weight.index_select(1, stay)))
    out = text.first_output(layer)
    for matrix, value in saved:
        matrix.set(value)
    return out


def _check_cut(text: Text, layer: int, expected: Tensor) -> None:
    """Removing neurons must give what silencing them gives: it does not where a matrix is laid out otherwise than is known here."""
    try:
        out = text.first_output(layer)
    except RuntimeError as why:  # something else in the MLP has as many entries as there were neurons
        raise UserError(
            f"block {layer}: its MLP does not run with neurons removed ({first_line(why)}); it is not supported by structured"
        ) from why
    scale = expected.float().abs().max().clamp(min=1e-30)
    error = float((out.float() - expected.float()).abs().max() / scale)
    if not error <= 64 * torch.finfo(out.dtype).eps * math.sqrt(out.shape[-1]):
        raise UserError(
            f"block {layer}: removing neurons changes more than silencing them does (by {error:.1e}); the MLP of this architecture is not supported by structured"
        )


def cut_again(streamed: StreamedModel, plan: PruningPlan, layer: int, kept: list[list[int]]) -> None:
    matrices = [matrix for matrix in streamed.matrices(layer) if matrix.name in plan.goals]
    units = find_neurons(matrices)
    remove_neurons(units, [torch.tensor(stay, device=streamed.device) for stay in kept])


def check_shapes(streamed: StreamedModel, layer: int, shapes: Mapping[str, torch.Size]) -> None:
    """What is left of a block must be what transformers will build from the new config."""
    for name, parameter in streamed.blocks[layer].named_parameters(prefix=streamed.names[layer]):
        if shapes.get(name) != parameter.shape:
            raise UserError(
                f"{name} would have the shape {tuple(parameter.shape)}, but the config can only say {tuple(shapes.get(name, ()))}; use another --sparsity or method"
            )
