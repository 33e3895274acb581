"""How far a pruned model is from the dense one in h, z and p, for every point of a sweep: on the dense model's own texts.

The dense model writes once. Every point then reads the same tokens (teacher-forced), in one pass a batch without a cache, and is compared at every
step at the heads, as `prunescope generate` does it. What is kept of the dense model are its texts and the states that its head read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prunescope.compare.columns import DEFAULT_MEMORY, compare_final, least_memory
from prunescope.compare.context import Transcript, at_least_float32, final_head, read_states
from prunescope.compare.familiar import Rung, remembered_ladder, usual_ladder
from prunescope.compare.metrics import COLUMNS, FLOOR_COLUMNS, SPACES
from prunescope.errors import UserError
from prunescope.models.generating import batches, continue_texts
from prunescope.models.loaded import LoadedModel
from prunescope.models.variants import Variant
from prunescope.runs.summary import summarise
from prunescope.stats import Z95
from prunescope.sweep.advice import AGREEMENT
from prunescope.tasks.scores import ITEMS_SCHEMA

__all__ = ["DenseReference", "ladder_of", "write_texts"]

_FLOOR_TEXTS = 2


def write_texts(
    dense: LoadedModel, prompts: Sequence[list[int]], max_new_tokens: int, *, batch_size: int, recall: bool = True
) -> list[Transcript]:
    """What the dense model writes after each prompt, greedily, to its end or to ``max_new_tokens``; ``recall`` as in `continue_texts`."""
    texts = continue_texts(dense, prompts, max_new_tokens, batch_size=batch_size, recall=recall)
    return [Transcript(list(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]


def _key(tokens: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(tokens)).encode()).hexdigest()[:16]


class DenseReference:
    """The dense model's texts and states, which every pruned model is compared with."""

    def __init__(
        self,
        dense: LoadedModel,
        texts: Sequence[Transcript],
        *,
        batch_size: int = 8,
        temperature: float = 1.0,
        memory: int = DEFAULT_MEMORY,
        seed: int = 0,
    ) -> None:
        self.texts, self.batch_size, self.temperature, self.seed = list(texts), batch_size, temperature, seed
        least = least_memory(final_head(dense), at_least_float32(dense.dtype))
        self.memory = max(memory, least)
        self.states = self._read(dense, recall=True)
        self._owner = torch.cat([torch.full((len(t.continuation),), i) for i, t in enumerate(self.texts)])
        self._next = torch.tensor([token for text in self.texts for token in text.continuation])

    def _read(self, loaded: LoadedModel, *, recall: bool = False) -> Tensor:
        """``(steps of all texts, d)``."""
        return torch.cat(
            [
                states
                for chosen in batches(range(len(self.texts)), self.batch_size)
                for states in read_states(loaded, [self.texts[i] for i in chosen], recall=recall)
            ]
        )

    def measure(self, loaded: LoadedModel, dense: LoadedModel | None = None) -> dict[str, dict[str, Any]]:
        """Per space and column the summary over all steps, as in every run folder; see `compare`."""
        return self.summary(self.compare(loaded, dense))

    def summary(self, table: pa.Table) -> dict[str, dict[str, Any]]:
        """Of what `compare` gives."""
        return summarise(table, SPACES, seed=self.seed)

    def agreement(self, table: pa.Table) -> pa.Table:
        """The task `AGREEMENT` of what `compare` gives, a row per text: the share of its tokens that are most likely to both models."""
        owner, same = np.asarray(table["prompt"]), np.asarray(table["top1_agree"], float)
        rows = [
            {"task": AGREEMENT, "kind": "generative", "item": i, "key": _key(text.prompt), "metric": "top1_agree"}
            | {"score": float(same[owner == i].mean()), "prediction": "", "gold": ""}
            for i, text in enumerate(self.texts)
            if (owner == i).any()
        ]
        return pa.Table.from_pylist(rows, schema=ITEMS_SCHEMA)

    def compare(self, loaded: LoadedModel, dense: LoadedModel | None = None) -> pa.Table:
        """A row per step of every text, with ``prompt`` and all columns: ``loaded`` as it stands now against the dense model.

        Args:
            dense: the dense model, where ``loaded`` is not that one changed in place and so may have another head.
        Raises:
            UserError: its logits are not numbers.
        """
        head = final_head(loaded)
        try:
            columns = compare_final(
                self.states,
                self._read(loaded),
                head if dense is None else final_head(dense),
                head,
                temperature=self.temperature,
                next_token=self._next,
                memory=self.memory,
            )
        except FloatingPointError as error:
            raise UserError(
                f"{loaded.ref}: {error}; the activations overflow in {loaded.dtype}, try --dtype float32"
            ) from error
        return pa.table(
            {"prompt": self._owner.numpy()} | {name: columns[name].numpy() for name in COLUMNS if name in columns}
        )

    def rung(self, variant: Variant) -> tuple[float, float]:
        """Mean KL over the steps, and its standard error from the interval over prompts."""
        with variant.applied() as quantised:
            stats = self.measure(quantised)["p"]["kl_dense_target"]
        low, high = stats["ci95"]
        return stats["mean"], (high - low) / (2 * Z95) if low is not None else math.nan

    def floor(self, loaded: LoadedModel) -> dict[str, Any]:
        """The dense model against itself: two texts alone against in their batch. ``loaded`` must be dense."""
        few = self.texts[:_FLOOR_TEXTS]
        alone = torch.cat([read_states(loaded, [text], recall=True)[0] for text in few])
        head = final_head(loaded)
        columns = compare_final(
            self.states[: len(alone)], alone, head, head, temperature=self.temperature, memory=self.memory
        )
        return {
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "prompts": len(few),
            "steps": len(alone),
            "way": "read alone, against in a batch",
            "floor": {name: columns[name].abs().max().item() for name in FLOOR_COLUMNS},
        }


def ladder_of(
    dense: LoadedModel,
    texts: Sequence[Transcript],
    types: Sequence[str] | None,
    *,
    batch_size: int = 8,
    temperature: float = 1.0,
    cache: Path | None = None,
) -> list[Rung]:
    """The dense model's rungs on what it wrote: ``types``, measured where the cache lacks them; where that is None, the usual ones that it has.

    Raises:
        UserError: a type that is unknown or cannot be made here.
    """
    text = hashlib.sha256(repr([(t.prompt, t.continuation) for t in texts]).encode()).hexdigest()
    if types is None:
        return remembered_ladder(dense, text, usual_ladder(), None, temperature=temperature, cache=cache)
    reference: list[DenseReference] = []  # read when the first rung is missing

    def measure(variant: Variant) -> tuple[float, float]:
        if not reference:
            reference.append(DenseReference(dense, texts, batch_size=batch_size, temperature=temperature))
        return reference[0].rung(variant)

    return remembered_ladder(dense, text, types, measure, temperature=temperature, cache=cache)
