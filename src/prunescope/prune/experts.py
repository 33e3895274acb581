"""Expert pruning by router-weighted norms (REAP, arXiv 2510.13999): the experts that add least to what a block says are taken out.

The saliency of an expert is the mean, over the tokens that are routed to it, of the router's weight times the norm of the expert's output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prunescope.errors import UserError, first_line
from prunescope.models.blockwise import StreamedModel
from prunescope.models.experts import Experts, remove_experts, routed, without
from prunescope.progress import Advance, console
from prunescope.prune.calibrate import Text
from prunescope.prune.plan import PruningPlan, experts_of

__all__ = ["cut_experts_again", "prune_experts", "saliencies"]

_SAME = 0.98  # share of the tokens that must come out alike: rounding may break a tie of the router's


def saliencies(text: Text, layer: int, experts: Experts, advance: Advance) -> tuple[Tensor, Tensor]:
    """``(experts,)`` float64 saliencies, 0 for an expert that no token reached, and ``(experts,)`` int64 tokens that reached it."""
    total = torch.zeros(experts.count, dtype=torch.float64)
    tokens = torch.zeros(experts.count, dtype=torch.int64)
    done = running = 0

    def see(states: Tensor, chosen: Tensor, weights: Tensor) -> None:
        counted = torch.ones(len(states), dtype=torch.bool, device=states.device)
        if text.used is not None:
            counted = text.used[done - running : done].flatten().to(states.device)
        for expert in range(experts.count):
            token, place = torch.where((chosen == expert) & counted[:, None])
            if len(token):
                one = torch.full((len(token), 1), expert, dtype=chosen.dtype, device=chosen.device)
                out = experts.module.forward(states[token], one, torch.ones_like(one, dtype=weights.dtype))
                weighted = weights[token, place].double() * out.double().norm(dim=-1)
                total[expert] += weighted.sum().cpu()
                tokens[expert] += len(token)

    def before(batch: int) -> None:
        nonlocal done, running
        done, running = done + batch, batch

    with torch.no_grad(), routed(experts, see):
        text.run(layer, keep=False, before=before, advance=advance)
    return total / tokens.clamp(min=1), tokens


def prune_experts(
    streamed: StreamedModel, plan: PruningPlan, layer: int, text: Text | None, advance: Advance
) -> dict[str, Any]:
    """Take the experts with the lowest saliency out of the live block, as many of every group.

    Returns:
        ``rows`` of the report (none where the block has no experts), the indices ``kept``, and by name the shapes that what is ``changed`` had.
    Raises:
        UserError: without them the block gives something else than with a router that cannot choose them.
    """
    experts = experts_of(streamed, layer)
    if experts is None:
        advance(0 if text is None else len(text.tokens))
        return {"rows": [], "kept": [], "changed": {}}
    assert text is not None
    goal = next(iter(plan.goals.values()))
    advance.note(f"block {layer} experts")
    scores, tokens = saliencies(text, layer, experts, advance)
    left = experts.left(goal.count) // experts.groups
    grouped = scores.view(experts.groups, -1)
    size = grouped.shape[1]
    order = grouped.argsort(dim=1, descending=True, stable=True)[:, :left]
    kept = (order + torch.arange(experts.groups)[:, None] * size).flatten().sort().values
    removed = sorted(set(range(experts.count)) - set(kept.tolist()))
    weights = sum(p.numel() for p in experts.module.parameters(recurse=False))
    width = streamed.loaded.anatomy.hidden_size
    changed = experts.shapes
    with without(experts, removed):
        expected = text.first_output(layer)
    remove_experts(experts, kept)
    _check_removed(text, layer, expected)
    silent = int((tokens == 0).sum())
    if silent:
        console.print(f"{experts.name}: no calibration token reached {silent} of {experts.count} experts", markup=False)
    held = [p for p in experts.module.parameters(recurse=False) if p.dim() == 3]
    row = {
        "layer": layer,
        "name": experts.name,
        "outputs": width,
        "inputs": weights // width,
        "asked": str(goal),
        "zeros": sum(p.numel() - int(p.count_nonzero()) for p in held),
        "sparsity": len(removed) / experts.count,
        "error": None,
        "dead_inputs": None,
        "damping": None,
        "tokens": int(tokens.sum()),
        "few_tokens": False,
        "experts": experts.count,
        "removed": len(removed),
        "removed_experts": removed,
        "saliency": scores.tolist(),
        "expert_tokens": tokens.tolist(),
    }
    return {"rows": [row], "kept": kept.tolist(), "changed": changed}


def _check_removed(text: Text, layer: int, expected: Tensor) -> None:
    """A block without the experts must give what it gives when the router cannot choose them."""
    try:
        out = text.first_output(layer)
    except RuntimeError as why:
        raise UserError(
            f"block {layer}: it does not run with experts removed ({first_line(why)}); --method experts does not know this form"
        ) from why
    scale = expected.float().abs().max().clamp(min=1e-30)
    errors = (out.float() - expected.float()).abs().amax(-1) / scale
    alike = float((errors <= 64 * torch.finfo(out.dtype).eps * math.sqrt(out.shape[-1])).float().mean())
    if not alike >= _SAME:
        raise UserError(
            f"block {layer}: removing experts gives something else than a router that cannot choose them, at {1 - alike:.0%} of the tokens; --method experts does not know this form"
        )


def cut_experts_again(streamed: StreamedModel, layer: int, kept: list[int]) -> None:
    """Take out of a live block what an earlier run took."""
    experts = experts_of(streamed, layer)
    if experts is not None:
        remove_experts(experts, torch.tensor(kept))
