"""Prune the weights of a model that is in memory, for a while: the same block-by-block pruning as `sparsify`, without files.

What `sparsify` does with one block of the model in memory at a time is done here with all of them: `Resident` answers as `StreamedModel`
does, but its weights are there already. Afterwards the dense weights are back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from prunescope.errors import UserError
from prunescope.models.blockwise import StreamedModel
from prunescope.models.loaded import LoadedModel
from prunescope.models.packed import refuse_packed
from prunescope.models.placing import refuse_sharded
from prunescope.progress import progress
from prunescope.prune.blocks import prune_block
from prunescope.prune.calibrate import Text, overflow
from prunescope.prune.masks import Goal
from prunescope.prune.plan import RESHAPING, Method, has_fused_experts, make_plan, samples_at_a_time

__all__ = ["DenseWeights", "check_prunable", "pruned_in_place"]

_MEMORY = 4 * 2**30


class Resident(StreamedModel):
    """A loaded model where a `StreamedModel` is expected."""

    def __init__(self, loaded: LoadedModel) -> None:
        where = {id(module): name for name, module in loaded.model.named_modules()}
        blocks = nn.ModuleList(block.module for block in loaded.anatomy.blocks)
        names = tuple(where[id(block)] for block in blocks)
        super().__init__(loaded, loaded.device, Path(), {}, {}, blocks, names)

    @contextmanager
    def block(self, layer: int, weights: Mapping[str, Tensor] | None = None, *, mapped: bool = False) -> Iterator[None]:
        yield

    @contextmanager
    def outside(self, skip: Collection[nn.Module | nn.Parameter] = ()) -> Iterator[None]:
        yield

    def stored_dtype(self, name: str) -> torch.dtype:
        """That of the checkpoint, so that pruned weights round as they would on disk."""
        own: torch.dtype = self.model.dtype
        stored = self.loaded.stored_dtype or own
        return stored if torch.promote_types(stored, own) == own else own


class DenseWeights:
    """A copy of every weight that can be pruned, on the CPU: taken once, put back as often as wanted."""

    def __init__(self, loaded: LoadedModel) -> None:
        resident = Resident(loaded)
        names = {matrix.parameter for layer in range(len(resident.blocks)) for matrix in resident.matrices(layer)}
        self._live = {name: loaded.model.get_parameter(name) for name in sorted(names)}
        self._kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._live.items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(self._kept[name])


@contextmanager
def pruned_in_place(
    loaded: LoadedModel,
    dense: DenseWeights,
    method: Method,
    goal: Goal,
    tokens: Tensor,
    *,
    batch_size: int | None = None,
    memory: int = _MEMORY,
) -> Iterator[float]:
    """The model with its weights pruned, for the length of a ``with`` block; what it gives is the share of zeros reached.

    Args:
        dense: the weights to go back to, taken while the model was dense.
        method: magnitude, wanda or sparsegpt; structured changes shapes and does not go in place.
        tokens: calibration ``(samples, length)``.
        batch_size: samples at a time, see `samples_at_a_time`.
        memory: bytes of hidden states to hold; more are kept in a temporary file.
    Raises:
        UserError: a pattern that does not divide a width, an unsupported architecture, activations that overflow.
    """
    if method in RESHAPING:
        raise UserError(f"{method} pruning changes shapes and does not go in place; use sparsify")
    resident = Resident(loaded)
    plan = make_plan(resident, method, goal)
    fused = has_fused_experts(resident)
    batch = samples_at_a_time(resident, tokens.shape[1], batch_size)
    rows: list[dict[str, Any]] = []
    try:
        with TemporaryDirectory(prefix="prunescope-") as scratch, torch.no_grad(), _eager_experts(loaded, fused):
            # magnitude needs no text; only which way fused experts lie is seen when one runs
            needed = method != "magnitude" or fused
            text = Text(resident, tokens, batch, memory, Path(scratch) / "calibration.bin") if needed else None
            blocks = len(resident.blocks)
            with progress(f"pruning ({method} {goal})", 2 * blocks * len(tokens) if needed else 0) as advance:
                for layer in range(blocks):
                    rows += prune_block(resident, plan, layer, text, advance)["rows"]
                    if text is not None and layer < blocks - 1:
                        text.run(layer, keep=True, advance=advance)
            if text is not None:
                text.close()
        yield sum(row["zeros"] for row in rows) / sum(row["outputs"] * row["inputs"] for row in rows)
    except FloatingPointError as error:
        raise UserError(f"{loaded.ref}: {error}; {overflow(loaded.dtype)}") from error
    finally:
        dense.restore()


@contextmanager
def _eager_experts(loaded: LoadedModel, fused: bool) -> Iterator[None]:
    """Fused experts one by one, as `sparsify` runs them, so that each one's input is seen."""
    if not fused:
        yield
        return
    config = loaded.model.config
    before = getattr(config, "_experts_implementation", None)
    loaded.model.set_experts_implementation("eager")
    try:
        yield
    finally:
        loaded.model.set_experts_implementation(before or "eager")


def check_prunable(loaded: LoadedModel, method: Method, goal: Goal) -> None:
    """Raise UserError if `pruned_in_place` could not do it, before any work is done."""
    refuse_packed(loaded.ref, loaded.model, f"{method} pruning")
    refuse_sharded(
        loaded.ref,
        loaded.model,
        f"{method} pruning in memory",
        "prune with sparsify, which reads a block at a time, or give a larger GPU",
    )
    make_plan(Resident(loaded), method, goal)
