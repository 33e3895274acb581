"""`--compensate`: a linear map of the last sublayer that stays stands in for what was dropped after it, and is folded into its last matrix.

With y what that sublayer, the host, adds to the stream, x the stream where the dropped ones end, and x* the dense model's there, the map M
minimises the sum over tokens of |x* - x - M y|^2 / |x*|^2 + ridge |M|^2. The host then adds y + M y: its last matrix W becomes W + M W, its bias b
becomes b + M b, and the model stays an ordinary one (ReplaceMe, Shopkhoev et al., arXiv 2505.02819, whose host is the MLP of the block
before, and who do not divide). Hosts are worked on from the first to the last, each in the model as it is by then, so that what one leaves the
next can mend.

The division is what the norms of later sublayers do to a stream. Without it the first token, whose stream is tens of times as long in many models, either
decides the map, or, where it is left out, is made something else by it, which all later tokens then attend to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunescope.data.calibration import Calibration
from prunescope.errors import UserError
from prunescope.models.anatomy import Sublayer
from prunescope.models.attending import any_length
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import batches
from prunescope.models.loaded import LoadedModel
from prunescope.models.packed import refuse_packed
from prunescope.models.residual import Passage, headless, watching
from prunescope.models.saving import last_projection
from prunescope.progress import console, progress
from prunescope.prune.search import Judge

__all__ = ["Fold", "check_format", "fit_maps", "folded", "pairs"]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # times the mean of the diagonal of sum y y^T


@dataclass(frozen=True)
class Fold:
    """A map ``(d, d)`` float32 of what a host adds, and how much of the sum of |x* - x|^2 / |x*|^2 it leaves on the part of the text that it was not fitted
    to; ``kl``: what KL(dense || pruned) is on that part without a map and with one, both as fitted on the rest, behind the maps of the hosts before.

    ``map`` itself is fitted to all of the text, with the ridge that was chosen so.
    """

    host: Sublayer
    last: Sublayer  # the dropped sublayer in whose place it stands, the last of several in a row
    map: Tensor
    ridge: float
    left: float
    kl: tuple[float, float] | None = None

    def row(self) -> dict[str, object]:
        return {
            "host": self.host.name,
            "in_place_of": self.last.name,
            "ridge": self.ridge,
            "left": self.left,
            "kl": self.kl,
        }


def check_format(compensated: bool, form: str) -> None:
    """Raise UserError for a checkpoint that has no weights to fold into."""
    if compensated and form == "recipe":
        raise UserError(
            "--compensate changes weights, and a recipe has none; give --format zeroed, or compact for blocks"
        )


def pairs(loaded: LoadedModel, spec: DropSpec) -> list[tuple[Sublayer, Sublayer]]:
    """Hosts and the last dropped sublayer after each. What is dropped before any sublayer that stays has no host."""
    found: dict[str, tuple[Sublayer, Sublayer]] = {}
    host: Sublayer | None = None
    for part in loaded.anatomy.sublayers():
        if (part.kind, part.layer) not in spec:
            host = part
        elif host is not None:
            found[host.name] = (host, part)
    return list(found.values())


@torch.no_grad()
def fit_maps(loaded: LoadedModel, spec: DropSpec, calibration: Calibration, batch_size: int = 8) -> list[Fold]:
    """The maps for ``loaded``, a dense model, without ``spec``. One sample in four chooses the ridge; a map without which the model is no further from
    the dense one there is left out, and that is said.

    Raises:
        UserError: a model whose weights are packed, one sample only, a host with a post-norm or without an ordinary last matrix.
    """
    refuse_packed(loaded.ref, loaded.model, "--compensate")
    if len(calibration.tokens) < 2:
        raise UserError(
            "--compensate fits on one part of the calibration text and checks on another; give two samples at least"
        )
    chosen = pairs(loaded, spec)
    for host, _ in chosen:
        _matrix(loaded, host)
    if not chosen:
        return []
    folds: list[Fold] = []
    tried: list[Fold] = []  # the same, fitted without the samples that judge
    judge = _judge(loaded, calibration, batch_size)
    without = _divergence(judge, spec)
    with progress(f"{len(chosen)} maps", len(chosen)) as advance:
        for host, last in chosen:
            found = _fit(loaded, spec, folds, host, last, calibration, batch_size)
            kl = math.inf
            if found is not None:
                with folded(loaded, [*tried, found[1]]):
                    kl = _divergence(judge, spec)
            if found is not None and kl < without:
                folds.append(replace(found[0], kl=(without, kl)))
                tried.append(found[1])
                without = kl
            else:
                console.print(
                    f"{host.name}: no map does better than none for the {last.name}; left as it is", markup=False
                )
            advance(1)
    return folds


def _judge(loaded: LoadedModel, calibration: Calibration, batch_size: int) -> Judge:
    """Of the samples that nothing is fitted to. Raises UserError if the model predicts nothing in them."""
    count = len(calibration.tokens)
    apart = [i for i in range(count) if _apart(i, count)]
    counts = None if calibration.counts is None else calibration.counts[apart]
    some = replace(calibration, tokens=calibration.tokens[apart], counts=counts)
    if not some.predicting().any():
        raise UserError("--compensate: one sample in four judges the maps, and nothing counts in these; give more --samples")  # fmt: skip
    return Judge(loaded, some, batch_size)


def _divergence(judge: Judge, spec: DropSpec) -> float:
    """Infinite where it is not a number: activations overflow."""
    try:
        return judge.divergences(spec, [spec])[0]
    except UserError:
        return math.inf


def _fit(
    loaded: LoadedModel,
    spec: DropSpec,
    before: Sequence[Fold],
    host: Sublayer,
    last: Sublayer,
    calibration: Calibration,
    batch_size: int,
) -> tuple[Fold, Fold] | None:
    """The fold for a host, and the one that is fitted without the samples that judge; None where no ridge leaves less than there was."""
    used = calibration.gathered()
    width = loaded.anatomy.hidden_size
    exact: dict[str, Any] = {"dtype": torch.float64, "device": loaded.device}
    sums = [[torch.zeros(width, width, **exact) for _ in range(2)] for _ in range(2)]  # of fit, check: y y^T, r y^T
    energy = torch.zeros(2, **exact)
    for batch in batches(range(len(calibration.tokens)), batch_size):
        ids = calibration.tokens[list(batch)].to(loaded.device)
        (wanted,) = _after(loaded, ids, [last])
        with folded(loaded, before), loaded.dropping(spec):
            added, now = _after(loaded, ids, [host, last], added=host)
        for row, i in enumerate(batch):
            places = slice(None) if used is None else used[i].to(ids.device)
            y, rest = added[row][places].double(), (wanted[row] - now[row])[places].double()
            length = wanted[row][places].double().norm(dim=-1, keepdim=True)
            y, rest = (torch.where(length > 0, value / length, 0.0) for value in (y, rest))
            part = int(_apart(i, len(calibration.tokens)))
            sums[part][0] += y.T @ y
            sums[part][1] += rest.T @ y
            energy[part] += rest.square().sum()
    (gram, cross), (check_gram, check_cross) = ([both.cpu() for both in one] for one in sums)
    energy = energy.cpu()
    if not gram.any():  # a host that adds nothing
        return None
    best: tuple[float, float] | None = None
    for ridge in RIDGES:
        found = _solve(gram, cross, ridge)
        left = float((energy[1] - 2 * (found * check_cross).sum() + ((found @ check_gram) * found).sum()) / energy[1])
        best = min((left, ridge), best or (1.0, 0.0))
    if best is None or best[1] == 0.0 or not energy[1]:
        return None
    kept = Fold(host, last, _solve(gram + check_gram, cross + check_cross, best[1]).float(), best[1], best[0])
    return kept, replace(kept, map=_solve(gram, cross, best[1]).float())


def _apart(sample: int, samples: int) -> bool:
    """Whether a sample is one of those that nothing is fitted to."""
    return sample % 4 == 3 or (samples < 4 and sample == 1)


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """M of ``M (G + ridge mean(diag G)) = C``."""
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(damped, cross, left=False)
    return found


def _after(
    loaded: LoadedModel, ids: Tensor, parts: Sequence[Sublayer], added: Sublayer | None = None
) -> tuple[Tensor, ...]:
    """The stream after each of ``parts``, and of ``added`` what it adds instead; ``(batch, tokens, d)``."""
    found: dict[str, Tensor] = {}

    def see(passage: Passage) -> None:
        for part in parts:
            if (passage.layer, passage.kind) == (part.layer, part.kind):
                value = passage.added if part is added else passage.after
                assert value is not None
                found[part.name] = value.clone()

    with watching(loaded, see), headless(loaded), any_length():
        loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return tuple(found[part.name] for part in parts)


@contextmanager
def folded(loaded: LoadedModel, folds: Sequence[Fold]) -> Iterator[None]:
    """The model with the maps in its weights; afterwards the very same weights are back."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for fold in folds:
                weight, bias, turned = _matrix(loaded, fold.host)
                exact = torch.promote_types(weight.dtype, torch.float32)
                by = fold.map.to(weight.device, exact)
                for tensor in (weight, bias):
                    if tensor is not None:
                        saved.append((tensor, tensor.detach().clone()))
                        old = tensor.to(exact)
                        tensor.copy_(old + (old @ by.T if turned or tensor.dim() == 1 else by @ old))
        yield
    finally:
        with torch.no_grad():
            for tensor, value in reversed(saved):
                tensor.copy_(value)


def _matrix(loaded: LoadedModel, host: Sublayer) -> tuple[Tensor, Tensor | None, bool]:
    """Weight and bias of the host's last matrix, and whether the weight is stored ``(in, out)``."""
    if host.post is not None:
        raise UserError(
            f"--compensate: a norm stands between the {host.name} and the stream, so that no map folds into its matrix; leave it out"
        )
    if host.summed or host.fused:
        raise UserError(
            f"the {host.name} is added to the stream by several modules, or by its own; --compensate cannot fold a map into it"
        )
    module = last_projection(loaded, host.modules[-1])
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UserError(
            f"--compensate: the {host.name} has no last matrix of its own (experts have many); leave it out"
        )
    if not module.weight.is_floating_point():
        raise UserError(f"--compensate: the last matrix of the {host.name} is packed; give the plain model")
    return module.weight, module.bias, isinstance(module, Conv1D)
