"""The dense model's texts, written by one process or by several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prunescope.compare.context import TargetModel
from prunescope.models.generating import Sampling, batches, continue_texts, rows_at_a_time
from prunescope.models.loaded import LoadedModel
from prunescope.progress import progress
from prunescope.runs.workers import Compute, Workers, gathered, sharing

__all__ = ["written_texts"]


def written_texts(
    dense: LoadedModel, prompts: Sequence[list[int]], steps: int, sampling: Sampling, stop: bool, batch_size: int, workers: Workers | None
) -> list[list[int]]:  # fmt: skip
    """What the dense model writes after each prompt."""
    make = partial(_writer, prompts=prompts, steps=steps, sampling=sampling, stop=stop)
    batch_size = rows_at_a_time(dense, batch_size, max(map(len, prompts), default=0) + steps)
    with progress(f"{dense.ref} writes {len(prompts)} continuations of up to {steps} tokens", len(prompts)) as advance:
        numbers = list(batches(range(len(prompts)), batch_size))
        found = gathered(sharing(workers, make), numbers, make(dense, None), lambda texts: advance(len(texts)))
    return [text for texts in found for text in texts]


def _writer(
    dense: LoadedModel, _: TargetModel, *, prompts: Sequence[list[int]], steps: int, sampling: Sampling, stop: bool
) -> Compute:
    """Numbers of prompts -> their continuations."""
    return lambda batch: continue_texts(
        dense,
        [prompts[i] for i in batch],
        steps,
        batch_size=len(batch),
        sampling=sampling,
        stop=stop,
        numbers=batch,
        recall=True,
    )
