"""What healing trains: the weights of the blocks, or low-rank changes of their matrices. What pruning removed is held at zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel
from prunescope.models.packed import format_of

__all__ = ["Trainable", "make_trainable", "zeros_of"]


@dataclass
class Trainable:
    """The parameters that are trained, by their names in the model, and where weights must stay zero."""

    parameters: dict[str, nn.Parameter]
    zeros: dict[str, Tensor] = field(default_factory=dict)  # True where the parameter of that name is zero and stays it
    pruned: dict[str, Tensor] = field(
        default_factory=dict
    )  # the same of the model's own weights, trained as they are or not
    low_rank: list[tuple[nn.Module, str]] = field(default_factory=list)  # modules whose weight has a low-rank change

    def mask_gradients(self) -> None:
        """Zero the gradient wherever a weight must stay zero."""
        for name, mask in self.zeros.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0)

    @torch.no_grad()
    def keep_zeros(self) -> None:
        """Put zeros back wherever a weight must stay zero, whatever the optimiser did."""
        for name, mask in self.zeros.items():
            self.parameters[name].masked_fill_(mask, 0)

    def merge(self) -> None:
        """Fold low-rank changes into the weights; the model has its own modules again, and every parameter may be trained as after loading."""
        for module, name in self.low_rank:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        self.low_rank.clear()


class _LowRank(nn.Module):
    """``W + scale * B A``, with zeros wherever W has been pruned (LoRA, arXiv 2106.09685; the mask as in SPP, arXiv 2405.16057).

    peft adds ``scale * B A x`` beside the layer, where no mask can reach the product: merging it either fills the zeros or writes another
    model than the one that was trained. Without zeros both are the same function.
    """

    def __init__(self, weight: Tensor, zeros: Tensor | None, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        outputs, inputs = weight.shape
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform_(a=sqrt(5)), as peft begins
        start = torch.rand(rank, inputs, generator=generator, dtype=torch.float64) * (2 * bound) - bound
        self.a = nn.Parameter(start.to(weight))  # (rank, inputs)
        self.b = nn.Parameter(weight.new_zeros(outputs, rank))
        self.scale = alpha / rank
        self.zeros = zeros

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            change = self.b @ self.a * self.scale
        return weight + (change if self.zeros is None else change.masked_fill(self.zeros, 0))


def make_trainable(
    student: LoadedModel,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    embeddings: bool = False,
    seed: int = 0,
) -> Trainable:
    """Choose what is trained; everything else is frozen.

    Without ``rank``: all parameters of the blocks and the final norm. With it: a change of that rank to each matrix of the blocks. Branches
    that are dropped, or silent in a `zeroed` checkpoint, are left as they are.

    Args:
        rank, alpha: of the low-rank changes, which are scaled by alpha / rank; alpha is by default twice the rank.
        embeddings: train the input embedding and the head as well.
        seed: of the low-rank changes' start.
    Raises:
        UserError: packed weights, which cannot be trained, or no matrix to change.
    """
    model = student.model
    if packed := format_of(model):
        raise UserError(f"{student.ref} is packed as {packed}; heal the model it was quantised from, then quantise")
    gone = student.dropped
    frozen = {
        id(parameter)
        for part in student.anatomy.sublayers()
        if (part.kind, student.layer_map[part.layer]) in gone
        for module in (*part.modules, *([] if part.shares_pre else [part.pre]), part.post)
        if module is not None
        for parameter in module.parameters()
    }
    places: list[nn.Module] = [block.module for block in student.anatomy.blocks]
    if rank is None:
        places += [student.anatomy.final_norm] if student.anatomy.final_norm is not None else []
        places += [model.get_input_embeddings(), student.anatomy.head] if embeddings else []
    wanted = {id(parameter) for place in places for parameter in place.parameters()} - frozen
    chosen = {
        name: p for name, p in model.named_parameters() if id(p) in wanted and p.is_floating_point()
    }  # a tied weight has one name
    model.requires_grad_(False)
    if rank is not None:
        return _low_rank(student, chosen, rank, 2.0 * rank if alpha is None else alpha, seed)
    zeros = {name: mask for name, p in chosen.items() if (mask := zeros_of(p)) is not None}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    if not chosen:
        raise UserError(f"{student.ref} has no weights left to train")
    return Trainable(chosen, zeros, zeros)


def zeros_of(weight: Tensor) -> Tensor | None:
    """Where a matrix is zero, None where it is so nowhere. Vectors are never pruned: a bias that starts at zero may move."""
    if weight.dim() < 2:
        return None
    mask = weight.detach() == 0
    return mask if bool(mask.any()) else None


def _low_rank(student: LoadedModel, chosen: dict[str, nn.Parameter], rank: int, alpha: float, seed: int) -> Trainable:
    modules = dict(student.model.named_modules())
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, nn.Parameter] = {}
    changed = []
    pruned: dict[str, Tensor] = {}
    for name, parameter in chosen.items():
        if parameter.dim() != 2:  # norms and biases, and experts in one tensor
            continue
        owner, _, attribute = name.rpartition(".")
        zeros = zeros_of(parameter)
        pruned |= {} if zeros is None else {name: zeros}
        change = _LowRank(parameter, zeros, min(rank, *parameter.shape), alpha, generator)
        parametrize.register_parametrization(modules[owner], attribute, change, unsafe=True)
        changed.append((modules[owner], attribute))
        found |= {f"{name}.{factor}": getattr(change, factor) for factor in ("a", "b")}
    if not changed:
        raise UserError(f"{student.ref}: none of its blocks holds a matrix that can take --lora; heal all weights")
    return Trainable(found, {}, pruned, changed)
