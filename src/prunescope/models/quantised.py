"""Quantise a live model in place and put it back: what `quant:int4-g128` means as a target.

The weights of the blocks' matrices are replaced by what the format would hold of them (`prunescope.models.rounding`), in the model's own
dtype: its quality is that of the quantised model, its speed and memory are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunescope.errors import UserError
from prunescope.models import ggml
from prunescope.models.loaded import LoadedModel
from prunescope.models.matrices import Matrix, find_matrices
from prunescope.models.packed import refuse_packed
from prunescope.models.rounding import FLOATING, INTEGERS, bits_per_weight, round_to_nearest
from prunescope.progress import progress

__all__ = ["QuantSpec", "Quantised", "quantising"]


@dataclass(frozen=True)
class QuantSpec:
    """A format, written ``int8``, ``int4-g128``, ``fp8``, ``nf4`` or as a type of GGUF, ``q4_0``."""

    scheme: str
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read a format. Raises UserError."""
        match = re.fullmatch(r"([a-z][a-z0-9_]*)(?:-g(\d+))?", text.strip().lower())
        scheme, group = (match[1], match[2]) if match else ("", None)
        known = {**INTEGERS, **FLOATING}
        if re.fullmatch(r"i?q\d_k_(s|m|l|xl)", scheme):
            raise UserError(
                f"quant spec {text!r}: this is a mixture of types that only a .gguf file has; write {scheme.rpartition('_')[0]}, or give the file itself as the target"
            )
        if scheme not in known and scheme not in ggml.TYPES:
            raise UserError(
                f"quant spec {text!r} is unknown; write int8, int4-g128 (int2 to int8, -g and the weights that share a scale), fp8, nf4, or a type of GGUF: {', '.join(ggml.TYPES)}"
            )
        if group is not None and scheme not in known:
            raise UserError(f"quant spec {text!r}: types of GGUF have blocks of their own; write {scheme}")
        if group is not None and int(group) < 1:
            raise UserError(f"quant spec {text!r}: a group has at least one weight")
        return cls(scheme, int(group) if group else None)

    def __str__(self) -> str:
        return self.scheme + (f"-g{self.group}" if self.group else "")


class Quantised:
    """The matrices of a model's blocks, quantised once and kept beside the dense ones; `applied` exchanges the two as often as wanted.

    Takes as much memory again as these matrices have. The parameters keep their storage, so that whatever holds on to them stays valid.
    """

    def __init__(self, loaded: LoadedModel, spec: QuantSpec) -> None:
        """
        Raises:
            UserError: weights that are packed already, a quantiser that is not installed.
        """
        refuse_packed(loaded.ref, loaded.model, "quant:")
        self.spec = spec
        owners: dict[int, tuple[nn.Parameter, list[Matrix]]] = {}
        where = {id(module): name for name, module in loaded.model.named_modules()}
        for block in loaded.anatomy.blocks:
            for matrix in find_matrices(block, where[id(block.module)]):
                parameter = getattr(matrix.module, matrix.attribute)
                owners.setdefault(id(parameter), (parameter, []))[1].append(matrix)
        self._live = [parameter for parameter, _ in owners.values()]
        self._spare: list[Tensor] = []
        self.bytes = 0.0
        self.fallbacks: dict[str, int] = {}  # matrices that another type of GGUF stands in for
        with progress(f"quantising to {spec}", len(owners)) as advance, torch.no_grad():
            for parameter, matrices in owners.values():
                self._spare.append(self._quantise(parameter, matrices))
                advance(1)

    def _quantise(self, parameter: nn.Parameter, matrices: list[Matrix]) -> Tensor:
        dense = parameter.detach().clone()
        try:
            for matrix in matrices:
                rows, width = matrix.weight.shape
                matrix.set(round_to_nearest(matrix.weight, self.spec.scheme, self.spec.group))
                self.bytes += rows * width * bits_per_weight(width, self.spec.scheme, self.spec.group) / 8
                if (
                    self.spec.scheme in ggml.TYPES
                    and (kind := ggml.fitting(width, self.spec.scheme)) != self.spec.scheme
                ):
                    self.fallbacks[kind] = self.fallbacks.get(kind, 0) + 1
            return parameter.detach().clone()
        finally:
            parameter.detach().copy_(dense)

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, spare in zip(self._live, self._spare, strict=True):
            before = parameter.detach().clone()
            parameter.copy_(spare)
            spare.copy_(before)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model quantised, for the length of a ``with`` block; after it every weight is the dense one again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def describe(self) -> dict[str, Any]:
        """What a run records: the format, the bytes that the matrices would take in it, and which types stand in where."""
        count = sum(parameter.numel() for parameter in self._live)
        return {
            "quant": str(self.spec),
            "matrix_bytes": round(self.bytes),
            "bits_per_weight": 8 * self.bytes / count,
            "fallbacks": self.fallbacks,
        }


@contextmanager
def quantising(loaded: LoadedModel, spec: QuantSpec | str) -> Iterator[Quantised]:
    """The model with the matrices of its blocks quantised, for the length of a ``with`` block. Embeddings, head and norms stay as they are.

    Raises:
        UserError: see `QuantSpec.parse` and `Quantised`.
    """
    quantised = Quantised(loaded, QuantSpec.parse(spec) if isinstance(spec, str) else spec)
    with quantised.applied():
        yield quantised
