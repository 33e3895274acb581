"""A model in memory, with what prunescope knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunescope.errors import UserError
from prunescope.models.anatomy import KINDS, Anatomy
from prunescope.models.dropping import Dropped, DropSpec, drop_sublayers
from prunescope.models.packed import format_of, is_packed
from prunescope.models.recall import Recall

__all__ = ["LoadedModel", "Source"]


class Source(Protocol):
    """Where the weights of a model are whose parameters are on the meta device."""

    device: torch.device

    @property
    def head_weight(self) -> Tensor:
        """``(V, d)``, of which a few rows are looked at at a time."""
        ...

    def states(self, ids: Tensor) -> Tensor:
        """What the head reads ``(batch, tokens, d)`` of texts ``(batch, tokens)`` that the model has read."""
        ...


@dataclass(repr=False)
class LoadedModel:
    """A causal LM with its tokenizer and what prunescope knows of it.

    ``model`` is the ordinary transformers model: `generate()` and everything else work on it, dropped or not.
    """

    ref: str  # as the user wrote it
    model: Any
    tokenizer: Any
    anatomy: Anatomy
    identity: dict[str, str]  # id and revision, or path and content hash
    layer_map: tuple[int, ...]  # layer of the dense model that each block is
    dense_layers: int
    record: dict[str, Any] | None = None  # prunescope.json of a checkpoint folder
    stored_dtype: torch.dtype | None = None  # of the weights on disk, where it is known
    # zeros of matrices whose weights stay on disk, by the id of the parameter that stands for them
    zeros: dict[int, int] = field(default_factory=dict)
    source: Source | None = field(default=None, repr=False)
    _drops: list[Dropped] = field(default_factory=list)
    # by what is dropped: why texts are written by generate(), None if they are not (`prunescope.models.generating.static_problem`)
    decoding: dict[str, str | None] = field(default_factory=dict)
    # what it has read and written, for the next command that asks the same of it
    recall: Recall = field(default_factory=Recall, repr=False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.ref}{f' without {self.dropped}' if self.dropped else ''}>"

    def __str__(self) -> str:
        return self.ref

    @property
    def dropped(self) -> DropSpec:
        """What is missing against the dense model, in the dense model's layer numbers."""
        gone = [(kind, layer) for layer in range(self.dense_layers) if layer not in self.layer_map for kind in KINDS]
        if self.record and self.record.get("format") == "zeroed":  # silent, though its modules are there
            gone += [(kind, layer) for kind in KINDS for layer in self.record[f"drop_{kind}_list"]]
        live = [(kind, self.layer_map[i]) for drop in self._drops for kind in KINDS for i in drop.spec.layers(kind)]
        return DropSpec.of([*gone, *live])

    @property
    def pinned(self) -> bool:
        """Whether ``identity`` names exactly these weights, so that what was found for them may be kept."""
        return bool(self.identity.get("content_hash") or self.identity.get("revision"))

    @property
    def device(self) -> torch.device:
        return self.source.device if self.source is not None else self.anatomy.head.weight.device  # type: ignore[return-value]

    @property
    def head_weight(self) -> Tensor:
        """``(V, d)``."""
        return self.source.head_weight if self.source is not None else self.anatomy.head.weight.detach()  # type: ignore[operator]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def context(self) -> int | None:
        """The longest sequence that the model's positions allow, None where its config names none."""
        length = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(length) if length else None

    def drop(self, spec: DropSpec | str) -> None:
        """Drop sublayers in place; a string is read as `DropSpec.parse` does. One drop at a time: `restore` first."""
        if self._drops:
            raise UserError(f"{self.ref} has sublayers dropped already ({self._drops[0].spec}); restore it first")
        self._drops.append(
            drop_sublayers(self.model, self.anatomy, DropSpec.parse(spec) if isinstance(spec, str) else spec)
        )

    def restore(self) -> None:
        """Undo `drop`: the very same modules are back in their places."""
        while self._drops:
            self._drops.pop().restore()

    @contextmanager
    def dropping(self, spec: DropSpec) -> Iterator[None]:
        """The model with ``spec`` dropped as well, for the length of a ``with`` block; an empty spec changes nothing."""
        before = [drop.spec for drop in self._drops]
        self.restore()
        try:
            total = spec
            for earlier in before:
                total = total.union(earlier)
            if total:
                self.drop(total)
            yield
        finally:
            self.restore()
            for earlier in before:
                self.drop(earlier)

    def taken_out(self) -> list[nn.Module]:
        """The modules of the sublayers that are dropped in place; they stay in memory, so that `restore` can put them back."""
        return [module for drop in self._drops for module in drop.modules()]

    def sparsity(self) -> float:
        """Share of zero weights in the matrices of the blocks that are left; packed ones are not looked at. Of the whole model it is in ``recall``."""
        key = None if self._drops else self.recall.key(self.model, "sparsity")
        if (known := self.recall.get(key)) is not None:
            return known[0].item()
        matrices = [
            p for block in self.anatomy.blocks for p in block.module.parameters() if p.dim() >= 2 and not is_packed(p)
        ]
        zeros = sum(
            self.zeros[id(matrix)] if matrix.is_meta else int(matrix.numel() - matrix.count_nonzero())
            for matrix in matrices
        )
        share = zeros / max(1, sum(matrix.numel() for matrix in matrices))
        self.recall.put(key, torch.tensor(share, dtype=torch.float64))
        return share

    def describe(self) -> dict[str, Any]:
        """What a run folder records of the model."""
        dropped, packed = self.dropped, format_of(self.model)
        return {
            **self.identity,
            **({"quantisation": packed} if packed else {}),
            "architecture": type(self.model).__name__,
            "blocks": self.dense_layers,
            "hidden_size": self.anatomy.hidden_size,
            "vocab_size": self.anatomy.vocab_size,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparsity": self.sparsity(),
            "drop_attn_list": list(dropped.attn),
            "drop_mlp_list": list(dropped.mlp),
        }
