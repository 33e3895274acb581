"""The two sides of a comparison: a dense model, and a target that is a model of its own or the dense one changed in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from prunescope.compare.context import Changed, TargetModel, check_comparable, check_pair, switched
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model
from prunescope.models.loaded import LoadedModel
from prunescope.models.variants import Variant, VariantSpec, read_variant

__all__ = ["Pair", "load_dense", "load_pair"]


@dataclass(frozen=True)
class Pair:
    """``target`` is None where every sublayer of the dense model is dropped in turn."""

    dense: LoadedModel
    target: TargetModel

    @classmethod
    def load(
        cls, dense: Model, target: Model | None, options: LoadOptions, *, headless: bool = False, blocks: bool = False
    ) -> Pair:
        """Load both sides and check that they can be compared.

        Args:
            headless: take weights without an output head, see `load_model`.
            blocks: they are compared block by block, so that width and depth must be the same too.
        Raises:
            UserError: whatever is wrong with either, or the two do not go together.
        """
        spec = read_variant(target)  # complains before anything is loaded
        base = options.load(dense, headless=headless)
        other: TargetModel
        if isinstance(spec, VariantSpec):
            check_comparable(base, None)
            other = Variant(base, spec)
        elif spec is not None or target is None:
            other = spec
        else:
            other = options.load_other(target, headless=headless)
        (check_comparable if blocks else check_pair)(base, other)  # type: ignore[arg-type]
        if base.device.type == "cuda":
            torch.cuda.set_device(base.device)  # kernels run where the dense head is
        return cls(base, other)

    @property
    def pruned(self) -> Changed:
        """The target of a command that cannot do without."""
        assert self.target is not None
        return self.target

    @property
    def models(self) -> list[LoadedModel]:
        """The models that are loaded: one or two."""
        return [self.dense, *([self.target] if isinstance(self.target, LoadedModel) else [])]

    def describe(self) -> dict[str, Any]:
        """What a run folder records of the two; the target is None where every sublayer is dropped in turn."""
        if self.target is None:
            return {"dense": self.dense.describe(), "target": None}
        with switched(self.dense, self.target) as model:
            target = model.describe()
        if isinstance(self.target, Variant):
            target |= self.target.describe()
        return {"dense": self.dense.describe(), "target": target}

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """A NaN among the logits becomes a line for the user."""
        try:
            yield
        except FloatingPointError as error:
            against = "" if self.target is None else f" against {self.target}"
            raise UserError(
                f"{self.dense.ref}{against}: {error}; the activations of one of them overflow in {self.dense.dtype}, try --dtype float32"
            ) from error


def load_pair(
    dense: Model, target: Model | None, options: LoadOptions, *, headless: bool = False
) -> tuple[LoadedModel, TargetModel]:
    """Both sides for a worker, which the first process has checked."""
    pair = Pair.load(dense, target, options, headless=headless)
    return pair.dense, pair.target


def load_dense(dense: Model, options: LoadOptions) -> tuple[LoadedModel]:
    """One model for a worker."""
    return (options.load(dense),)
