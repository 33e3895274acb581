"""Prune the weights of a model, block by block, each calibrated on the outputs of the pruned ones before it.

Weights are read from disk a block at a time and written as soon as they are pruned: a shard a block, which is also what an interrupted run
goes on from. Everything that the source checkpoint holds and pruning does not touch is copied byte by byte.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.models.blockwise import StreamedModel, pruned_weights
from prunescope.models.matrices import Matrix
from prunescope.progress import Advance, console, progress
from prunescope.prune.calibrate import InputStatistic, Text, gather
from prunescope.prune.checkpoint import finish, finished_blocks, report_of_block, reports, shard_of_block, write_block
from prunescope.prune.experts import cut_experts_again, prune_experts
from prunescope.prune.factor import NotPositiveDefiniteError
from prunescope.prune.magnitude import magnitude
from prunescope.prune.neurons import check_shapes, cut_again, prune_neurons
from prunescope.prune.outcome import matrix_row
from prunescope.prune.plan import RESHAPING, PruningPlan, smaller_config
from prunescope.prune.refine import refine
from prunescope.prune.sparsegpt import sparsegpt
from prunescope.prune.sparsegpt_gpu import full_float32, repeated_shapes
from prunescope.prune.team import Pieces, Team, mean_perplexity
from prunescope.prune.wanda import wanda

__all__ = ["Pruned", "prune_block", "prune_model"]


@dataclass
class Pruned:
    """What was done: a row a matrix, perplexities, and the fields of the config that change."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)
    config: dict[str, int] = field(default_factory=dict)


def prune_model(
    streamed: StreamedModel,
    plan: PruningPlan,
    tokens: Tensor | None,
    folder: Path,
    *,
    perplexity: Tensor | None = None,
    batch_size: int = 1,
    perplexity_batch_size: int = 1,
    limit: int = 2**32,
    used: Tensor | None = None,
    team: Team | None = None,
) -> Pruned:
    """Prune every block and write the checkpoint's weights and config into ``folder``.

    Blocks that ``folder`` holds already (``part-*``, of the same plan and text) are not pruned again.

    Args:
        tokens: calibration ``(samples, length)``; None only for magnitude, which then measures no reconstruction error.
        perplexity: ``(windows, length)``; measured before and after, in the same passage of the blocks.
        limit: bytes of hidden states in memory.
        used: ``(samples, length)`` bool, the places of the calibration text that count; None for all.
        team: the processes that share the text and the matrices; the first alone writes. None is this process alone.
    Raises:
        UserError: see `gather`; a Hessian that cannot be factorised; one sample only where it is refined.
        FloatingPointError: a block's output overflows.
    """
    if plan.refine is not None and tokens is not None and len(tokens) < 2:
        raise UserError("--refine is judged on samples that it is not fitted to; give two --samples at least")
    scratch = folder / "scratch"
    team = team or Team()
    writes = team.rank == 0
    if writes:
        reports(folder).mkdir(exist_ok=True)
    blocks = len(streamed.blocks)
    shapes: dict[str, torch.Size] = {}
    pruned = Pruned()
    if plan.method in RESHAPING:
        pruned.config, shapes = smaller_config(streamed, plan)
    done = finished_blocks(folder, blocks)
    shares = limit // (1 + 2 * (perplexity is not None))

    def text(of: Tensor, name: str, batch: int, used: Tensor | None = None) -> Pieces:
        return Pieces(team, streamed, of, batch, shares, scratch / name, used)

    calibration = text(tokens, "calibration.bin", batch_size, used) if tokens is not None else None
    before = after = None
    if perplexity is not None:
        before, after = (text(perplexity, f"{name}.bin", perplexity_batch_size) for name in ("before", "after"))
    units = sum(2 * stream.samples for stream in (calibration, before) if stream is not None) or 1
    earlier: Mapping[str, Tensor] | None = None
    if done and plan.method not in RESHAPING:
        earlier = pruned_weights(streamed, [shard_of_block(folder, layer) for layer in range(done)], scratch)
    with repeated_shapes(), progress(f"pruning ({plan.method})", blocks * units) as advance:
        for layer in range(blocks):
            started = time.monotonic()
            last = layer == blocks - 1
            if layer < done and before is not None and earlier is not None:
                with streamed.block(layer):
                    before.run(layer, keep=True, advance=advance)
            with streamed.block(layer, earlier if layer < done else None):
                if before is not None and not (layer < done and earlier is not None):
                    before.run(layer, keep=True, advance=advance)
                if layer < done:
                    found = json.loads(report_of_block(folder, layer).read_text("utf-8"))
                    if plan.method == "structured":
                        cut_again(streamed, plan, layer, found["kept"])
                    elif plan.method == "experts":
                        cut_experts_again(streamed, layer, found["kept"])
                    if calibration is not None:
                        advance(calibration.samples)
                else:
                    found = prune_block(streamed, plan, layer, calibration, advance, team)
                    if shapes:
                        check_shapes(streamed, layer, shapes)
                    if writes:
                        write_block(streamed, folder, layer, found)
                pruned.rows += found["rows"]
                for stream in (calibration if not last else None, after):
                    if stream is not None:
                        stream.run(layer, keep=True, advance=advance)
            if layer >= done and writes:
                _say_block(layer, blocks, found["rows"], time.monotonic() - started)
    if perplexity is not None and before is not None and after is not None:
        embedding = streamed.model.get_input_embeddings()
        tied = streamed.model.get_output_embeddings().weight is embedding.weight
        with (
            streamed.outside(skip=() if tied else (embedding,)),
            progress("perplexity", 2 * before.samples) as advance,
        ):
            pruned.perplexity = {
                name: mean_perplexity(team, stream.losses(advance), perplexity)
                for name, stream in (("dense", before), ("pruned", after))
            }
    for stream in (calibration, before, after):
        if stream is not None:
            stream.close()
    if writes:
        finish(streamed, folder, pruned.config)
    return pruned


def prune_block(
    streamed: StreamedModel,
    plan: PruningPlan,
    layer: int,
    text: Text | Pieces | None,
    advance: Advance,
    team: Team | None = None,
) -> dict[str, Any]:
    """Prune the live weights of a block; gives its report: ``rows``, and the neurons or experts ``kept`` where these are removed.

    Args:
        text: `Pieces` where a ``team`` prunes the block together.
    """
    team = team or Team()
    if plan.method == "experts":
        return prune_experts(streamed, plan, layer, text.texts[0] if isinstance(text, Pieces) else text, advance)
    matrices = streamed.matrices(layer)
    chosen = [matrix for matrix in matrices if matrix.name in plan.goals]
    statistics: dict[str, InputStatistic] = {}
    shares: dict[str, str] = {}
    if text is not None and chosen:
        if isinstance(text, Pieces):
            statistics, shares = text.gather(
                layer, chosen, gram=plan.gram, advance=advance, hold_out=plan.refine is not None
            )
        else:
            statistics, shares = gather(
                text, layer, chosen, gram=plan.gram, advance=advance, hold_out=plan.refine is not None
            )
    if plan.method == "structured":
        assert not isinstance(text, Pieces) or len(text.texts) == 1
        return prune_neurons(
            plan, layer, chosen, statistics, shares, text.texts[0] if isinstance(text, Pieces) else text
        )
    groups: dict[str, list[Matrix]] = {}
    for matrix in chosen:
        groups.setdefault(shares.get(matrix.name, matrix.name), []).append(matrix)
    owners = team.owners({first: _cost(group) for first, group in groups.items()})
    statistics = team.add_up(statistics, {first: owners[first] for first in groups}, streamed.device)
    dtypes = {parameter: streamed.stored_dtype(parameter) for parameter in {matrix.parameter for matrix in chosen}}
    rows = []
    for first, group in groups.items():
        if owners[first] == team.rank:
            statistic = statistics.pop(first, None)
            rows += _prune_group(plan, layer, group, statistic, text is not None, dtypes, advance)
    if team.world > 1:
        rows = [row for found in team.all(rows) for row in found]
        for first, group in groups.items():
            for matrix in group:
                weight = matrix.weight.contiguous()
                team.spread(weight, owners[first])
                matrix.set(weight)
    few = [row for row in rows if row["few_tokens"] and row["tokens"]]
    if few:
        console.print(
            f"block {layer}: {len(few)} expert matrices saw fewer tokens than they have inputs, first {few[0]['name']} ({few[0]['tokens']}); give more samples",
            markup=False,
        )
    place = {matrix.name: i for i, matrix in enumerate(matrices)}
    return {"rows": sorted(rows, key=lambda row: place[row["name"]])}


def _cost(group: Sequence[Matrix]) -> float:
    """Operations of solving matrices that read the same input, about: the factor of the Hessian, and its use in every row."""
    width = group[0].weight.shape[1]
    return width**2 * (width / 3 + sum(matrix.weight.shape[0] for matrix in group))


def _prune_group(
    plan: PruningPlan,
    layer: int,
    group: Sequence[Matrix],
    statistic: InputStatistic | None,
    calibrated: bool,
    dtypes: Mapping[str, torch.dtype],
    advance: Advance,
) -> list[dict[str, Any]]:
    """Prune matrices that read the same input; gives a row each."""
    rows: list[dict[str, Any]] = []
    exact = torch.promote_types(group[0].weight.dtype, torch.float32)
    old = [matrix.weight.to(exact, copy=True) for matrix in group]
    stored = dtypes[group[0].parameter]
    advance.note(_note(layer, group[0]))
    judged = [Judged()] * len(group)
    if plan.refine is not None and statistic is not None:
        judged = _judge(plan, group, old, statistic, stored)
        statistic.add_held_out()
    unseen = calibrated and (statistic is None or statistic.tokens == 0)
    if unseen and (plan.method != "magnitude" or plan.gram):
        statistic = InputStatistic.uniform(group[0].weight, gram=plan.gram)
    new, damping = _solve(plan, group, old, statistic)
    plain = new
    if any(one.pays for one in judged):
        assert statistic is not None
        advance.note(f"{_note(layer, group[0])} {plan.refine}")
        refined = _refine(plan, group, old, plain, statistic, stored)
        new = [better if one.pays else was for one, was, better in zip(judged, plain, refined, strict=True)]
    for matrix, before, was, after, one in zip(group, old, plain, new, judged, strict=True):
        matrix.set(after.to(stored).to(matrix.weight.dtype))
        row = matrix_row(layer, matrix, plan, before, matrix.weight.to(exact), None if unseen else statistic, damping)
        rows.append(row | ({"tokens": 0} if unseen else {}))
        if plan.refine is not None and statistic is not None:
            error_was = None if unseen else _number(statistic.relative_error(before, was.to(stored).to(exact)))
            rows[-1] |= {"error_unrefined": error_was} | one.row()
    error = max((row["error"] for row in rows if row["error"] is not None), default=None)
    advance.note(_note(layer, group[0], error))
    if unseen:
        how = "" if plan.method == "magnitude" else "; pruned as if all its inputs were alike"
        console.print(f"{group[0].name}: no calibration token reached it{how}", markup=False)
    return rows


def _note(layer: int, matrix: Matrix, error: float | None = None) -> str:
    """What the progress bar says beside the time left; short, so that both fit."""
    name = matrix.name.removesuffix(".weight").rpartition(".")[2]
    return f"block {layer} {name}" + ("" if error is None else f" error {error:.2f}")


def _solve(
    plan: PruningPlan, group: Sequence[Matrix], old: Sequence[Tensor], statistic: InputStatistic | None
) -> tuple[list[Tensor], float | None]:
    goals = [plan.goals[matrix.name] for matrix in group]
    if plan.method == "sparsegpt":
        assert statistic is not None
        try:
            new, damping = sparsegpt(old, statistic.hessian(), goals, block_size=plan.block_size, damping=plan.damping)
        except NotPositiveDefiniteError as error:
            raise UserError(
                f"{group[0].name}: its Hessian is not positive definite, not even with damping {100 * plan.damping:g}; give more or other calibration text, or a higher --damping"
            ) from error
        if damping != plan.damping:
            console.print(
                f"{group[0].name}: its Hessian is not positive definite with damping {plan.damping:g}; {damping:g} was used",
                markup=False,
            )
        return new, damping
    if plan.method == "magnitude":
        return [weight.masked_fill(magnitude(weight, goal), 0.0) for weight, goal in zip(old, goals, strict=True)], None
    assert statistic is not None
    norm = statistic.norm()
    masks = [wanda(weight, norm, goal, variant=plan.variant) for weight, goal in zip(old, goals, strict=True)]
    return [weight.masked_fill(mask, 0.0) for weight, mask in zip(old, masks, strict=True)], None


@dataclass(frozen=True)
class Judged:
    """Relative errors on the samples held out, as the method left a matrix and refined, both fitted to the other samples; None without any."""

    unrefined: float | None = None
    refined: float | None = None

    @property
    def pays(self) -> bool:
        return self.unrefined is not None and self.refined is not None and self.refined < self.unrefined

    def row(self) -> dict[str, Any]:
        return {
            "refined": self.pays,
            "held_out_unrefined": self.unrefined,
            "held_out_refined": self.refined,
            "held_out": self.refined if self.pays else self.unrefined,
        }


def _judge(
    plan: PruningPlan,
    group: Sequence[Matrix],
    old: Sequence[Tensor],
    statistic: InputStatistic,
    stored: torch.dtype,
) -> list[Judged]:
    """Whether refining pays for each matrix: fitted to a part of the text, judged on the other, with the weights as they would be stored."""
    held = statistic.held_out
    if held is None or not held.tokens or not statistic.tokens:
        return [Judged()] * len(group)
    plain, _ = _solve(plan, group, old, statistic)
    refined = _refine(plan, group, old, plain, statistic, stored)
    errors = [
        [_number(held.relative_error(whole, new.to(stored).to(whole.dtype))) for whole, new in zip(old, found, strict=True)]
        for found in (plain, refined)
    ]  # fmt: skip
    return [Judged(*each) for each in zip(*errors, strict=True)]


def _number(error: float) -> float | None:
    return None if math.isnan(error) else error


def _refine(
    plan: PruningPlan,
    group: Sequence[Matrix],
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    statistic: InputStatistic,
    stored: torch.dtype,
) -> list[Tensor]:
    """What `_solve` found for matrices that read the same input, refined."""
    assert plan.refine is not None
    with full_float32():
        return refine(
            plan.refine,
            old,
            new,
            statistic.hessian(),
            [plan.goals[matrix.name] for matrix in group],
            damping=plan.damping,
            fit=plan.method == "sparsegpt",
            per_row=plan.method == "wanda" and not plan.variant,
            steps=plan.refine_steps,
            rounded=lambda weights: weights.to(stored).to(weights.dtype),
        )


def _say_block(layer: int, blocks: int, rows: Sequence[dict[str, Any]], seconds: float) -> None:
    errors = [row["error"] for row in rows if row["error"] is not None]
    worst = f", relative error {max(errors):.3f} at worst" if errors else ""
    judged = [row for row in rows if row.get("held_out_refined") is not None]
    if errors and judged:
        was, now = (sum(row[name] for row in judged) / len(judged) for name in ("held_out_unrefined", "held_out"))
        kept = sum(row["refined"] for row in judged)
        worst += f"; held out {now:.3f} on average, {was:.3f} unrefined, {kept} of {len(judged)} refined"
    console.print(f"block {layer + 1} of {blocks}{worst}, {seconds:.1f} s", markup=False)
