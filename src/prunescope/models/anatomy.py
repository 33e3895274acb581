"""Where the blocks, residual branches, norms and head of a causal LM are: the only place that knows about architectures.

Nothing here is a table of model families. One short probe is run through the model, the tensors that flow between the
children of each block are followed by their storage, and a block is understood as

    stream -> [pre-norm] -> attention -> [post-norm] -> * scale -> + stream -> [pre-norm] -> MLP -> [post-norm] -> * scale -> + stream

or its parallel form, in which both branches read the same stream. What was found is then checked on the same probe: stream
before + branch output must equal the stream after, at every sublayer, and head(norm(last stream)) must equal the model's
logits. A model that does not fit raises `UserError` with the reason; it is never half-understood.

A new family usually needs nothing. If it multiplies its branches or its logits, add the name of its config field to
`RESIDUAL_SCALES` or `_logit_transform`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prunescope.errors import UserError
from prunescope.models.finding import (
    attention_of,
    find_blocks,
    first_output,
    first_tensor,
    given_residual,
    hooks,
    sum_of,
)

__all__ = [
    "KINDS",
    "Anatomy",
    "Block",
    "Kind",
    "Sublayer",
    "find_anatomy",
    "probe_ids",
]

Kind = Literal["attn", "mlp"]
KINDS: tuple[Kind, Kind] = ("attn", "mlp")

RESIDUAL_SCALES = (
    "residual_multiplier",
    "residual_scale",
)  # block attributes that multiply each branch (Granite, MiniCPM3)
_PROBE_TOKENS = 7


@dataclass(frozen=True)
class Sublayer:
    """One residual branch, whole. Its contribution to the stream is ``scale * output of exit``."""

    layer: int
    kind: Kind
    modules: tuple[nn.Module, ...]  # the attention or MLP itself; two for OPT, whose MLP is two bare linears
    pre: nn.Module | None
    post: nn.Module | None
    shares_pre: bool  # the other branch reads the same pre-norm
    scale: float
    returns: int  # length of the tuple that the last module returns, 0 for a bare tensor
    summed: bool = (
        False  # the modules read the same input and their outputs are added (MoE beside a dense MLP), not chained
    )
    fused: bool = False  # the last module is given the stream and adds it itself (BLOOM, MPT)

    @property
    def entry(self) -> nn.Module:
        """The module whose first argument is the residual stream."""
        return self.pre or self.modules[0]

    @property
    def exit(self) -> nn.Module:
        """The module whose output, times scale, is added to the residual stream."""
        return self.post or self.modules[-1]

    @property
    def exits(self) -> tuple[nn.Module, ...]:
        """The modules whose outputs together are what `exit` stands for."""
        return self.modules if self.summed else (self.exit,)

    @property
    def name(self) -> str:
        return f"{self.kind} of layer {self.layer}"


@dataclass(frozen=True)
class Block:
    module: nn.Module
    attn: Sublayer
    mlp: Sublayer
    parallel: bool
    returns: int  # length of the tuple that the block returns, 0 for a bare tensor

    def sublayer(self, kind: Kind) -> Sublayer:
        return self.attn if kind == "attn" else self.mlp


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that prunescope works on; positions in ``blocks`` are the model's own layer numbers."""

    decoder: nn.Module  # the module that runs the blocks and receives the cache
    blocks: tuple[Block, ...]
    block_list: nn.ModuleList
    final_norm: nn.Module | None
    head: nn.Module
    logit_scale: float
    logit_softcap: float | None
    hidden_size: int
    vocab_size: int

    def sublayers(self) -> Iterator[Sublayer]:
        for block in self.blocks:
            yield block.attn
            yield block.mlp

    def logits(self, stream: Tensor) -> Tensor:
        """The model's logits ``(..., V)`` from the stream ``(..., d)`` after its last block."""
        return self.project(self.final_norm(stream) if self.final_norm else stream)

    def project(self, h: Tensor) -> Tensor:
        """The model's logits ``(..., V)`` from what its head reads ``(..., d)``: the stream after the final norm."""
        z: Tensor = self.head(h)
        z = z if self.logit_scale == 1 else z * self.logit_scale
        return z if self.logit_softcap is None else torch.tanh(z / self.logit_softcap) * self.logit_softcap

    def __len__(self) -> int:
        return len(self.blocks)


# --- finding -----------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One call of a block's child during the probe. Tensors are kept alive, so that a storage names a value."""

    name: str
    module: nn.Module
    entering: Tensor
    leaving: Tensor
    returns: int
    entering_value: Tensor
    leaving_value: Tensor  # without the stream, where the module adds it
    fused: bool


class _Stream(NamedTuple):
    """The residual stream into and out of one block during the probe."""

    entering: Tensor
    leaving: Tensor
    before: Tensor  # values, as they were at the time
    after: Tensor
    returns: int


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find and check the parts of a transformers causal LM.

    Args:
        model: a model with ``config``, ``get_input_embeddings`` and ``get_output_embeddings``, in eval mode. Run twice on a
            few tokens, without a cache; its weights and state are not changed.
    Raises:
        UserError: the structure is not found, or the check on the probe fails; the message names the place.
    """
    name = type(model).__name__
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(f"{name} has no output head: prunescope needs a causal language model")
    parent, block_list = find_blocks(model)
    scale, softcap = _logit_transform(text_config)

    probe = probe_ids(model)
    calls: list[list[_Call]] = [[] for _ in block_list]
    blocks_io: list[_Stream] = []
    last_norm: list[tuple[nn.Module, Tensor, Tensor]] = []
    with hooks() as handles, torch.no_grad():
        for i, module in enumerate(block_list):
            for child_name, child in module.named_children():
                handles.append(child.register_forward_hook(_recorder(calls[i], child_name), with_kwargs=True))
            handles.append(module.register_forward_hook(_block_recorder(blocks_io), with_kwargs=True))
        for child in parent.children():
            if _is_norm(child):
                handles.append(child.register_forward_hook(_norm_recorder(last_norm), with_kwargs=True))
        try:
            logits = model(input_ids=probe, use_cache=False).logits
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{name} cannot be run on a probe of {_PROBE_TOKENS} tokens: {type(error).__name__}: {error}"
            ) from error
    if len(blocks_io) != len(block_list):
        raise UserError(
            f"{name}: {len(block_list)} blocks were found but {len(blocks_io)} ran; this architecture is not supported"
        )

    if not all(torch.isfinite(stream.after).all() for stream in blocks_io):
        raise UserError(f"{name}: activations overflow in {logits.dtype} on a probe; try --dtype float32")
    blocks = []
    for i, module in enumerate(block_list):
        blocks.append(_understand_block(i, module, calls[i], blocks_io[i], name))
    final_norm = next((module for module, entering, _ in last_norm if torch.equal(entering, blocks_io[-1].after)), None)
    anatomy = Anatomy(
        decoder=parent,
        blocks=tuple(blocks),
        block_list=block_list,
        final_norm=final_norm,
        head=head,
        logit_scale=scale,
        logit_softcap=softcap,
        hidden_size=blocks_io[0].before.shape[-1],
        vocab_size=head.weight.shape[0],
    )
    return _with_logits(anatomy, blocks_io[-1].after, logits, name)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def probe_ids(model: nn.Module) -> Tensor:
    """A few different token ids ``(1, tokens)``, the same for every run: what a model is checked with."""
    vocab = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = [(17 + 31 * i) % vocab for i in range(_PROBE_TOKENS)]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return torch.tensor([ids], device=embedding.weight.device)


def _recorder(calls: list[_Call], name: str) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entering, leaving = first_tensor(args, kwargs), first_output(output)
        returns = len(output) if isinstance(output, tuple) else 0
        residual = given_residual(module, args, kwargs)
        adds = leaving.clone() if residual is None else leaving - residual.to(leaving.device)
        calls.append(_Call(name, module, entering, leaving, returns, entering.clone(), adds, residual is not None))

    return record


def _block_recorder(seen: list[_Stream]) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entering, leaving = first_tensor(args, kwargs), first_output(output)
        returns = len(output) if isinstance(output, tuple) else 0
        seen.append(_Stream(entering, leaving, entering.clone(), leaving.clone(), returns))

    return record


def _norm_recorder(seen: list[tuple[nn.Module, Tensor, Tensor]]) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((module, first_tensor(args, kwargs).clone(), first_output(output).clone()))

    return record


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, whatever their shapes (OPT reshapes the stream in between)."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _understand_block(layer: int, module: nn.Module, calls: list[_Call], stream: _Stream, name: str) -> Block:
    def unsupported(reason: str) -> UserError:
        return UserError(f"{name}, layer {layer}: {reason}; this architecture is not supported")

    before, _, before_value, after_value, returns = stream
    attention = attention_of(module)
    if attention is None:
        raise unsupported("no single attention module with a layer_idx")
    attn_calls = [call for call in calls if call.module is attention[1]]
    norms = [call for call in calls if _is_norm(call.module)]
    rest = [call for call in calls if call.module is not attention[1] and not _is_norm(call.module)]
    mlp_calls = [
        call for call in rest if any(t.dim() >= 2 for t in (*call.module.parameters(), *call.module.buffers()))
    ]  # packed weights may be buffers
    if len(attn_calls) != 1:
        raise unsupported(f"its attention ran {len(attn_calls)} times")
    if not mlp_calls:
        raise unsupported("no MLP ran beside its attention")
    scale = _scale_of(module)

    def branch(kind: Kind, first: _Call, last: _Call, modules: tuple[nn.Module, ...]) -> tuple[Sublayer, _Call, _Call]:
        pre = next((norm for norm in norms if _same(norm.leaving, first.entering)), None)
        post = next((norm for norm in norms if _same(norm.entering, last.leaving) and norm is not pre), None)
        if last.fused:  # what it gives is the stream, so that a norm after it is the next branch's
            post = None
        pre_module, post_module = pre and pre.module, post and post.module
        part = Sublayer(layer, kind, modules, pre_module, post_module, False, scale, last.returns, fused=last.fused)
        return part, pre or first, post or last

    attn, attn_in, attn_out = branch("attn", attn_calls[0], attn_calls[0], (attention[1],))
    mlp, mlp_in, mlp_out = branch("mlp", mlp_calls[0], mlp_calls[-1], tuple(call.module for call in mlp_calls))
    if len(mlp_calls) > 1 and all(_same(call.entering, mlp_calls[0].entering) for call in mlp_calls):
        if mlp.post is not None or any(call.returns or call.fused for call in mlp_calls):
            raise unsupported("its MLP has several parts that are not simply added")
        mlp = replace(mlp, summed=True)
        mlp_out = mlp_out._replace(
            leaving_value=sum_of([call.leaving_value.view_as(before_value) for call in mlp_calls])
        )
    shared = attn.pre is not None and attn.pre is mlp.pre
    if shared:
        attn, mlp = (replace(part, shares_pre=True) for part in (attn, mlp))
    parallel = shared or _same(mlp_in.entering, before) or _same(mlp_in.entering, attn_in.entering)

    if not torch.equal(attn_in.entering_value.flatten(), before_value.flatten().to(attn_in.entering_value.device)):
        raise unsupported("its attention branch does not read the residual stream")
    attn_part, mlp_part = (scale * call.leaving_value.view_as(before_value) for call in (attn_out, mlp_out))
    if not parallel and not _close(mlp_in.entering_value.view_as(before_value), before_value, attn_part):
        raise unsupported("stream before + attention branch is not the stream that its MLP branch reads")
    if not _close(after_value, before_value, attn_part, mlp_part):
        raise unsupported("stream before + attention branch + MLP branch is not the stream after")
    return Block(module, attn, mlp, parallel, returns)


def _scale_of(block: nn.Module) -> float:
    """What the block multiplies each of its branches with."""
    return next((float(getattr(block, key)) for key in RESIDUAL_SCALES if hasattr(block, key)), 1.0)


def _close(total: Tensor, *parts: Tensor) -> bool:
    """Whether ``total`` is the sum of ``parts``, up to the rounding of a few additions in the tensors' own dtype."""
    eps = torch.finfo(total.dtype).eps
    total, *parts = (tensor.cpu().double() for tensor in (total, *parts))  # type: ignore[assignment]
    slack = 8 * eps * sum(part.abs() for part in parts)
    return bool(((total - sum(parts)).abs() <= slack + 1e-30).all())


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Logit scale and soft-capping of the architecture, by the names that transformers' configs give them."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite: divides
        scale = 1.0 / float(config.logits_scaling)
    if getattr(config, "logit_scale", None):  # Cohere: multiplies
        scale = float(config.logit_scale)
    if getattr(config, "output_multiplier", None):  # Muse: multiplies
        scale = float(config.output_multiplier)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)


def _with_logits(anatomy: Anatomy, last: Tensor, logits: Tensor, name: str) -> Anatomy:
    """The anatomy whose logits are the model's: a wrapper may leave out the scale of its decoder's config (Aya Vision)."""
    errors = []
    for scale, softcap in dict.fromkeys(
        [
            (anatomy.logit_scale, anatomy.logit_softcap),
            (1.0, anatomy.logit_softcap),
            (anatomy.logit_scale, None),
            (1.0, None),
        ]
    ):
        found = replace(anatomy, logit_scale=scale, logit_softcap=softcap)
        with torch.no_grad():
            z = found.logits(last)
        largest = logits.cpu().double().abs().max().clamp(min=1e-30)
        errors.append((z.cpu().double() - logits.cpu().double()).abs().max() / largest)
        if errors[-1] <= 32 * torch.finfo(logits.dtype).eps:
            return found
    raise UserError(
        f"{name}: head(final norm(last stream)) differs from the model's logits by {errors[0]:.1e} relative; this architecture is not supported"
    )
