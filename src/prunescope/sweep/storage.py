"""Bytes of a model's weights as each point of a sweep would store them, without storing any.

Matrices of the blocks take the bits of their format, scales included (`prunescope.models.rounding.bits_per_weight`); embeddings, head, norms
and biases the dtype of the checkpoint. What is dropped is gone. Zeros are stored like any other number unless asked otherwise.
"""

from __future__ import annotations

import math

import torch

from prunescope.models.loaded import LoadedModel
from prunescope.models.matrices import find_matrices
from prunescope.models.packed import is_packed, named_tensors
from prunescope.models.quantised import QuantSpec
from prunescope.models.rounding import bits_per_weight
from prunescope.models.semistructured import inner_tensors
from prunescope.prune.masks import Goal

__all__ = ["Storage"]


class Storage:
    """The dense model's matrices and dtype, found once; made while the model is dense."""

    def __init__(self, loaded: LoadedModel, sparse: bool = False) -> None:
        """
        Args:
            sparse: leave pruned weights out. Of N:M the N values and ceil(log2 M) bits for the place of each are stored, else the values that
                are left and one bit a weight that says whether it is.
        """
        self._loaded, self._sparse = loaded, sparse
        self.dtype = loaded.stored_dtype or torch.float16  # a GGUF file's weights have one each: 16 bits stand for them
        self._widths: dict[
            int, int
        ] = {}  # of the matrices that can be pruned and quantised, by the parameter that holds them
        where = {id(module): name for name, module in loaded.model.named_modules()}
        for block in loaded.anatomy.blocks:
            # a package may keep its packed numbers in buffers and have no parameter that find_matrices knows
            if not any(p.dim() >= 2 and not is_packed(p) for p in block.module.parameters()):
                continue
            for matrix in find_matrices(block, where[id(block.module)]):
                parameter = getattr(matrix.module, matrix.attribute)
                if not is_packed(parameter):
                    self._widths[id(parameter)] = matrix.weight.shape[1]

    def bytes(self, quant: QuantSpec | None = None, goal: Goal | None = None) -> int:
        """Of the model as it stands now, sublayers dropped or not, with its matrices in the format ``quant`` and pruned to ``goal``."""
        goal, total, seen = goal or Goal(0.0), 0.0, set()
        plain = self.dtype.itemsize * 8
        for _, tensor in named_tensors(self._loaded.model):
            if id(tensor) in seen:  # tied
                continue
            seen.add(id(tensor))
            width = self._widths.get(id(tensor))
            if is_packed(tensor):
                total += 8 * sum(inner.nbytes for inner in inner_tensors(tensor))
            elif width is None:
                total += plain * tensor.numel()
            else:
                bits = plain if quant is None else bits_per_weight(width, quant.scheme, quant.group)
                total += self._left(bits, goal) * tensor.numel()
        return round(total / 8)

    def _left(self, bits: float, goal: Goal) -> float:
        """Bits a weight where some are pruned."""
        if not self._sparse or not goal.sparsity:
            return bits
        kept = 1 - goal.sparsity
        return kept * (bits + math.ceil(math.log2(goal.of))) if goal.of else kept * bits + 1
