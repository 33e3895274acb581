"""What a pruned model saves: parameters, bytes, time of reading a prompt and of writing, against the first model and against the hardware.

Two times are measured for each batch size: *prefill*, one pass over prompts of random tokens, and *decode*, a step that writes one token in
every text, in the way `generate` writes on the device. Beside each stands the time that the device cannot beat: for a step, the weights
that it reads over the measured bandwidth; for a prefill, the operations of its linear layers over the measured rate of a matrix product.
"""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prunescope.errors import UserError
from prunescope.models.decoding import decode, forward_options
from prunescope.models.generating import check_cache, decoding_way, static_problem
from prunescope.models.loaded import LoadedModel
from prunescope.models.semistructured import using_kernels
from prunescope.speed.sizes import bytes_of, cache_bytes, linear_operations, parameters, tensors, unread_bytes
from prunescope.speed.timing import Timing, timed

__all__ = ["Measured", "Workload", "check_length", "forget", "measure", "time_again"]

_PLAIN = "one call a step, growing cache"


@dataclass(frozen=True)
class Workload:
    """What is timed: ``length`` random tokens read, ``max_new_tokens`` written after them, for each batch size ``repeats`` times."""

    batch_sizes: tuple[int, ...]
    length: int
    max_new_tokens: int
    repeats: int
    seed: int
    sparse_kernels: bool


@dataclass
class Measured:
    """A model as it is now, and its times."""

    name: str
    facts: dict[str, Any]  # the columns that do not depend on the batch size
    times: dict[int, tuple[Timing, Timing]]  # by batch size: prefill, one step
    operations: int | None  # of a prompt's linear layers, but for the head; None where not all are linear layers
    head_operations: int


def check_length(loaded: LoadedModel, workload: Workload) -> None:
    """Raise UserError if a model cannot read and write as many tokens as are timed."""
    needed = workload.length + workload.max_new_tokens
    if loaded.context is not None and needed > loaded.context:
        raise UserError(
            f"{loaded.ref}: --length {workload.length} and --max-new-tokens {workload.max_new_tokens} are more than its context of {loaded.context} tokens; ask for less"
        )


def forget(device: torch.device) -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- one model ---------------------------------------------------------------------------------------------------------


def measure(loaded: LoadedModel, name: str, workload: Workload) -> Measured:
    """Sizes and times of ``loaded`` as it is now; ``name`` is the model as the user wrote it."""
    facts = parameters(loaded, name)
    ids = _prompts(loaded, max(workload.batch_sizes), workload)
    operations, head = linear_operations(loaded, ids[:1])
    kernels: Any = using_kernels(loaded) if workload.sparse_kernels else nullcontext([])
    with torch.no_grad(), kernels as sparse:
        held = bytes_of(tensors(loaded.model))
        taken_out = bytes_of(t for module in loaded.taken_out() for t in tensors(module))
        cache = _read(loaded, ids[:1])
        kept = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        facts |= {
            "sparse_layers": len(sparse),
            "memory_bytes": held + taken_out,
            "taken_out_bytes": taken_out,
            "step_bytes": held - unread_bytes(loaded),
            "cache_bytes_per_token": cache_bytes(kept) / ids.shape[1],
            "cached_attentions": len(kept),
            "decoding": _PLAIN if static_problem(loaded) else decoding_way(loaded),
        }
        del cache, kept
        times = {size: _times(loaded, ids[:size], workload) for size in workload.batch_sizes}
    return Measured(name, facts, times, operations, head)


def _times(loaded: LoadedModel, ids: Tensor, workload: Workload) -> tuple[Timing, Timing]:
    device, repeats, steps = loaded.device, workload.repeats, workload.max_new_tokens
    prefill = timed(lambda: _read(loaded, ids), device, repeats, warm_up=2)
    write = _write_plain if static_problem(loaded) else _write_fixed
    write(loaded, ids, steps)
    return prefill, Timing(tuple(write(loaded, ids, steps) for _ in range(repeats)))


def time_again(loaded: LoadedModel, first: Measured, workload: Workload) -> None:
    """Time the first model once more, after what is dropped from it: a machine that has become slower or faster in between widens its spread."""
    ids = _prompts(loaded, max(first.times), workload)
    kernels: Any = using_kernels(loaded) if workload.sparse_kernels else nullcontext()
    with torch.no_grad(), kernels:
        for size, before in first.times.items():
            after = _times(loaded, ids[:size], workload)
            first.times[size] = (before[0].and_then(after[0]), before[1].and_then(after[1]))


def _read(loaded: LoadedModel, ids: Tensor) -> Any:
    """One pass over the prompts, as `generate()` makes it; the cache that it filled."""
    check_cache(loaded)
    cache = DynamicCache(config=loaded.model.config)
    loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, **forward_options(loaded.model))
    return cache


def _write_plain(loaded: LoadedModel, ids: Tensor, steps: int) -> float:
    """Seconds a step, with the model called once a step and the most likely token chosen on the device."""
    cache = _read(loaded, ids)
    token, options = ids[:, -1:], forward_options(loaded.model)

    def all_steps() -> None:
        nonlocal token
        for _ in range(steps - 1):
            out = loaded.model(input_ids=token, past_key_values=cache, use_cache=True, **options)
            token = out.logits[:, -1:].argmax(-1)

    return timed(all_steps, loaded.device, 1, warm_up=0).median / (steps - 1)


def _write_fixed(loaded: LoadedModel, ids: Tensor, steps: int) -> float:
    """The same through `prunescope.models.decoding`, as `generate` writes on a CUDA device."""
    marks: list[tuple[int, float]] = []

    def mark(step: int) -> None:
        if not marks or step == steps:
            torch.cuda.synchronize(loaded.device)
            marks.append((step, time.perf_counter()))

    decode(loaded, ids, torch.ones_like(ids), steps, lambda scores, _: scores.argmax(-1), mark=mark)
    (first, began), (last, ended) = marks
    return (ended - began) / (last - first)


def _prompts(loaded: LoadedModel, batch: int, workload: Workload) -> Tensor:
    """``(batch, length)`` random tokens, the same for all models of a vocabulary."""
    generator = torch.Generator().manual_seed(workload.seed)
    return torch.randint(loaded.anatomy.vocab_size, (batch, workload.length), generator=generator).to(loaded.device)
