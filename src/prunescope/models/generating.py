"""Text from a model in batches whose results do not depend on the batch: through its ordinary `generate()`, and on a CUDA device through
`prunescope.models.decoding`, where a trial of the model shows that both write the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from prunescope.errors import UserError, first_line
from prunescope.models.capturing import trial_rows
from prunescope.models.decoding import ALIGNMENT, Kept, decode, foreign_cache, forward_options
from prunescope.models.loaded import LoadedModel
from prunescope.models.placing import is_sharded
from prunescope.models.residual import final_states

__all__ = [
    "Sampling",
    "batches",
    "by_length",
    "check_cache",
    "choose",
    "continue_texts",
    "decoding_way",
    "end_tokens",
    "rows_at_a_time",
    "static_problem",
    "texts_at_a_time",
    "uniform_draws",
]

_TRIAL_STEPS = 4
_SLOW_ROWS = range(9, 16)  # of a float32 product take MKL longer than `_QUICK_ROWS`, 15 rows twice as long
_QUICK_ROWS = 16
_CPU_ROWS, _CPU_CACHE = (
    32,
    2**29,
)  # a product of 8 rows takes a CPU as long as one of 16, and 0.7 times as long as one of 32
_GPU_ROWS = 1024
_BLOCK = 512  # probabilities whose sum `choose` looks at before it looks at them
_CHOOSING = 40  # bytes a word: logits 2 or 4, as float32 4, divided by the temperature 4, float64 8; in the captured step, and before it


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is greedy; it has nothing to do with the metric temperature."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature}: it cannot be negative; 0 is greedy")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"--top-k {self.top_k} --top-p {self.top_p}: top-k must be 0 (off) or more, top-p in (0, 1]"
            )


def uniform_draws(sampling: Sampling, prompts: Sequence[int], steps: int) -> Tensor:
    """``(prompts, steps)`` float64 uniform numbers: those of a prompt follow from the seed and its number alone."""
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + i) for i in prompts]
    return torch.stack([torch.rand(steps, generator=generator, dtype=torch.float64) for generator in generators])


def choose(scores: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """The token of each row of logits ``(rows, V)``: the most likely if greedy, else where ``draws`` (rows,) falls in the cumulated
    distribution. The same draw chooses the same token from the same distribution, whatever the batch, the device or the model."""
    if not sampling.temperature:
        return scores.argmax(-1)
    scaled = scores.float() / sampling.temperature
    p = (scaled - scaled.amax(-1, keepdim=True).double()).exp_()  # float64, and a softmax but for its divisor
    if sampling.top_k:
        p = p.where(p >= p.topk(min(sampling.top_k, p.shape[-1]), -1).values[:, -1:], 0)
    if sampling.top_p < 1:
        falling = p.sort(-1, descending=True).values
        before = falling.cumsum(-1) - falling
        least = falling.where(before < sampling.top_p * p.sum(-1, keepdim=True), torch.inf).amin(-1, keepdim=True)
        p = p.where(p >= least, 0)
    whole = p.shape[-1] // _BLOCK
    body, tail = p[:, : whole * _BLOCK], p[:, whole * _BLOCK :]
    sums = torch.cat([body.unflatten(-1, (whole, _BLOCK)).sum(-1), tail.sum(-1, keepdim=True)], -1)  # (rows, blocks)
    block, rest = _fall(sums, draws[:, None].to(p.device) * sums.sum(-1, keepdim=True))
    places = block * _BLOCK + torch.arange(_BLOCK, device=p.device)
    within = p.gather(-1, places.clamp(max=p.shape[-1] - 1)) * (places < p.shape[-1])
    return (block * _BLOCK + _fall(within, rest)[0])[:, 0]


def _fall(parts: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Of parts of a mass ``(rows, n)`` and a place in it ``(rows, 1)``: the number of the part in which it falls and how far into that part, both
    ``(rows, 1)``. Where rounding puts it past the end it is the last part; it is never one of no mass."""
    mass, number = parts.cumsum(-1), torch.arange(parts.shape[-1], device=parts.device)
    # 0 without mass; 1 to n before the place, the last most; above n past it, the first most
    rank = (parts > 0) * (number + 1 + (mass > at) * 2 * (len(number) - number))
    found = rank.argmax(-1, keepdim=True)
    return found, at - (mass.gather(-1, found) - parts.gather(-1, found))


class _SharedDraws(LogitsProcessor):
    """Leaves one token: that which `choose` takes with the uniform number of this prompt and step."""

    def __init__(self, sampling: Sampling, draws: Tensor) -> None:
        self.sampling, self.draws, self.step = sampling, draws, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (batch, tokens), (batch, vocab)
        token = choose(scores, self.sampling, self.draws[:, self.step])
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, token[:, None], 0.0)


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Ids that end a text: those of the generation config (chat ends too), else of the tokenizer. May be empty."""
    ids = loaded.model.generation_config.eos_token_id if loaded.model.generation_config else None
    ids = loaded.tokenizer.eos_token_id if ids is None else ids
    return [ids] if isinstance(ids, int) else list(ids or [])


def continue_texts(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int | None,
    sampling: Sampling = Sampling(),
    stop: bool = True,
    numbers: Sequence[int] | None = None,
    advance: Callable[[int], None] = lambda done: None,
    see: Callable[[Tensor], None] | None = None,
    recall: bool = False,
) -> list[list[int]]:
    """Continue each prompt as `generate()` does: left-padded batches, key/value cache, no hidden settings of the model's generation config.
    Prompts of about the same length are written together, so that little is padded, unless ``see`` is given.

    Args:
        prompts: token ids, at least one a prompt.
        max_new_tokens: at most so many new tokens each.
        stop: end a text at an end-of-text token, which is kept as its last token.
        numbers: of the prompts, from which the uniform draws of sampling follow; by default 0, 1, ...
        batch_size: prompts at a time, by default as many as `texts_at_a_time` says; on a CPU up to `_CPU_ROWS` where their cache is small,
            unless ``see`` is given.
        advance: told how many prompts are done, batch by batch.
        see: given what the head read, ``(steps, batch, d)``, batch by batch; a text that has ended leaves what follows it without meaning.
        recall: keep what is written, with its states, in ``loaded.recall``, and take from there what this model has written before.
    Returns:
        The new token ids of each prompt, in the order of the prompts.
    Raises:
        UserError: transformers cannot keep a cache of this model.
    """
    check_cache(loaded)
    ends = end_tokens(loaded) if stop else []
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else 0
    fitting = texts_at_a_time(loaded, max_new_tokens, batch_size)
    lengths = [len(prompt) for prompt in prompts]
    if see is None:
        together = list(
            by_length(lengths, lambda longest: rows_at_a_time(loaded, fitting(longest), longest + max_new_tokens))
        )
        if len(together) == 1:  # in the order of a caller who wants the states: found again in ``recall``
            together = [range(len(prompts))]
    else:
        together = list(batches(range(len(prompts)), fitting(max(lengths, default=0))))
    numbers = range(len(prompts)) if numbers is None else numbers
    results: list[list[int]] = [[] for _ in prompts]
    kept = Kept()
    for chosen in together:
        ids, mask = _left_padded([prompts[i] for i in chosen], pad, loaded.device)
        draws = uniform_draws(sampling, [numbers[i] for i in chosen], max_new_tokens)
        static = static_problem(loaded) is None
        write = partial(_write_static, kept=kept) if static else _write_plain
        if recall:
            write = partial(_recalled, write=write, static=static)
        rows, states = write(loaded, ids, mask, max_new_tokens, sampling, draws, ends, pad, see is not None)
        for i, row in zip(chosen, rows.tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            results[i] = row[:length]
        if see is not None and states is not None:
            see(states)
        advance(len(chosen))
    return results


def _recalled(
    loaded: LoadedModel, ids: Tensor, mask: Tensor, steps: int, sampling: Sampling, draws: Tensor, ends: list[int], pad: int, keep: bool,
    write: Callable[..., _Batch], static: bool,
) -> _Batch:  # fmt: skip
    """What ``write`` gives, or gave before. `generate()` makes the same of its first steps however many follow, so that a longer text holds the shorter
    ones; a fixed cache is as long as the text, and its kernels may be others."""
    recall, chosen = loaded.recall, draws if sampling.temperature else None
    key = None
    if len(ids) * steps * loaded.anatomy.hidden_size * loaded.dtype.itemsize <= recall.limit:  # the states
        what = (str(loaded.dropped), ids, mask, steps if static else None, sampling, ends, pad)
        key = recall.key(loaded.model, "text", *what)
    if (found := recall.get(key)) is not None:
        tokens, states, drawn = found
        known = drawn.shape[1]  # steps that were asked for
        if known >= steps and (chosen is None or torch.equal(drawn[:, :steps], chosen)):
            return tokens[:, :steps], states[:steps]
    rows, seen = write(loaded, ids, mask, steps, sampling, draws, ends, pad, key is not None or keep)
    if seen is not None:
        recall.put(key, rows, seen, draws)
    return rows, seen


def rows_at_a_time(loaded: LoadedModel, batch_size: int, tokens: int) -> int:
    """Prompts of ``tokens`` that are written together: more than asked for on a CPU, as long as keys and values stay below `_CPU_CACHE`."""
    if loaded.device.type != "cpu":
        return batch_size
    cached = 2 * len(loaded.anatomy) * loaded.anatomy.hidden_size * loaded.dtype.itemsize * tokens
    return max(batch_size, min(_CPU_ROWS, _CPU_CACHE // cached))


def check_cache(loaded: LoadedModel) -> None:
    """Raise UserError where every layer is linear attention: the caches of transformers 5.23 count tokens in an ordinary layer alone."""
    kinds = getattr(loaded.model.config.get_text_config(decoder=True), "layer_types", None)
    if kinds and set(kinds) == {"linear_attention"}:
        raise UserError(f"{loaded.ref}: all of its layers are linear attention, of which transformers keeps no cache that can count; it cannot write here, only drop and sparsify with a text as --calibration")  # fmt: skip


@torch.no_grad()
def texts_at_a_time(loaded: LoadedModel, new_tokens: int, asked: int | None = None) -> Callable[[int], int]:
    """How many texts are written together, by the length of the longest prompt among them: as many as are ``asked`` for; else 32 on a CPU, and on a
    GPU up to `_GPU_ROWS`, as long as what they hold (`_text_bytes`) is at most a quarter of the free memory."""
    if asked is not None or loaded.device.type != "cuda":
        return lambda longest: asked or 32
    unused = torch.cuda.memory_reserved(loaded.device) - torch.cuda.memory_allocated(loaded.device)
    free = torch.cuda.mem_get_info(loaded.device)[0] + unused
    text = _text_bytes(loaded, new_tokens)
    return lambda longest: _round_down(min(_GPU_ROWS, int(free // 4 // text(longest))))


def _text_bytes(loaded: LoadedModel, new_tokens: int) -> Callable[[int], int]:
    """What a text holds while it is written, by the length of its prompt: keys and values, the probabilities among which a step chooses, and what
    a block and the head make of its prompt while they read it."""
    first = loaded.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=loaded.device), use_cache=True)
    layers = getattr(first.past_key_values, "layers", [])
    parts = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    cached = sum(int(part.nbytes) for part in parts if part is not None)
    anatomy = loaded.anatomy
    matrices = (p for block in anatomy.blocks for p in block.module.parameters() if p.dim() > 1)
    widest = max((size for matrix in matrices for size in matrix.shape[-2:]), default=0)
    read: int = loaded.dtype.itemsize * (8 * anatomy.hidden_size + 3 * widest)
    if not forward_options(loaded.model):  # logits of the whole prompt
        read += first.logits.element_size() * anatomy.vocab_size

    def text(longest: int) -> int:
        places = -(-(longest + new_tokens) // ALIGNMENT) * ALIGNMENT
        return cached * places + read * longest + _CHOOSING * anatomy.vocab_size

    return text


def _round_down(count: int) -> int:
    """To a power of two or one and a half: a little less free memory than yesterday leaves the batches, and what is kept of them, as they are."""
    power = 1 << max(1, count).bit_length() - 1
    return power + power // 2 if power + power // 2 <= count else power


_Batch = tuple[Tensor, Tensor | None]  # new tokens (batch, steps), states (steps, batch, d) if asked for


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, ``(batch, tokens)``."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)


def _write_plain(
    loaded: LoadedModel, ids: Tensor, mask: Tensor, steps: int, sampling: Sampling, draws: Tensor, ends: list[int], pad: int, keep: bool
) -> _Batch:  # fmt: skip
    """A batch through the model's own `generate()`, which calls the model once a step."""
    count = len(ids)
    if loaded.device.type == "cpu" and loaded.dtype == torch.float32 and count in _SLOW_ROWS:
        # the last text more often; what it writes then is left out
        rows = torch.arange(_QUICK_ROWS).clamp(max=count - 1)
        ids, mask, draws = ids[rows], mask[rows], draws[rows]
    processors = LogitsProcessorList([_SharedDraws(sampling, draws)] if sampling.temperature else [])
    config = GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=ends or None, pad_token_id=pad)
    states: list[Tensor] = []
    watched = final_states(loaded, lambda found: states.append(found[:count, -1].clone())) if keep else nullcontext()
    with torch.no_grad(), _only(loaded.model, config), watched:
        out = loaded.model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=processors)
    return out[:count, ids.shape[1] :], torch.stack(states) if keep else None


def _write_static(
    loaded: LoadedModel, ids: Tensor, mask: Tensor, steps: int, sampling: Sampling, draws: Tensor, ends: list[int], pad: int, keep: bool,
    kept: Kept | None = None,
) -> _Batch:  # fmt: skip
    """The same through `decode`. ``kept`` is for the batches of one call: what a captured step reads must stay where it is."""
    kept = Kept() if kept is None else kept
    if kept.draws is None or kept.draws.shape != draws.shape:
        kept.draws = draws.to(ids.device, copy=True)
    held = kept.draws.copy_(draws)

    def take(scores: Tensor, step: Tensor) -> Tensor:
        return choose(scores, sampling, held.index_select(1, step)[:, 0])

    found = decode(loaded, ids, mask, steps, take, ends=ends, pad=pad, keep_states=keep, kept=kept)
    return found.tokens, found.states


# --- which way -----------------------------------------------------------------------------------------------------------


def decoding_way(loaded: LoadedModel) -> str:
    """In words, how `continue_texts` lets this model write on its device, as it is now."""
    problem = static_problem(loaded)
    return "fixed cache, CUDA graph" if problem is None else f"generate(): {problem}"


def static_problem(loaded: LoadedModel) -> str | None:
    """Why a model, as it is now, cannot write through `decode`; None if it can.

    On a CUDA device both ways write a few tokens once, for each list of dropped sublayers, and the states of every step must agree.
    """
    if loaded.device.type != "cuda":
        return f"a fixed cache pays on a CUDA device only, this is {loaded.device.type}"
    if is_sharded(loaded.model):
        return "its weights lie on several GPUs"
    key = str(loaded.dropped)
    if key not in loaded.decoding:
        loaded.decoding[key] = try_static(loaded)
    return loaded.decoding[key]


def try_static(loaded: LoadedModel) -> str | None:
    """Let both ways write; why they cannot be exchanged, or None."""
    if kind := foreign_cache(loaded.model.config):
        return f"its cache has a layer of kind {kind}"
    if sum(len(drop.spec.attn) for drop in loaded._drops) == len(loaded.anatomy):
        return "no attention is left, so that nothing is cached"
    for rows in sorted({2, max(2, trial_rows(loaded.model))}):  # few texts and many may be other operations
        if problem := _differing(loaded, rows):
            return problem
    return None


def _differing(loaded: LoadedModel, rows: int) -> str | None:
    vocab = loaded.anatomy.vocab_size
    prompts = [[(17 + 31 * i + 7 * row) % vocab for i in range(7 if row else 3)] for row in range(rows)]
    ids, mask = _left_padded(prompts, 0, loaded.device)
    how: Any = (ids, mask, _TRIAL_STEPS, Sampling(), torch.zeros(rows, _TRIAL_STEPS), [], 0, True)
    try:
        tokens, states = _write_static(loaded, *how)
    except Exception as error:  # whatever a model or a capture refuses
        return f"{type(error).__name__}: {first_line(error)}"
    expected_tokens, expected = _write_plain(loaded, *how)
    assert states is not None and expected is not None
    alike = (tokens == expected_tokens).cumprod(1).roll(1, 1)  # (batch, steps): both have read the same
    alike[:, 0] = 1
    differences = (states.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    worst = float((differences * alike.T).max())
    bound = max(1e-4, 16 * torch.finfo(expected.dtype).eps)
    return None if worst <= bound else f"its states differ from those of generate() by {worst:.1e} relative"


def batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def by_length(lengths: Sequence[int], rows: Callable[[int], int]) -> Iterator[Sequence[int]]:
    """Numbers of all texts in batches, the longest first, equal ones in their order; ``rows`` says how many by the longest of a batch."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(1, rows(lengths[order[0]]))
        yield order[:count]
        order = order[count:]


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate()` fills unset fields from the model's own generation config (penalties, top-p, ...): take it away for a moment."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
