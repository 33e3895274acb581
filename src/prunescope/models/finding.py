"""Where the decoder blocks of a model are, and which tensors go into and come out of its modules; no weights are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

from torch import Tensor, nn

from prunescope.errors import UserError

__all__ = [
    "attention_of",
    "find_blocks",
    "first_output",
    "first_tensor",
    "given_residual",
    "hooks",
    "layer_attribute",
    "other_forwards",
    "sum_of",
    "swap_first_tensor",
]


def find_blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder blocks, and the list of them; no weights are needed. Raises UserError."""
    config: Any = model.config
    count, name = config.get_text_config(decoder=True).num_hidden_layers, type(model).__name__
    for module in _text_first(model):
        for child in module.children():
            if (
                isinstance(child, nn.ModuleList)
                and len(child) == count
                and all(attention_of(block) is not None for block in child)
            ):
                return module, child
    raise UserError(
        f"{name}: no list of {count} decoder blocks with an attention module each was found; this architecture is not supported"
    )


def _text_first(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, outermost first, those of the text decoder of a multimodal model before its towers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    if isinstance(decoder, nn.Module):
        yield from decoder.modules()
    yield from model.modules()


def attention_of(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The child that writes to the cache: transformers gives it, or a module inside it (GPT-Neo), a ``layer_idx``.

    Where other children carry their layer's number too (HunYuan's MLP), it is the one that takes a cache.
    """
    children = list(block.named_children())
    found = [(name, child) for name, child in children if layer_attribute(child)]
    found = found or [(n, child) for n, child in children if any(map(layer_attribute, child.modules()))]
    if len(found) > 1:
        found = [(name, child) for name, child in found if _takes_cache(child)]
    return found[0] if len(found) == 1 else None


def layer_attribute(module: nn.Module) -> str | None:
    """The attribute that holds the number of a module's layer in the cache; GPT-Neo has another name for it."""
    return next((name for name in ("layer_idx", "layer_id") if isinstance(getattr(module, name, None), int)), None)


def _takes_cache(module: nn.Module) -> bool:
    return any("past_key_value" in name or "cache" in name for name in signature(module.forward).parameters)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream among a module's arguments: the first positional one, else ``hidden_states``."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise UserError(
            "a module is called without its hidden states as first argument; this architecture is not supported"
        )
    return found


def swap_first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def first_output(output: Any) -> Tensor:
    """The hidden states among a module's outputs, which may be a tuple."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        raise UserError("a module returns no tensor first; this architecture is not supported")
    return found


def sum_of(parts: list[Tensor]) -> Tensor:
    """Their sum, from the left."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@contextmanager
def hooks() -> Iterator[list[Any]]:
    """A list for hook handles that are removed however the block ends."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def other_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the block these modules run other forwards; then their own again, be it their class's or one that a library has put there."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            module.__dict__.pop("forward", None)
            if before is not None:
                module.forward = before


@cache
def _residual_place(forward: Callable[..., Any]) -> int | None:
    """Where ``residual`` stands among what a class's forward is called with; read once a class, since hooks ask at every call."""
    place = _place_of(forward)
    return None if place is None else place - 1  # self


def _place_of(forward: Callable[..., Any]) -> int | None:
    names = list(signature(forward).parameters)
    return names.index("residual") if "residual" in names else None


def given_residual(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The stream that a module is given to add to, where its forward has a ``residual``."""
    own: Any = vars(module).get("forward")
    plain = (
        type(module).forward if own is None else getattr(own, "__func__", None)
    )  # a library may leave a method of the class behind
    place = _place_of(own) if plain is None else _residual_place(plain)
    if place is None:
        return None
    found = kwargs.get("residual", args[place] if len(args) > place else None)
    return found if isinstance(found, Tensor) else None
