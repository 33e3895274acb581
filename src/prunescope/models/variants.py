"""Targets that are no checkpoint but the dense model changed in memory: ``drop:attn=3,5``, ``quant:int4-g128``, and both joined by ``+``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.quantised import Quantised, QuantSpec

__all__ = ["Variant", "VariantSpec", "read_variant"]


@dataclass(frozen=True)
class VariantSpec:
    """What is changed: sublayers dropped, matrices quantised, or both."""

    drop: DropSpec = DropSpec()  # noqa: RUF009 (frozen)
    quant: QuantSpec | None = None

    @staticmethod
    def names(target: object) -> bool:
        """Whether ``target``, as a user wrote it, is a variant rather than a model."""
        return isinstance(target, str) and target.startswith(("drop:", "quant:"))

    @classmethod
    def parse(cls, text: str) -> VariantSpec:
        """Read ``drop:attn=3,5;mlp=7``, ``quant:int8`` or both joined by ``+``. Raises UserError."""
        found: dict[str, Any] = {}
        for piece in text.split("+"):
            kind, _, spec = piece.strip().partition(":")
            if kind not in ("drop", "quant"):
                raise UserError(
                    f"target {text!r}: cannot read {piece.strip()!r}; write drop:attn=3,5;mlp=7, quant:int4-g128, or both joined by +"
                )
            if kind in found:
                raise UserError(f"target {text!r} has {kind}: twice; write all of it after one")
            found[kind] = DropSpec.parse(spec) if kind == "drop" else QuantSpec.parse(spec)
        return cls(**found)

    def __str__(self) -> str:
        pieces = [f"drop:{self.drop}"] if self.drop else []
        return "+".join([*pieces, *([f"quant:{self.quant}"] if self.quant else [])])


class Variant:
    """A changed dense model. What must be computed for it is computed once; `applied` then switches to it and back exactly."""

    def __init__(self, dense: LoadedModel, spec: VariantSpec | str) -> None:
        """
        Raises:
            UserError: a layer that does not exist, or see `Quantised`.
        """
        self.dense = dense
        self.spec = VariantSpec.parse(spec) if isinstance(spec, str) else spec
        self.spec.drop.check(len(dense.anatomy))
        self.quantised = Quantised(dense, self.spec.quant) if self.spec.quant else None

    @contextmanager
    def applied(self) -> Iterator[LoadedModel]:
        """The dense model, changed, for the length of a ``with`` block."""
        with self.quantised.applied() if self.quantised else nullcontext(), self.dense.dropping(self.spec.drop):
            yield self.dense

    def __str__(self) -> str:
        return str(self.spec)

    def describe(self) -> dict[str, Any]:
        """What a run records of it beside the dense model."""
        return {"variant": str(self.spec), **(self.quantised.describe() if self.quantised else {})}


def read_variant(target: object) -> DropSpec | VariantSpec | None:
    """What a target changes of the dense model: sublayers to drop, or a variant with quantised matrices; None for a model of its own.

    Raises:
        UserError: what follows ``drop:`` or ``quant:`` cannot be read.
    """
    if not VariantSpec.names(target):
        return None
    found = VariantSpec.parse(str(target))
    return found if found.quant else found.drop
