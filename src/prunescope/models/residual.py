"""Watch the residual stream of a model while it runs, and feed one model's branches with another model's stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunescope.models.anatomy import Block, Kind, Sublayer
from prunescope.models.finding import (
    first_output,
    first_tensor,
    given_residual,
    hooks,
    other_forwards,
    sum_of,
    swap_first_tensor,
)
from prunescope.models.loaded import LoadedModel
from prunescope.models.placing import homeward

__all__ = ["Passage", "block_streams", "final_states", "headless", "starting_at", "substituting", "watching"]

Home = Callable[[Tensor], Tensor]  # see `homeward`


@dataclass(frozen=True)
class Passage:
    """What one sublayer did to the residual stream; tensors ``(batch, tokens, d)`` in the model's dtype."""

    layer: int
    kind: Kind
    before: Tensor
    after: Tensor
    entered: Tensor | None  # input of the module, behind the pre-norm; None where the sublayer is dropped
    produced: Tensor | None  # output of the module, in front of a post-norm
    added: Tensor | None  # what the branch adds to the stream


@contextmanager
def watching(
    loaded: LoadedModel, see: Callable[[Passage], None], stream_only: bool = False, only: int | None = None
) -> Iterator[None]:
    """Call ``see`` for every sublayer, in order, of every forward pass inside the block. Dropped sublayers pass the stream on unchanged.

    In a parallel block the attention branch counts as added first. ``stream_only``: of a passage only ``before`` and ``after`` are
    there, at a fraction of the hooks. ``only``: the block that runs, if it is one.
    """
    home, blocks = homeward(loaded), loaded.anatomy.blocks
    with hooks() as handles:
        for block in blocks if only is None else [blocks[only]]:
            state: dict[str, Tensor] = {}
            keep_input, keep_output = partial(_keep_input, state, home), partial(_keep_output, state, home)
            handles.append(block.module.register_forward_pre_hook(keep_input("before"), with_kwargs=True))
            for part in (block.attn, block.mlp):
                first, last = part.modules[0], part.modules[-1]
                if not stream_only:
                    handles.append(first.register_forward_pre_hook(keep_input(f"{part.kind} in"), with_kwargs=True))
                    handles.append(last.register_forward_hook(keep_output(f"{part.kind} out"), with_kwargs=True))
                for module in () if stream_only and part.kind == "mlp" else part.exits:
                    keep = keep_output(f"{part.kind} adds", summed=part.summed)
                    handles.append(module.register_forward_hook(keep, with_kwargs=True))
            handles.append(block.module.register_forward_hook(_tell(state, block, see, home)))
        yield


def _keep_input(state: dict[str, Tensor], home: Home, key: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        state[key] = home(first_tensor(args, kwargs))

    return hook


def _keep_output(state: dict[str, Tensor], home: Home, key: str, summed: bool = False) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found = home(_added(module, args, kwargs, output))
        found = found.clone() if key.startswith("mlp") else found  # Falcon adds the attention into it
        state[key] = state[key] + found.view_as(state[key]) if summed and key in state else found

    return hook


def _added(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
    """A module's output, without the stream where the module adds it."""
    residual, found = given_residual(module, args, kwargs), first_output(output)
    return found if residual is None else found - residual.to(found.device)


def _tell(state: dict[str, Tensor], block: Block, see: Callable[[Passage], None], home: Home) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        before, after = state["before"], home(first_output(output))
        added = {
            part.kind: _scaled(part.scale, state[f"{part.kind} adds"].view_as(before))
            for part in (block.attn, block.mlp)
            if f"{part.kind} adds" in state
        }
        middle = before + added["attn"] if "attn" in added else before
        for part, x, y in ((block.attn, before, middle), (block.mlp, middle, after)):
            kind = part.kind
            see(Passage(part.layer, kind, x, y, state.get(f"{kind} in"), state.get(f"{kind} out"), added.get(kind)))
        state.clear()

    return hook


def _scaled(scale: float, branch: Tensor) -> Tensor:
    return branch if scale == 1 else scale * branch


@contextmanager
def headless(loaded: LoadedModel) -> Iterator[None]:
    """Forward passes inside the block give zeros for logits: where only the stream is wanted, a head is read for nothing."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], loaded.anatomy.vocab_size)

    with other_forwards({loaded.anatomy.head: forward}):
        yield


@contextmanager
def final_states(loaded: LoadedModel, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``see`` with what the head reads, ``(batch, tokens, d)`` at all positions, in every forward pass inside the block: the stream
    after the final norm, or after the last block where there is no such norm."""
    home = homeward(loaded)
    last = loaded.anatomy.final_norm or loaded.anatomy.blocks[-1].module

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        see(home(first_output(output)))

    with hooks() as handles:
        handles.append(last.register_forward_hook(hook))
        yield


@contextmanager
def substituting(
    loaded: LoadedModel,
    stream: Callable[[int, Kind], Tensor],
    see: Callable[[int, Kind, Tensor], None],
    only: int | None = None,
) -> Iterator[None]:
    """Feed every branch of ``loaded`` with a stream of our choosing, and see what it adds.

    One forward pass of the model then gives every branch in the chosen context at once: what a branch writes to the model's own
    stream is replaced before anything reads it. Masks, positions and per-layer attention kinds are the model's own.

    Args:
        stream: ``(block, kind) -> (batch, tokens, d)``, the residual stream that the branch shall read.
        see: called with ``(block, kind, scale * branch output)`` for every branch that is not dropped.
        only: the block that runs, if it is one.
    """
    blocks = loaded.anatomy.blocks
    with hooks() as handles:
        for block in blocks if only is None else [blocks[only]]:
            layer = block.attn.layer

            def replace(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> Any:
                return swap_first_tensor(args, kwargs, stream(layer, "attn"))

            def replace_middle(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> Any:
                new = stream(layer, "mlp")
                return swap_first_tensor(args, kwargs, new.view_as(first_tensor(args, kwargs)))

            handles.append(block.module.register_forward_pre_hook(replace, with_kwargs=True))
            if not block.parallel:
                handles.append(block.mlp.entry.register_forward_pre_hook(replace_middle, with_kwargs=True))
            for part in (block.attn, block.mlp):
                found: list[Tensor] = []

                def seen(
                    module: nn.Module,
                    args: Any,
                    kwargs: Any,
                    output: Any,
                    part: Sublayer = part,
                    found: list[Tensor] = found,
                ) -> None:
                    found.append(_added(module, args, kwargs, output))
                    if module is part.exits[-1]:
                        see(
                            part.layer, part.kind, _scaled(part.scale, sum_of([one.view_as(found[0]) for one in found]))
                        )
                        found.clear()

                for module in part.exits:
                    handles.append(module.register_forward_hook(seen, with_kwargs=True))
        yield


@contextmanager
def block_streams(loaded: LoadedModel, first: int = 0) -> Iterator[list[Tensor]]:
    """A list that a forward pass inside the block fills: the stream ``(batch, tokens, d)`` into every block from ``first`` on, and after
    the last one."""
    streams: list[Tensor] = []
    home = homeward(loaded)

    def into(_: nn.Module, args: Any, kwargs: Any) -> None:
        streams.append(home(first_tensor(args, kwargs)))

    def out(_: nn.Module, args: Any, output: Any) -> None:
        streams.append(home(first_output(output)))

    with hooks() as handles:
        for block in loaded.anatomy.blocks[first:]:
            handles.append(block.module.register_forward_pre_hook(into, with_kwargs=True))
        handles.append(loaded.anatomy.blocks[-1].module.register_forward_hook(out))
        yield streams


@contextmanager
def starting_at(loaded: LoadedModel, layer: int, stream: Tensor) -> Iterator[None]:
    """Forward passes inside the block begin at block ``layer`` with ``stream`` (batch, tokens, d): the blocks before it pass on what they are
    given, unseen. Masks and positions are the model's own."""
    before = {block.module: _passing_on(block.returns) for block in loaded.anatomy.blocks[:layer]}

    def swap(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return swap_first_tensor(args, kwargs, stream)

    with other_forwards(before), hooks() as handles:
        handles.append(loaded.anatomy.blocks[layer].module.register_forward_pre_hook(swap, with_kwargs=True))
        yield


def _passing_on(returns: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = first_tensor(args, kwargs)
        return (hidden, *(None for _ in range(returns - 1))) if returns else hidden

    return forward
