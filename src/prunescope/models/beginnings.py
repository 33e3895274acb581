"""What several texts begin with, read once: one pass over the beginning, and its keys and values before every text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from prunescope.models.loaded import LoadedModel

__all__ = ["common_beginning", "read_before", "repeated"]

_WORTH = 128  # tokens that need not be read again; of fewer, the pass over the beginning costs a CPU as much


def common_beginning(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with."""
    shortest, first = min(map(len, texts)), texts[0]
    return next((i for i in range(shortest) if any(text[i] != first[i] for text in texts)), shortest)


def repeated(cache: Cache, times: Sequence[int]) -> Cache:
    """A copy of the cache in which row i stands ``times[i]`` times."""
    result = copy.deepcopy(cache)
    result.batch_select_indices(torch.arange(len(times)).repeat_interleave(torch.tensor(times)))
    return result


def read_before(loaded: LoadedModel, ids: Tensor, most: int) -> tuple[int, dict[str, Any]]:
    """Read once what the texts ``(batch, tokens)`` begin with.

    On a CPU alone, where a token costs the same in every batch (a GPU reads a few hundred as fast as one), and only into plain keys and values: a
    window or a state is not cut and joined.

    Args:
        most: how many tokens may be left out of the texts; the states of those behind are asked for.
    Returns:
        How many first tokens to leave out of every text, and the options of the forward pass that goes on after them; 0 and no cache where
        nothing is gained.
    """
    shared = min(common_beginning(ids.tolist()), most)
    plain = {"use_cache": False}
    if loaded.device.type != "cpu" or shared * (len(ids) - 1) < _WORTH:
        return 0, plain
    cache = DynamicCache(config=loaded.model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return 0, plain
    found = loaded.model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
    if found.past_key_values is not cache or {layer.get_seq_length() for layer in cache.layers} != {shared}:
        return 0, plain  # a cache of the model's own
    return shared, {"past_key_values": repeated(cache, [len(ids)]), "use_cache": True}
