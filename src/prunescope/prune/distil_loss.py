"""Forward KL divergence of a student from its teacher over the full vocabulary, with its exact gradient, in bounded memory.

The logits of a batch are the largest tensors of a distillation by far: 32 texts of 384 tokens and 152 000 words are 7.5 GB in float32, for
each of the two models, and again for the gradient. Here they exist for ``chunk`` places at a time. The gradient of the sum over places of
KL(p || q), with p the teacher's and q the student's distribution, in the student's logits is q - p. So it is at hand when the loss is, and the
head's backward runs chunk by chunk within the forward pass: nothing is kept but the gradient in the hidden states and, where they are trained,
in the head's weights. Recomputing the logits in the backward pass would give the same numbers for one more product with each head.

What is reported of two models that may be almost equal is `prunescope.models.divergence`, which loses no digits there; here the gradient is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["divergence_and_gradient", "forward_kl"]

Project = Callable[[Tensor], Tensor]  # what a head reads (rows, d) -> logits (rows, V)


def forward_kl(
    project: Project,
    h: Tensor,
    teacher_project: Project,
    teacher_h: Tensor,
    *,
    chunk: int = 1024,
    weights: Sequence[Tensor] = (),
) -> Tensor:
    """The sum over places of KL(teacher || student), in nats, as a differentiable scalar; float64 for float64 states, else float32.

    Args:
        project: the student's head, see `Anatomy.project`.
        h: what it reads, ``(places, d)``; the gradient flows back into it.
        teacher_project, teacher_h: the same of the teacher, ``(places, d of the teacher)``; no gradient.
        chunk: places whose logits are in memory at a time. The result does not depend on it, up to rounding.
        weights: parameters that ``project`` reads and that are to get their gradients too.
    """
    found: Tensor = _ForwardKL.apply(project, teacher_project, teacher_h, chunk, h, *weights)
    return found


def divergence_and_gradient(z: Tensor, teacher_z: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) summed over places, and its gradient q - p in the student's logits, both from logits ``(places, V)``.

    In float64 for float64 logits, else in float32, whatever the dtype of the logits. On a GPU ``teacher_z`` is overwritten.
    """
    if z.is_cuda and z.dtype == teacher_z.dtype != torch.float64 and z.is_contiguous() and teacher_z.is_contiguous():
        from prunescope.prune.distil_kernels import rows_divergence

        return rows_divergence(z, teacher_z)
    dtype = torch.promote_types(torch.promote_types(z.dtype, teacher_z.dtype), torch.float32)
    log_q, log_p = torch.log_softmax(z, -1, dtype=dtype), torch.log_softmax(teacher_z, -1, dtype=dtype)
    p = log_p.exp()
    divergence = (p * log_p.sub_(log_q)).sum()
    return divergence, log_q.exp_().sub_(p)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        project: Project,
        teacher_project: Project,
        teacher_h: Tensor,
        chunk: int,
        h: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        wanted = [weight for weight in weights if weight.requires_grad]
        total = h.new_zeros((), dtype=torch.promote_types(h.dtype, torch.float32))
        gradient = torch.empty_like(h) if ctx.needs_input_grad[4] else None
        sums = [torch.zeros_like(weight) for weight in wanted]
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            part = h[rows].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None or bool(wanted)):
                z = project(part)
            divergence, dz = divergence_and_gradient(z.detach(), teacher_project(teacher_h[rows]))
            total += divergence
            if gradient is not None or wanted:
                leaves = ([part] if gradient is not None else []) + wanted
                found = list(torch.autograd.grad(z, leaves, dz.to(z.dtype)))
                if gradient is not None:
                    gradient[rows] = found.pop(0)
                for total_of, more in zip(sums, found, strict=True):
                    total_of += more
        by_weight = iter(sums)
        ctx.gradients = (gradient, *(next(by_weight) if weight.requires_grad else None for weight in weights))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        scale = outputs[0]
        return (None,) * 4 + tuple(None if found is None else found * scale.to(found.dtype) for found in ctx.gradients)
