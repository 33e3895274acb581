"""Decoding whose steps never wait for the host: a cache of fixed size, the choice of the token on the device, one CUDA graph a step.

`generate()` builds every step anew in Python and asks the device after each whether the texts have ended; with a batch of a 7B model on a
fast GPU that costs several times what reading the weights costs. Here one step is a fixed list of kernels over fixed buffers: read the
last tokens, run the model, keep the final state, choose, write the tokens. On CUDA the list is captured once a batch and replayed; the
host looks only every `LOOK` steps whether all texts have ended. The prompts are read by the same pass, to the bit, as in `generate()`.

What a model must have for this is tried, not listed: see `prunescope.models.generating.static_problem`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prunescope.models.attending import any_length
from prunescope.models.capturing import on_the_device
from prunescope.models.fusing import fused, write_token
from prunescope.models.loaded import LoadedModel
from prunescope.models.products import Siblings, shared_inputs
from prunescope.models.residual import final_states

__all__ = ["ALIGNMENT", "LOOK", "Decoded", "Kept", "decode", "foreign_cache", "forward_options"]

LOOK = 16  # steps between two looks of the host at whether all texts have ended
ALIGNMENT = 16  # the cache's length is a multiple of it, as attention kernels want their masks


@dataclass
class Decoded:
    """What a batch wrote; after its end a text is filled with padding."""

    tokens: Tensor  # (batch, steps)
    states: Tensor | None  # (steps, batch, d), what the head read


@dataclass
class Kept:
    """What a batch leaves for the next one of the same shape, of a caller who decodes several with one model, one choice and the same ends."""

    shape: tuple[int, ...] = ()
    loop: Any = None
    captured: Any = None
    draws: Tensor | None = None  # what the choice reads, which must stay where it is


class _FixedLayer(CacheLayerMixin):
    """Keys and values of one attention in buffers of fixed size, all positions kept: a sliding window is left to the mask.

    The first call stores a prompt and gives back what it was given, so that prompts are read as with an empty cache. All later calls
    store one token at ``position``, a tensor that all layers share and that the loop advances.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, position: Tensor, length: int) -> None:
        super().__init__()
        self.position, self.length = position, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, given in (
            ("keys", key_states),
            ("values", value_states),
        ):  # zeros: what is masked must still be finite
            batch, heads, _, width = given.shape
            held = getattr(self, name)
            if held is None:
                setattr(self, name, given.new_zeros(batch, heads, self.length, width))
            else:
                held.zero_()
        self.is_initialized = True

    def forget(self) -> None:
        """The next call stores a prompt again, in the same buffers."""
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            tokens = key_states.shape[2]
            self.keys[:, :, :tokens] = key_states
            self.values[:, :, :tokens] = value_states
            return key_states, value_states
        write_token(self.keys, self.values, key_states, value_states, self.position)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return self.position[0] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.length if self.is_initialized else query_length), 0

    def get_max_length(self) -> int:
        return self.length

    get_max_cache_shape = get_max_length


def foreign_cache(config: Any) -> str | None:
    """The kind of a cache layer that the model asks for and that is not plain keys and values; None if all are."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return next(
        (type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) not in known), None
    )


def forward_options(model: Any) -> dict[str, Any]:
    """``logits_to_keep`` for the last position alone, where the model takes it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class _GroupedAttention:
    """Attention of one query token over grouped key/value heads without copying the cache once per query head: the query heads of a group
    are the rows of one query. Older transformers copy where a mask is given. Anything else goes to the function it stands for."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self._mask: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        batch, heads, tokens, width = query.shape
        known = {"dropout", "scaling", "sliding_window", "position_ids", "use_cache", "is_causal"}
        if (
            tokens != 1
            or key.shape[1] == heads
            or attention_mask is None
            or attention_mask.shape[1] != 1
            or {name for name, given in options.items() if given is not None} - known
            or options.get("dropout")
        ):
            return self.plain(module, query, key, value, attention_mask, **options)
        grouped = query.view(batch, key.shape[1], -1, width)
        mask = self._additive(attention_mask, query)
        found = functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, scale=options.get("scaling")
        )
        return found.reshape(batch, 1, heads, value.shape[-1]), None

    def _additive(self, mask: Tensor, like: Tensor) -> Tensor:
        """The mask to add, made once a step: all layers are given the same one."""
        if mask.dtype != torch.bool:
            return mask
        if self._mask is None or self._mask[0] is not mask:
            self._mask = mask, like.new_zeros(mask.shape).masked_fill_(mask.logical_not(), -torch.inf)
        return self._mask[1]


@contextmanager
def _grouped_attention() -> Iterator[None]:
    """`_GroupedAttention` in place of sdpa, for the models of this process, while the block runs."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _GroupedAttention(before)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # ours; what shows now is the library's own
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not before:  # somebody else had replaced that
            ALL_ATTENTION_FUNCTIONS["sdpa"] = before


@contextmanager
def stepping(model: Any, shared: Sequence[Siblings] = ()) -> Iterator[None]:
    """How a step is run, and captured: `_grouped_attention`, fewer kernels (`fused`), nothing that the host is needed for."""
    with _grouped_attention(), on_the_device(model), fused(model, shared):
        yield


class _Loop:
    """The buffers of batches of one shape and one step over them; `restart` keeps every buffer where it is, so that a captured step stays right."""

    def __init__(
        self,
        loaded: LoadedModel,
        batch: int,
        length: int,
        steps: int,
        choose: Callable[[Tensor, Tensor], Tensor],
        ends: Sequence[int],
        pad: int,
        keep_states: bool,
    ) -> None:
        device = loaded.device
        self.loaded, self.choose, self.pad = loaded, choose, pad
        self.options = forward_options(loaded.model)
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the token read last, in the cache
        self.number = torch.zeros(1, dtype=torch.long, device=device)  # of the step
        self.cache = Cache(layers=[_FixedLayer(self.position, length) for _ in loaded.anatomy.blocks])
        self.seen = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.places, self.read, self.tokens = (
            torch.zeros(batch, columns, dtype=torch.long, device=device) for columns in (1, 1, steps)
        )
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.ends = torch.tensor(list(ends), dtype=torch.long, device=device) if ends else None
        self.states: Tensor | None = None
        self.keep, self.steps = keep_states, steps
        self.found: list[Tensor] = []

    def restart(self, ids: Tensor, mask: Tensor) -> None:
        """Read the prompts ``(batch, tokens)``; step 0."""
        for layer in self.cache.layers:
            layer.forget()
        width = ids.shape[1]
        self.position.fill_(width - 1)
        self.number.zero_()
        self.seen.zero_()[:, :width] = mask
        self.tokens.fill_(self.pad)
        self.finished.zero_()
        places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        with any_length():
            self.read.copy_(self._forward(ids, self.seen[:, :width], places)[:, None])
        self.places.copy_(places[:, -1:])

    def step(self) -> None:
        """One token: everything happens in place, so that it can be captured."""
        self.position.add_(1)
        self.places.add_(1)
        self.number.add_(1)
        self.seen.index_fill_(1, self.position, 1)
        self.read.copy_(self._forward(self.read, self.seen, self.places)[:, None])

    def _forward(self, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        self.found.clear()
        out = self.loaded.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
            **self.options,
        )
        if self.keep:
            state = self.found[-1][:, -1]
            if self.states is None:
                self.states = state.new_zeros(self.steps, *state.shape)
            self.states.index_copy_(0, self.number, state[None])
        token = self.choose(out.logits[:, -1].float(), self.number)
        if self.ends is not None:
            token = token.masked_fill(self.finished, self.pad)
            self.finished.logical_or_((token[:, None] == self.ends).any(-1))
        self.tokens.index_copy_(1, self.number, token[:, None])
        return token


@torch.no_grad()
def decode(
    loaded: LoadedModel,
    ids: Tensor,
    mask: Tensor,
    steps: int,
    choose: Callable[[Tensor, Tensor], Tensor],
    *,
    ends: Sequence[int] = (),
    pad: int = 0,
    keep_states: bool = False,
    graph: bool | None = None,
    mark: Callable[[int], None] = lambda step: None,
    kept: Kept | None = None,
) -> Decoded:
    """Continue a left-padded batch.

    Args:
        ids, mask: ``(batch, tokens)``, as `generate()` takes them; every row has a token at the end.
        steps: new tokens at most, at least 1.
        choose: ``(logits (batch, V) float32, step (1,)) -> (batch,)``, all on the device and without asking the host.
        ends: ids that end a text; decoding stops once every text has ended.
        keep_states: return what the head read at every step.
        graph: capture the step in a CUDA graph; by default on a CUDA device.
        mark: called by the host before it starts a step, with the step's number, and once after the last; steps before the first marked
            one read the prompts and prepare.
        kept: where a batch leaves its buffers and its captured step for the next one.
    Raises:
        Exception: whatever the model, or the capture, refuses.
    """
    graph = ids.device.type == "cuda" if graph is None else graph
    batch, length = len(ids), -(-(ids.shape[1] + steps) // ALIGNMENT) * ALIGNMENT
    kept, alone = Kept() if kept is None else kept, kept is None
    if kept.shape != (batch, length, steps):
        kept.loop = kept.captured = None  # before others are made: both hold memory
        kept.shape = batch, length, steps
        kept.loop = _Loop(loaded, batch, length, steps, choose, ends, pad, keep_states)
    loop, captured = kept.loop, kept.captured
    done, next_step = 1, loop.step
    with ExitStack() as stack:
        if keep_states:
            stack.enter_context(final_states(loaded, loop.found.append))
        with shared_inputs(loaded.model) as shared:
            loop.restart(ids, mask)
        stack.enter_context(stepping(loaded.model, shared))
        if graph and steps > 2:
            if captured is None:
                loop_stream = torch.cuda.Stream(ids.device)
                loop_stream.wait_stream(torch.cuda.current_stream(ids.device))
                with torch.cuda.stream(loop_stream):  # step 1 is done as it is, for the libraries to set themselves up
                    loop.step()
                torch.cuda.current_stream(ids.device).wait_stream(loop_stream)
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):
                    loop.step()
                done = 2
            next_step = captured.replay
        for number in range(done, steps):
            if ends and (number % LOOK == 0 or not graph) and bool(loop.finished.all()):
                break
            mark(number)
            next_step()
            done = number + 1
        mark(done)
        loop.found.clear()
    kept.captured = captured
    tokens, states = loop.tokens[:, :done], None if loop.states is None else loop.states[:done]
    if alone:
        return Decoded(tokens, states)
    return Decoded(tokens.clone(), None if states is None else states.clone())
