"""What every engine's export needs: the dropped sublayers by block number, and the dense weights under them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prunescope.models.anatomy import KINDS
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel

__all__ = ["dropped_here", "whole"]


def dropped_here(loaded: LoadedModel) -> DropSpec:
    """What is dropped of the blocks that ``loaded`` has, by their numbers in it: `compact` blocks that are gone do not count."""
    gone = loaded.dropped
    return DropSpec.of(
        [(kind, i) for kind in KINDS for i, layer in enumerate(loaded.layer_map) if layer in gone.layers(kind)]
    )


@contextmanager
def whole(loaded: LoadedModel) -> Iterator[Any]:
    """The transformers model with every module in its place, for the length of a ``with`` block."""
    drops = [drop.spec for drop in loaded._drops]
    loaded.restore()
    try:
        yield loaded.model
    finally:
        for spec in drops:
            loaded.drop(spec)
