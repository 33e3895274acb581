"""Healing by several processes, each of which holds both models: texts are shared out, and every process makes the same step of the optimiser.

The loss is the mean over the counted tokens of the whole batch. So each process divides its sums by that count, not by its own, and gradients are
added up, not averaged: the numbers are those of one process but for the order of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from prunescope.prune.team import Team
from prunescope.prune.trainable import Trainable

__all__ = ["add_gradients", "check_same", "share_state"]

T = TypeVar("T")


def add_gradients(team: Team, parameters: Sequence[torch.nn.Parameter]) -> None:
    """The sum of all processes' gradients, in each of them. A weight that nobody's texts reach, of an expert for example, is left without one,
    as in one process: the optimiser passes over it."""
    if team.world == 1:
        return
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    team.add([reached])
    chosen = [p for p, by in zip(parameters, reached.tolist(), strict=True) if by]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    team.add([p.grad for p in chosen if p.grad is not None])


def share_state(team: Team, trained: Trainable, optimiser: torch.optim.Optimizer, done: T) -> T:
    """Weights, means of the optimiser and what was done so far, as the first process has them, in all."""
    if team.world == 1:
        return done
    steps = {
        name: float(optimiser.state[p]["step"]) for name, p in trained.parameters.items() if optimiser.state.get(p)
    }
    found, steps = team.told((done, steps))
    for name, parameter in trained.parameters.items():
        state = optimiser.state[parameter] if name in steps else {}
        if name in steps and not state:
            state["step"] = torch.tensor(steps[name], device=parameter.device if optimiser.defaults["fused"] else "cpu")
            state |= {what: torch.empty_like(parameter) for what in ("exp_avg", "exp_avg_sq")}
        for tensor in (parameter, *(state[what] for what in ("exp_avg", "exp_avg_sq") if what in state)):
            _spread(team, tensor)
    return found


@torch.no_grad()
def _spread(team: Team, tensor: Tensor) -> None:
    whole = tensor.detach().contiguous().view(-1)
    team.spread(whole, 0)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole.view(tensor.shape))


@torch.no_grad()
def check_same(team: Team, trained: Trainable) -> None:
    """Raise RuntimeError if the processes no longer hold the same weights."""
    if team.world == 1:
        return
    sums = team.all(torch.stack([p.sum(dtype=torch.float64) for p in trained.parameters.values()]).tolist())
    for rank, found in enumerate(sums):
        if found != sums[0]:
            raise RuntimeError(
                f"the weights of process {rank} are no longer those of process 0; give each the same kind of device"
            )
