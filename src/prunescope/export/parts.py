"""What every engine's export needs: the dropped sublayers by block number, the dense weights under them, and what the folder asks of its user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prunescope.models.anatomy import KINDS
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel

__all__ = ["Needs", "dropped_here", "rope_types", "unusual_yarn", "whole"]


@dataclass(frozen=True)
class Needs:
    """What an exported folder needs to run in its engine, beside the engine."""

    code: bool = False  # `trust_remote_code`, for the modelling file in it
    plugin: bool = False  # prunescope in vLLM's environment
    without_tokenizer: str | None = None  # why there is no tokenizer in a GGUF file


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


def rope_types(config: Any) -> list[str]:
    """How rotary positions are scaled: one kind, or one for each kind of layer."""
    ropes = config.rope_parameters
    nested = [rope for rope in ropes.values() if isinstance(rope, dict)]
    return [rope.get("rope_type", "default") for rope in nested or [ropes]]


def unusual_yarn(config: Any) -> list[str]:
    """Settings of YaRN that are not the usual ones, in words; engines read some of them, and not the same."""
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    names = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    rope = config.rope_parameters
    if rope.get("rope_type") != "yarn":
        return []
    return [f"{name} of YaRN" for name in names if rope.get(name) not in (None, usual.get(name))]
