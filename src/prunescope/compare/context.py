"""What all comparisons share: texts as both models read them, the check that two models can be compared, the states that heads read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from prunescope.compare.columns import least_memory
from prunescope.compare.head import Head
from prunescope.compare.metrics import FLOOR_COLUMNS
from prunescope.errors import UserError
from prunescope.models.attending import any_length
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.residual import final_states, headless
from prunescope.models.variants import Variant

__all__ = [
    "Changed",
    "TargetModel",
    "Transcript",
    "at_least_float32",
    "check_comparable",
    "check_memory",
    "check_pair",
    "final_head",
    "largest",
    "last_place",
    "mark_under_floor",
    "padded",
    "pieces",
    "read_states",
    "run_key",
    "step_index",
    "switched",
]

Changed = LoadedModel | DropSpec | Variant  # a model of its own, or the dense one changed in memory
TargetModel = Changed | None  # None: every sublayer of the dense model is dropped in turn


@dataclass(frozen=True)
class Transcript:
    """A prompt and the dense model's own continuation, as token ids. Step t reads position ``len(prompt) - 1 + t``."""

    prompt: list[int]
    continuation: list[int]

    @property
    def read(self) -> list[int]:
        """What the models read: everything but the last token, which nothing follows."""
        return self.prompt + self.continuation[:-1]

    @property
    def positions(self) -> range:
        return range(len(self.prompt) - 1, len(self.prompt) - 1 + len(self.continuation))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(sequences: Sequence[Transcript], device: torch.device) -> Tensor:
    """Right padding: in a causal model no real token sees it, so that no mask is needed and positions are natural."""
    width = max(len(s.read) for s in sequences)
    return torch.tensor([s.read + [s.read[-1]] * (width - len(s.read)) for s in sequences], device=device)


def step_index(sequences: Sequence[Transcript], device: torch.device) -> tuple[Tensor, Tensor]:
    where = [(i, position) for i, s in enumerate(sequences) for position in s.positions]
    return tuple(torch.tensor(column, device=device) for column in zip(*where, strict=True))  # type: ignore[return-value]


def pieces(sequence: Transcript) -> list[Tensor]:
    """The ids ``(1, tokens)`` of a prefill and of every cached forward after it, as many as there are steps."""
    read, first = sequence.read, len(sequence.prompt)
    bounds = [(0, first), *((i, i + 1) for i in range(first, len(read)))]
    return [torch.tensor([read[start:stop]]) for start, stop in bounds]


@cache
def last_place(device: torch.device) -> tuple[Tensor, Tensor]:
    """The index of the last token of a single text, as `step_index` gives it; made once, since a GPU is waited for whenever one is made."""
    return torch.tensor([0], device=device), torch.tensor([-1], device=device)


# --- two models --------------------------------------------------------------------------------------------------------


def run_key(dense: LoadedModel, target: TargetModel, prompts: Sequence[list[int]], *settings: Any) -> str:
    """A hash of everything that decides the rows of a run, so that a resumed one is known to be the same."""
    described = target.describe() if isinstance(target, LoadedModel) else str(target)
    return hashlib.sha256(repr((dense.describe(), described, prompts, settings)).encode()).hexdigest()


def check_comparable(dense: LoadedModel, target: TargetModel) -> None:
    """Raise UserError if the same context does not exist for the two: a dense side that is not whole, another width, depth or vocabulary."""
    if dense.dropped:
        raise UserError(
            f"{dense.ref} has sublayers dropped ({dense.dropped}); the dense side of a comparison must be whole"
        )
    if isinstance(target, DropSpec):
        target.check(len(dense.anatomy))
    if not isinstance(target, LoadedModel):
        return
    check_vocabulary(dense, target)
    ours, theirs = dense.anatomy, target.anatomy
    if ours.hidden_size != theirs.hidden_size:
        raise UserError(
            f"{target.ref} has hidden size {theirs.hidden_size}, {dense.ref} {ours.hidden_size}; the same context exists only for the same width"
        )
    if len(ours) != target.dense_layers:
        raise UserError(
            f"{target.ref} was made from a model of {target.dense_layers} blocks, {dense.ref} has {len(ours)}; compare it with its own dense model"
        )


def check_vocabulary(dense: LoadedModel, target: LoadedModel) -> None:
    """Raise UserError if the two models do not read and write the same tokens."""
    ours, theirs = dense.anatomy, target.anatomy
    if ours.vocab_size != theirs.vocab_size:
        raise UserError(
            f"{target.ref} has a vocabulary of {theirs.vocab_size} tokens, {dense.ref} of {ours.vocab_size}; compare models with the same vocabulary"
        )
    if dense.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise UserError(
            f"the tokenizers of {dense.ref} and {target.ref} differ; compare models with the same vocabulary"
        )


def mark_under_floor(table: pa.Table, floor: dict[str, float]) -> pa.Table:
    """Add one boolean column a space: this row's deviation is not larger than what the dense model gives against itself."""
    for space, column in (("h", "h_cos_dev"), ("z", "z_cos_dev"), ("p", "kl_dense_target")):
        table = table.append_column(f"{space}_under_floor", pc.less_equal(table[column], floor[column]))
    return table


def final_head(loaded: LoadedModel) -> Head:
    """From what the head reads to the model's own logits, logit scale and soft-capping included."""
    anatomy = loaded.anatomy
    bias = getattr(anatomy.head, "bias", None)
    return Head(loaded.head_weight, bias, anatomy.logit_scale, anatomy.logit_softcap)


def check_pair(dense: LoadedModel, target: Changed) -> None:
    """Raise UserError if two models cannot be compared at their heads: a dense side that is not whole, another vocabulary."""
    if not isinstance(target, LoadedModel):
        return check_comparable(dense, target)
    check_comparable(dense, None)
    check_vocabulary(dense, target)


@contextmanager
def switched(dense: LoadedModel, target: Changed) -> Iterator[LoadedModel]:
    """The target's model for the length of a ``with`` block: one of its own, or the dense one changed."""
    if isinstance(target, LoadedModel):
        yield target
    elif isinstance(target, Variant):
        with target.applied() as model:
            yield model
    else:
        with dense.dropping(target):
            yield dense


def check_memory(memory: int, dense: LoadedModel, target: TargetModel = None) -> None:
    """Raise UserError if ``memory`` bytes are too few for the columns of one pair of logits of these models."""
    models = [dense, *([target] if isinstance(target, LoadedModel) else [])]
    least = max(least_memory(final_head(model), at_least_float32(dense.dtype)) for model in models)
    if memory < least:
        raise UserError(f"--memory-mb {memory // 2**20}: this vocabulary needs at least {least // 2**20 + 1}")


# --- states and floors -------------------------------------------------------------------------------------------------


@torch.no_grad()
@any_length()
def read_states(loaded: LoadedModel, sequences: Sequence[Transcript], *, recall: bool = False) -> list[Tensor]:
    """What the head reads at every step of given texts, from one right-padded pass without a cache; of each sequence ``(steps, d)``.

    A model whose weights stay on disk must have read the texts: `prunescope.models.streaming.having_read`.

    Args:
        recall: keep the states in ``loaded.recall``, and take from there what this model has read before; not to be changed in place.
    """
    ids, index = padded(sequences, loaded.device), step_index(sequences, loaded.device)
    if loaded.source is not None:
        found = loaded.source.states(ids)[index]
    else:
        key = loaded.recall.key(loaded.model, "states", str(loaded.dropped), ids, *index) if recall else None
        kept = loaded.recall.get(key)
        if kept is None:
            caught: list[Tensor] = []
            with final_states(loaded, caught.append), headless(loaded):
                loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            kept = (caught[0][index],)
            loaded.recall.put(key, *kept)
        (found,) = kept
    return list(found.split([len(s.continuation) for s in sequences]))


def largest(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest absolute value of every deviation column: a noise floor, where the dense model was compared with itself."""
    return {name: columns[name].abs().max().item() for name in FLOOR_COLUMNS}
