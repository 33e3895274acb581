"""Take sublayers out of a live model, and put them back.

A dropped branch contributes exactly zero to the residual stream: its modules, with the norms of the branch, are replaced by
parameter-free stand-ins. The remaining attentions are renumbered in the key/value cache, and the cache that `generate()` or
a forward pass makes is cut to them, each keeping the cache kind (full, sliding, ...) of its own layer. So a dropped attention
costs no cache, and a model without attention 0 still knows how many tokens it has seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from prunescope.errors import UserError
from prunescope.models.anatomy import KINDS, Anatomy, Kind, Sublayer
from prunescope.models.finding import layer_attribute

__all__ = ["DropSpec", "Dropped", "drop_sublayers"]


@dataclass(frozen=True)
class DropSpec:
    """Which sublayers are dropped: sorted layer indices of the dense model. Written ``attn=0,5;mlp=7`` or ``block=3-5``."""

    attn: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @classmethod
    def of(cls, sublayers: Iterable[tuple[Kind, int]]) -> DropSpec:
        chosen = set(sublayers)
        return cls(*(tuple(sorted(layer for kind, layer in chosen if kind == wanted)) for wanted in KINDS))

    @classmethod
    def parse(cls, text: str) -> DropSpec:
        """Read ``attn=0,5;mlp=7``, ``block=2`` (both of layer 2), ranges ``attn=3-6``. Raises UserError with the place."""
        chosen: list[tuple[Kind, int]] = []
        for part in filter(None, (piece.strip() for piece in text.split(";"))):
            match = re.fullmatch(r"(attn|mlp|block)\s*=\s*(\d+(?:\s*-\s*\d+)?(?:\s*,\s*\d+(?:\s*-\s*\d+)?)*)", part)
            if match is None:
                raise UserError(
                    f"drop spec {text!r}: cannot read {part!r}; write for example drop:attn=3,5;mlp=7 or drop:block=2-4"
                )
            kinds = KINDS if match[1] == "block" else (match[1],)
            for item in match[2].split(","):
                first, _, last = item.partition("-")
                if last and int(last) < int(first):
                    raise UserError(f"drop spec {text!r}: the range {item.strip()} runs backwards")
                chosen += [(kind, layer) for layer in range(int(first), int(last or first) + 1) for kind in kinds]  # type: ignore[misc]
        if not chosen:
            raise UserError(f"drop spec {text!r} drops nothing; name sublayers, for example drop:attn=3,5;mlp=7")
        return cls.of(chosen)

    def __str__(self) -> str:
        return ";".join(f"{kind}={','.join(map(str, self.layers(kind)))}" for kind in KINDS if self.layers(kind))

    def __bool__(self) -> bool:
        return bool(self.attn or self.mlp)

    def __contains__(self, sublayer: tuple[Kind, int]) -> bool:
        return sublayer[1] in self.layers(sublayer[0])

    def layers(self, kind: Kind) -> tuple[int, ...]:
        return self.attn if kind == "attn" else self.mlp

    def union(self, other: DropSpec) -> DropSpec:
        return DropSpec.of((kind, layer) for spec in (self, other) for kind in KINDS for layer in spec.layers(kind))

    def whole_blocks(self) -> tuple[int, ...]:
        return tuple(layer for layer in self.attn if layer in self.mlp)

    def check(self, blocks: int) -> None:
        """Raise UserError if a layer does not exist."""
        wrong = sorted({layer for kind in KINDS for layer in self.layers(kind) if not 0 <= layer < blocks})
        if wrong:
            raise UserError(
                f"drop spec {self}: layer {wrong[0]} is out of range; the model has layers 0 to {blocks - 1}"
            )


class _Zero(nn.Module):
    """Stands where a branch's module stood: zeros of its input's shape, in the form its caller unpacks."""

    def __init__(self, returns: int) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, *(None for _ in range(self.returns - 1))) if self.returns else zeros


class _Residual(nn.Module):
    """Stands where a module stood that adds the stream itself: gives the stream on as it was."""

    def __init__(self, module: nn.Module, returns: int) -> None:
        super().__init__()
        self.place = list(signature(module.forward).parameters).index("residual")
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        residual = kwargs["residual"] if "residual" in kwargs else args[self.place]
        return (residual, *(None for _ in range(self.returns - 1))) if self.returns else residual


class Dropped:
    """Sublayers that are out of a model; `restore` puts back the very same modules, so the dense model is exact again."""

    def __init__(self, spec: DropSpec, undo: list[tuple[nn.Module, str, Any]], hook_handles: list[Any]) -> None:
        self.spec = spec
        self._undo = undo
        self._hooks = hook_handles

    def modules(self) -> list[nn.Module]:
        """The modules that were taken out, which stay in memory until the model itself goes."""
        return [value for _, _, value in self._undo if isinstance(value, nn.Module)]

    def restore(self) -> None:
        for owner, name, value in reversed(self._undo):
            setattr(owner, name, value)
        self._undo.clear()
        while self._hooks:
            self._hooks.pop().remove()


def drop_sublayers(model: nn.Module, anatomy: Anatomy, spec: DropSpec) -> Dropped:
    """Drop ``spec`` from ``model`` in place.

    Raises:
        UserError: ``spec`` names nothing, or a layer that does not exist.
    """
    if not spec:
        raise UserError("nothing to drop: the list of sublayers is empty")
    spec.check(len(anatomy))
    undo: list[tuple[nn.Module, str, Any]] = []

    def put(owner: nn.Module, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for part in anatomy.sublayers():
        if (part.kind, part.layer) in spec:
            owner = anatomy.blocks[part.layer].module
            for module in part.modules:
                returns = part.returns if module is part.modules[-1] else 0
                stand_in = _Residual(module, returns) if part.fused and module is part.modules[-1] else _Zero(returns)
                put(owner, _child_name(owner, module), stand_in)
            for norm in _own_norms(part):
                put(owner, _child_name(owner, norm), nn.Identity())

    handles: list[Any] = []
    if spec.attn:
        kept = [block.attn for block in anatomy.blocks if block.attn.layer not in spec.attn]
        for position, part in enumerate(kept):
            for module in part.modules[0].modules():
                number = layer_attribute(module)
                if number and getattr(module, number) == part.layer:
                    put(module, number, position)
        cutter = _CacheCutter(model.config, tuple(part.layer for part in kept), len(anatomy))
        handles.append(anatomy.decoder.register_forward_pre_hook(cutter, with_kwargs=True))
        if not kept:
            handles.append(anatomy.decoder.register_forward_hook(_count_tokens, with_kwargs=True))
    return Dropped(spec, undo, handles)


def _own_norms(part: Sublayer) -> list[nn.Module]:
    """Norms that serve this branch alone. A pre-norm that both branches of a parallel block read stays."""
    return [norm for norm in (None if part.shares_pre else part.pre, part.post) if norm is not None]


def _child_name(owner: nn.Module, child: nn.Module) -> str:
    return next(name for name, module in owner.named_children() if module is child)


class _CacheCutter:
    """Forward pre-hook of the decoder: the cache holds only the attentions that are left, in their order."""

    def __init__(self, config: Any, kept: tuple[int, ...], blocks: int) -> None:
        self.config, self.kept, self.blocks = config, kept, blocks

    def __call__(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = getattr(self.config.get_text_config(decoder=True), "use_cache", True)
            if not use_cache:
                return None
            cache = DynamicCache(config=self.config)
            kwargs = {**kwargs, "past_key_values": cache}
        if not isinstance(cache, Cache):
            raise TypeError(f"a dropped model takes a transformers Cache, not a {type(cache).__name__}")
        if getattr(cache, "kept_attention", self.kept) != self.kept:
            raise ValueError(
                "this cache was filled with other sublayers dropped; a dropped model needs a cache of its own"
            )
        cache.kept_attention = self.kept
        if len(cache.layers) == self.blocks and not isinstance(cache.layers[0], _TokenCounter):
            if cache.get_seq_length() > 0:
                raise ValueError("this cache was filled by the dense model; a dropped model needs a cache of its own")
            cache.layers = [cache.layers[layer] for layer in self.kept]
        if not self.kept and not cache.layers:
            cache.layer_class_to_replicate = None
            cache.layers = [_TokenCounter()]
        return args, kwargs


class _TokenCounter(DynamicLayer):
    """The cache of a model with no attention left: no keys, only how many tokens went through, since positions follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        self.seen = max(0, self.seen - abs(tokens_to_remove))

    def reset(self) -> None:
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...


def _count_tokens(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the decoder, in place only while no attention is left."""
    cache = kwargs.get("past_key_values")
    if cache is not None:
        cache.layers[0].seen += output[0].shape[1]
