"""Swaps: exchange a kept weight for a pruned one of the same row, as long as the layer's squared error falls (arXiv 2512.10922).

Of a row w with its pruned form v the error is ``L = (w - v) H (w - v)^T``. With ``c = H (w - v)``, a swap of the kept p for the pruned u,
which gets the value t, changes it by ``2 v_p c_p + v_p^2 H_pp - 2 t (c_u + v_p H_pu) + t^2 H_uu``. The paper changes the mask alone, so
``t = w_u``. Behind a method that also changes weights, t is what fits best, ``(c_u + v_p H_pu) / H_uu``.

A scan looks at every pair and puts a row's pruned weights in the order of what their best swap brings; then they are gone through in that
order, each with the best partner that it has by then. So the first swap of a scan is the best of all single ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["swap"]

_ROWS = 1024  # whose swaps are made together
_PAIRS_ON_CPU, _PAIRS_ON_GPU = 2**17, 2**27  # that are looked at together


def swap(
    dense: Tensor, pruned: Tensor, hessian: Tensor, *, of: int = 0, fit: bool, scans: int = 20, tries: int = 64
) -> tuple[Tensor, int]:
    """Better masks for ``pruned``. A row, and with ``of`` a group of so many consecutive inputs, keeps as many weights as it has.

    Args:
        dense: ``(out, in)``, what `pruned` was made of. A weight that is zero in it is not brought back.
        pruned: ``(out, in)``; left as it is.
        hessian: ``(in, in)``, symmetric, of the error that falls.
        fit: whether a weight that comes back gets the value that fits best, instead of that in `dense`.
        scans: over a row's pairs, at most; fewer where no swap is left.
        tries: pruned weights of a row that are gone through after a scan.
    Returns:
        The new matrix, and how many swaps were made.
    """
    search = _Search(hessian, of or hessian.shape[0], fit)
    parts, made = [], 0
    for old, new in zip(dense.split(_ROWS), pruned.split(_ROWS), strict=True):
        weights = new.clone()
        going = torch.arange(len(new), device=new.device)  # rows in which a swap may be left
        for _ in range(scans):
            count, moved, weights[going] = search.improve(old[going], weights[going], tries)
            made += count
            going = going[moved]
            if not len(going):
                break
        parts.append(weights)
    return torch.cat(parts), made


class _Search:
    """What is the same for all rows. ``size`` inputs lie in a group; without N:M they all do."""

    def __init__(self, hessian: Tensor, size: int, fit: bool) -> None:
        self.hessian, self.size, self.fit = hessian, size, fit
        self.diagonal = hessian.diagonal().contiguous()
        self.alive = self.diagonal > 0
        self.inverse = torch.where(self.alive, 1 / self.diagonal, 0.0)
        self.groups = torch.arange(len(hessian), device=hessian.device).view(-1, size)
        self.inside = hessian[self.groups[:, :, None], self.groups[:, None, :]]  # (groups, size, size)
        self.least = 16 * torch.finfo(hessian.dtype).eps  # of a row's error: less is rounding

    def improve(self, dense: Tensor, weights: Tensor, tries: int) -> tuple[int, Tensor, Tensor]:
        """One scan of some rows: how many swaps were made, in which rows ``(rows,)`` bool, and the rows' new weights."""
        left = dense - weights
        slope = left @ self.hessian
        bar = -self.least * (left * slope).sum(1).clamp(min=0)
        gains = self._gains(dense, weights, slope)
        best, order = gains.topk(min(tries, gains.shape[1]), dim=1, largest=False)
        moved = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
        weights, made = weights.clone(), 0
        for gain, u in zip(best.T, order.T, strict=True):
            rows = (gain < bar).nonzero().flatten()  # in each row the gains get no better
            if not len(rows):
                break
            done = self._try(rows, u[rows], dense, weights, slope, bar)
            moved[done] = True
            made += len(done)
        return made, moved, weights

    def _gains(self, dense: Tensor, weights: Tensor, slope: Tensor) -> Tensor:
        """``(rows, in)``: by how much each pruned weight's best swap changes the error; infinite for the others."""
        kept = weights != 0
        cost = torch.where(kept, weights * (2 * slope + weights * self.diagonal), torch.inf)
        may_return = ~kept & (dense != 0) & self.alive
        if len(self.inside) > 1:  # N:M: all pairs of all rows' groups, (rows, groups, size, size)
            at = [t.view(len(t), -1, self.size)[..., None] for t in (slope, dense, self.diagonal.expand_as(slope))]
            by = [t.view(len(t), -1, 1, self.size) for t in (weights, cost)]
            gains = self._changes(by[1], by[0], self.inside, *at).amin(-1).flatten(1)
            return gains.masked_fill_(~may_return, torch.inf)
        gains = torch.full_like(weights, torch.inf)
        at_once = max(1, (_PAIRS_ON_CPU if weights.device.type == "cpu" else _PAIRS_ON_GPU) // self.size)
        for row, returning in enumerate(may_return):
            for u in returning.nonzero()[:, 0].split(at_once):
                at = [t[u, None] for t in (slope[row], dense[row], self.diagonal)]
                gains[row, u] = self._changes(cost[row], weights[row], self.hessian.index_select(0, u), *at).amin(1)
        return gains

    def _changes(
        self, cost: Tensor, values: Tensor, shared: Tensor, slope: Tensor, old: Tensor, diagonal: Tensor
    ) -> Tensor:
        """What it changes to swap in a weight for each of its group, ``(..., size)``.

        Args:
            cost, values: of the group's weights; the cost of leaving them out, infinite for what is pruned already.
            shared: ``(..., size)``, of H, the row of the weight that comes in; ``slope``, ``old``, ``diagonal``: ``(..., 1)``, its own.
        """
        if self.fit:
            root = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
            pull = (shared * root).mul_(values).add_(slope * root)
            return pull.square_().neg_().add_(cost)
        return (shared * (-2 * old)).mul_(values).add_(old * (old * diagonal - 2 * slope)).add_(cost)

    def _try(self, rows: Tensor, u: Tensor, dense: Tensor, weights: Tensor, slope: Tensor, bar: Tensor) -> Tensor:
        """Bring back ``u`` of each row for the best partner that it has now, if that is better; in place. Gives the rows where it was."""
        shared = self.hessian[u]  # (n, in)
        old, own = dense[rows, u], slope[rows, u]
        at = [t[:, None] for t in (own, old, self.diagonal[u])]
        if len(self.inside) == 1:
            near, values, slopes, diagonal = shared, weights[rows], slope[rows], self.diagonal
            first = torch.zeros_like(u)
        else:
            first = u - u % self.size  # of the group's inputs
            group = first[:, None] + self.groups[0]
            near, diagonal = shared.gather(1, group), self.diagonal[group]
            values, slopes = (t[rows[:, None], group] for t in (weights, slope))
        cost = (slopes.mul_(2).addcmul_(values, diagonal)).mul_(values).masked_fill_(values == 0, torch.inf)
        changes = self._changes(cost, values, near, *at)
        change, place = changes.min(1)
        p = first + place
        lost = values.gather(1, place[:, None])[:, 0]
        back = (own + lost * shared.gather(1, p[:, None])[:, 0]) * self.inverse[u] if self.fit else old
        good = ((change < bar[rows]) & (back != 0)).nonzero().flatten()
        rows, u, p, lost, back = (t[good] for t in (rows, u, p, lost, back))
        weights[rows, p] = 0
        weights[rows, u] = back
        slope[rows] += lost[:, None] * self.hessian[p] - back[:, None] * shared[good]
        return rows
