"""The cheap first stage of healing: every sublayer that is left learns, by itself, to lead to the stream that the dense model has there.

The student's own stream runs through its blocks, cut off from the gradient in front of every sublayer. What a sublayer makes of it is compared with the
dense model's stream where the next sublayer that is left begins, so that a sublayer also makes up for dropped ones that follow it. One forward pass
and a backward pass of no depth serve all sublayers at once, and no head is needed (sublayer-wise reconstruction: arXiv 2510.14444).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunescope.models.anatomy import Kind
from prunescope.models.finding import first_tensor, hooks
from prunescope.models.loaded import LoadedModel
from prunescope.models.residual import Passage, substituting, watching

__all__ = ["dense_changes", "reconstruction_error"]

_Place = tuple[int, Kind]  # layer of the dense model, kind


def reconstruction_error(
    student: LoadedModel, teacher: LoadedModel, tokens: Tensor, read: Tensor, changes: Tensor | None = None
) -> Tensor:
    """The mean over sublayers of |stream after - dense stream|² / |what the dense model adds there|², a differentiable scalar.

    Args:
        tokens: ``(texts, length)``, right-padded.
        read: ``(texts, length)``, True where no padding is.
        changes: `dense_changes` of all texts, of which these are a part: then the errors of the parts add up to that of all.
    """
    kept = _kept(student)
    targets, scales = _dense_streams(teacher, tokens, read, kept)
    if changes is not None:
        scales = dict(zip(kept, changes, strict=True))
    losses: list[Tensor] = []
    state: dict[str, Tensor] = {}

    def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
        state["stream"] = first_tensor(args, kwargs).detach()

    def added(layer: int, kind: Kind, change: Tensor) -> None:
        place = (student.layer_map[layer], kind)
        if place not in targets:
            return
        after = state["stream"] + change.view_as(state["stream"])
        losses.append((after - targets[place])[read].square().sum() / scales[place])
        state["stream"] = after.detach()

    with hooks() as handles:
        first = student.anatomy.blocks[0].module
        handles.append(first.register_forward_pre_hook(begin, with_kwargs=True))
        with substituting(student, lambda layer, kind: state["stream"], added):
            student.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return torch.stack(losses).mean()


def dense_changes(
    student: LoadedModel, teacher: LoadedModel, parts: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Tensor:
    """What the dense model adds to the stream from where a sublayer that the student keeps begins to where the next one does: the sum of |change|²
    over all parts, ``tokens`` and ``read`` of each, float64 ``(sublayers,)``; zeros without parts."""
    kept = _kept(student)
    total = torch.zeros(len(kept), dtype=torch.float64, device=device)
    for tokens, read in parts:
        scales = _dense_streams(teacher, tokens, read, kept)[1]
        total += torch.stack([scales[place] for place in kept]).to(total)
    return total


def _kept(student: LoadedModel) -> list[_Place]:
    return [
        (student.layer_map[part.layer], part.kind)
        for part in student.anatomy.sublayers()
        if (student.layer_map[part.layer], part.kind)[::-1] not in student.dropped
    ]


@torch.no_grad()
def _dense_streams(
    teacher: LoadedModel, tokens: Tensor, read: Tensor, kept: list[_Place]
) -> tuple[dict[_Place, Tensor], dict[_Place, Tensor]]:
    """For each kept sublayer the dense stream where the next one begins, and the squared length of what happens in between."""
    targets: dict[_Place, Tensor] = {}
    scales: dict[_Place, Tensor] = {}
    following = dict(zip(kept[1:], kept, strict=False))
    entered: dict[_Place, Tensor] = {}

    def end(place: _Place, stream: Tensor) -> None:
        targets[place] = stream
        scales[place] = (stream - entered.pop(place))[read].square().sum()

    def see(passage: Passage) -> None:
        place = (passage.layer, passage.kind)
        if place in following:
            end(following[place], passage.before)
        if place in kept:
            entered[place] = passage.before
        if passage.layer == len(teacher.anatomy) - 1 and passage.kind == "mlp":
            end(kept[-1], passage.after)

    with watching(teacher, see):
        teacher.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return targets, scales
