"""Prune the weights of a model, block by block, each calibrated on the outputs of the pruned ones before it.

Weights are read from disk a block at a time and written as soon as they are pruned: a shard a block, which is also what an interrupted run
goes on from. Everything that the source checkpoint holds and pruning does not touch is copied byte by byte.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prunescope.errors import UserError
from prunescope.models.blockwise import StreamedModel, pruned_weights
from prunescope.models.matrices import MLP_SIZES, Matrix, Neurons, find_neurons, remove_neurons
from prunescope.progress import Advance, console, progress
from prunescope.prune.calibrate import InputStatistic, Text, gather
from prunescope.prune.checkpoint import finish, finished_parts, part, report, reports, write_part
from prunescope.prune.magnitude import magnitude
from prunescope.prune.masks import Goal
from prunescope.prune.sparsegpt import NotPositiveDefiniteError, sparsegpt
from prunescope.prune.structured import structured
from prunescope.prune.wanda import wanda, wanda_scores

__all__ = ["Method", "Plan", "Pruned", "has_fused_experts", "make_plan", "owl_sparsities", "prune_block", "prune_model"]

Method = Literal["magnitude", "wanda", "sparsegpt", "structured"]
_EXPERT_MULTIPLE = 8  # PyTorch's grouped product of fused experts takes rows of whole 16 bytes


@dataclass(frozen=True)
class Plan:
    """What each matrix shall lose, by its name; for `structured`, what each MLP shall lose of its neurons."""

    method: Method
    goals: dict[str, Goal]  # matrices with nothing to lose are left out
    block_size: int = 128
    damping: float = 0.01
    variant: bool = False
    sizes: tuple[int, ...] = ()  # numbers of neurons that the config names, for `structured`
    multiple: int = 1  # of which the neurons that stay are a multiple


@dataclass
class Pruned:
    """What was done: a row a matrix, perplexities, and the fields of the config that change."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)
    config: dict[str, int] = field(default_factory=dict)


# --- planning ----------------------------------------------------------------------------------------------------------


def make_plan(
    streamed: StreamedModel,
    method: Method,
    goal: Goal,
    *,
    overrides: Mapping[str, Goal] | None = None,
    by_layer: Sequence[float] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    variant: bool = False,
) -> Plan:
    """Decide what every matrix shall lose.

    Args:
        goal: for all matrices that nothing else is said of.
        overrides: glob pattern of matrix names -> goal; the last pattern that matches a name counts. Sparsity 0 leaves a matrix alone.
        by_layer: sparsity of each block (OWL); overrides go before it.
    Raises:
        UserError: a pattern that matches nothing, N:M that does not divide a width, or neurons of different number a layer.
    """
    matrices = [matrix for layer in range(len(streamed.blocks)) for matrix in streamed.matrices(layer)]
    goals = {m.name: goal for m in matrices}
    if by_layer is not None:
        for layer, sparsity in enumerate(by_layer):
            goals |= {matrix.name: Goal(sparsity) for matrix in streamed.matrices(layer)}
    for pattern, chosen in (overrides or {}).items():
        matched = [name for name in goals if _matches(name, pattern)]
        if not matched:
            raise UserError(
                f"module pattern {pattern!r} matches no matrix of the model; its names are like {matrices[0].parameter}"
            )
        goals |= dict.fromkeys(matched, chosen)
    for matrix in matrices:
        chosen, width = goals[matrix.name], matrix.weight.shape[1]
        if chosen.of and width % chosen.of and method != "structured":
            raise UserError(
                f"pattern {chosen}: {matrix.name} has {width} inputs, which {chosen.of} does not divide; choose another M, or leave it out with --sparsity-map"
            )
    if method == "structured":
        if goal.of:
            raise UserError("structured pruning removes whole neurons; give --sparsity, not --pattern")
        if overrides or by_layer is not None:
            raise UserError(
                "structured pruning needs the same share in every layer, since config.json holds one size; leave --sparsity-map and --allocation out"
            )
        goals = {matrix.name: goal for matrix in matrices if matrix.kind == "mlp"}
    kept = {name: chosen for name, chosen in goals.items() if chosen.of or chosen.sparsity > 0}
    weights = {matrix.name: matrix.weight.numel() for matrix in matrices}
    if not any(chosen.count(weights[name]) for name, chosen in kept.items()):
        raise UserError(f"nothing would be pruned at sparsity {goal}; raise it")
    sizes = tuple(sorted(set(config_sizes(streamed).values()))) if method == "structured" else ()
    multiple = _EXPERT_MULTIPLE if any(matrix.fused for matrix in matrices) else 1
    return Plan(method, kept, block_size, damping, variant, sizes, multiple)


def _matches(name: str, pattern: str) -> bool:
    plain = name.removesuffix(".weight")
    return any(fnmatch.fnmatchcase(spelling, pattern) for spelling in (name, plain, name.partition("[")[0]))


def has_fused_experts(streamed: StreamedModel) -> bool:
    """Whether a block keeps its experts in one weight; then samples run one by one, so that batches change nothing."""
    return any(matrix.fused for layer in range(len(streamed.blocks)) for matrix in streamed.matrices(layer))


# --- pruning -----------------------------------------------------------------------------------------------------------


def prune_model(
    streamed: StreamedModel,
    plan: Plan,
    tokens: Tensor | None,
    folder: Path,
    *,
    perplexity: Tensor | None = None,
    batch_size: int = 1,
    perplexity_batch_size: int = 1,
    limit: int = 2**32,
) -> Pruned:
    """Prune every block and write the checkpoint's weights and config into ``folder``.

    Blocks that ``folder`` holds already (``part-*``, of the same plan and text) are not pruned again.

    Args:
        tokens: calibration ``(samples, length)``; None only for magnitude, which then measures no reconstruction error.
        perplexity: ``(windows, length)``; measured before and after, in the same passage of the blocks.
        limit: bytes of hidden states in memory.
    Raises:
        UserError: see `gather`; a Hessian that cannot be factorised.
        FloatingPointError: a block's output overflows.
    """
    scratch = folder / "scratch"
    reports(folder).mkdir(exist_ok=True)
    blocks = len(streamed.blocks)
    shapes: dict[str, torch.Size] = {}
    pruned = Pruned()
    if plan.method == "structured":
        pruned.config, shapes = smaller_config(streamed, plan)
    done = finished_parts(folder, blocks)
    shares = limit // (1 + 2 * (perplexity is not None))

    def text(of: Tensor, name: str, batch: int) -> Text:
        return Text(streamed, of, batch, shares, scratch / name)

    calibration = text(tokens, "calibration.bin", batch_size) if tokens is not None else None
    before = after = None
    if perplexity is not None:
        before, after = (text(perplexity, f"{name}.bin", perplexity_batch_size) for name in ("before", "after"))
    units = (2 * len(tokens) if tokens is not None else 0) + (2 * len(perplexity) if perplexity is not None else 0) or 1
    earlier: Mapping[str, Tensor] | None = None
    if done and plan.method != "structured":
        earlier = pruned_weights(streamed, [part(folder, layer) for layer in range(done)], scratch)
    with progress(f"pruning ({plan.method})", blocks * units) as advance:
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
                    found = json.loads(report(folder, layer).read_text("utf-8"))
                    if plan.method == "structured":
                        _cut_again(streamed, plan, layer, found["kept"])
                    if calibration is not None:
                        advance(len(calibration.tokens))
                else:
                    found = prune_block(streamed, plan, layer, calibration, advance)
                    if shapes:
                        _check_shapes(streamed, layer, shapes)
                    write_part(streamed, folder, layer, found)
                pruned.rows += found["rows"]
                for stream in (calibration if not last else None, after):
                    if stream is not None:
                        stream.run(layer, keep=True, advance=advance)
            if layer >= done:
                _say_block(layer, blocks, found["rows"], time.monotonic() - started)
    if before is not None and after is not None:
        embedding = streamed.model.get_input_embeddings()
        tied = streamed.model.get_output_embeddings().weight is embedding.weight
        with (
            streamed.outside(skip=() if tied else (embedding,)),
            progress("perplexity", 2 * len(before.tokens)) as advance,
        ):
            pruned.perplexity = {"dense": before.perplexity(advance), "pruned": after.perplexity(advance)}
    for stream in (calibration, before, after):
        if stream is not None:
            stream.close()
    finish(streamed, folder, pruned.config)
    return pruned


def prune_block(streamed: StreamedModel, plan: Plan, layer: int, text: Text | None, advance: Advance) -> dict[str, Any]:
    """Prune the live weights of a block; gives its report: ``rows``, and for `structured` the neurons ``kept``."""
    matrices = streamed.matrices(layer)
    chosen = [matrix for matrix in matrices if matrix.name in plan.goals]
    statistics: dict[str, InputStatistic] = {}
    shares: dict[str, str] = {}
    if text is not None and chosen:
        gram = plan.method == "sparsegpt"
        statistics, shares = gather(text, layer, chosen, gram=gram, advance=advance)
    if plan.method == "structured":
        return _prune_neurons(plan, layer, chosen, statistics, shares, text)
    groups: dict[str, list[Matrix]] = {}
    for matrix in chosen:
        groups.setdefault(shares.get(matrix.name, matrix.name), []).append(matrix)
    dtypes = {parameter: streamed.stored_dtype(parameter) for parameter in {matrix.parameter for matrix in chosen}}
    rows = []
    for first, group in groups.items():
        statistic = statistics.pop(first, None)
        unseen = text is not None and (statistic is None or statistic.tokens == 0)
        if unseen and plan.method != "magnitude":
            statistic = _uniform(group[0], plan.method == "sparsegpt")
        exact = torch.promote_types(group[0].weight.dtype, torch.float32)
        old = [matrix.weight.to(exact, copy=True) for matrix in group]
        advance.note(_note(layer, group[0]))
        new, damping = _solve(plan, group, old, statistic)
        for matrix, before, after in zip(group, old, new, strict=True):
            matrix.set(after.to(dtypes[matrix.parameter]).to(matrix.weight.dtype))
            rows.append(
                _row(layer, matrix, plan, before, matrix.weight.to(exact), None if unseen else statistic, damping)
                | ({"tokens": 0} if unseen else {})
            )
        error = max((row["error"] for row in rows[-len(group) :] if row["error"] is not None), default=None)
        advance.note(_note(layer, group[0], error))
        if unseen:
            how = "" if plan.method == "magnitude" else "; pruned as if all its inputs were alike"
            console.print(f"{group[0].name}: no calibration token reached it{how}", markup=False)
    few = [row for row in rows if row["few_tokens"] and row["tokens"]]
    if few:
        console.print(
            f"block {layer}: {len(few)} expert matrices saw fewer tokens than they have inputs, first {few[0]['name']} ({few[0]['tokens']}); give more samples",
            markup=False,
        )
    place = {matrix.name: i for i, matrix in enumerate(matrices)}
    return {"rows": sorted(rows, key=lambda row: place[row["name"]])}


def _note(layer: int, matrix: Matrix, error: float | None = None) -> str:
    """What the progress bar says beside the time left; short, so that both fit."""
    name = matrix.name.removesuffix(".weight").rpartition(".")[2]
    return f"block {layer} {name}" + ("" if error is None else f" error {error:.2f}")


def _uniform(matrix: Matrix, gram: bool) -> InputStatistic:
    """Stands in for an expert that no token reached: every input alike."""
    width = matrix.weight.shape[1]
    statistic = InputStatistic(width, matrix.weight.device, gram=gram)
    statistic.squares.fill_(1)
    if statistic.gram is not None:
        statistic.gram.diagonal().fill_(1)
    return statistic


def _solve(
    plan: Plan, group: Sequence[Matrix], old: Sequence[Tensor], statistic: InputStatistic | None
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


def _row(
    layer: int,
    matrix: Matrix,
    plan: Plan,
    old: Tensor,
    new: Tensor,
    statistic: InputStatistic | None,
    damping: float | None,
) -> dict[str, Any]:
    goal = plan.goals[matrix.name]
    zeros = new.numel() - int(new.count_nonzero())
    tokens = None if statistic is None else statistic.tokens
    error = math.nan if statistic is None else statistic.relative_error(old, new)
    return {
        "layer": layer,
        "name": matrix.name,
        "outputs": new.shape[0],
        "inputs": new.shape[1],
        "asked": str(goal),
        "zeros": zeros,
        "sparsity": zeros / new.numel(),
        "error": None if math.isnan(error) else error,
        "dead_inputs": None if statistic is None else int((statistic.norm() == 0).sum()),
        "damping": damping,
        "tokens": tokens,
        "few_tokens": matrix.fused and statistic is not None and statistic.tokens < new.shape[1],
    }


# --- structured --------------------------------------------------------------------------------------------------------


def _prune_neurons(
    plan: Plan,
    layer: int,
    matrices: Sequence[Matrix],
    statistics: dict[str, InputStatistic],
    shares: dict[str, str],
    text: Text | None,
) -> dict[str, Any]:
    assert text is not None
    units = find_neurons(matrices)
    kept: list[Tensor] = []
    rows = []
    for neurons in units:
        statistic = statistics.get(shares.get(neurons.reader.name, ""))
        unseen = statistic is None or statistic.tokens == 0
        if statistic is None or unseen:
            statistic = _uniform(neurons.reader, False)
            console.print(
                f"{neurons.name}: no calibration token reached it; pruned as if all its inputs were alike", markup=False
            )
        weight = neurons.reader.weight
        stay = structured(weight, statistic.norm(), removed_neurons(plan, neurons))
        kept.append(stay)
        zeroed = torch.zeros_like(weight).index_copy_(1, stay, weight.index_select(1, stay))
        row = _row(layer, neurons.reader, plan, weight, zeroed, None if unseen else statistic, None)
        rows.append(
            row | {"neurons": neurons.count, "removed": neurons.count - len(stay)} | ({"tokens": 0} if unseen else {})
        )
    expected = _zeroed_output(text, layer, units, kept)
    remove_neurons(units, kept)
    _check_cut(text, layer, expected)
    for row, neurons in zip(rows, units, strict=True):
        outputs, inputs = neurons.reader.weight.shape
        row |= {"outputs": outputs, "inputs": inputs, "zeros": 0, "sparsity": row["removed"] / row["neurons"]}
        row["zeros"] = int(neurons.reader.weight.numel() - neurons.reader.weight.count_nonzero())
    return {"rows": rows, "kept": [stay.tolist() for stay in kept]}


def removed_neurons(plan: Plan, neurons: Neurons) -> int:
    """Neurons that go; at least one stays. Shared experts are several experts side by side, and lose a multiple of what one loses."""
    one = next(
        (size for size in plan.sizes if neurons.count % size == 0 and neurons.count not in plan.sizes), neurons.count
    )
    return neurons.count // one * (one - _left(plan, one))


def _left(plan: Plan, size: int) -> int:
    """Neurons that stay of ``size``: never none, and a multiple where experts are fused."""
    goal = next(iter(plan.goals.values()))
    left = max(1, size - goal.count(size))
    return min(size, -(-left // plan.multiple) * plan.multiple)


def _zeroed_output(text: Text, layer: int, units: Sequence[Neurons], kept: Sequence[Tensor]) -> Tensor:
    """The block's output on the first batch with the neurons silenced instead of removed."""
    saved = []
    for neurons, stay in zip(units, kept, strict=True):
        weight = neurons.reader.weight
        saved.append((neurons.reader, weight.clone()))
        neurons.reader.set(torch.zeros_like(weight).index_copy_(1, stay, weight.index_select(1, stay)))
    out = text.first_output(layer)
    for matrix, value in saved:
        matrix.set(value)
    return out


def _check_cut(text: Text, layer: int, expected: Tensor) -> None:
    """Removing neurons must give what silencing them gives: it does not where a matrix is laid out otherwise than is known here."""
    out = text.first_output(layer)
    scale = expected.float().abs().max().clamp(min=1e-30)
    error = float((out.float() - expected.float()).abs().max() / scale)
    if not error <= 64 * torch.finfo(out.dtype).eps * math.sqrt(out.shape[-1]):
        raise UserError(
            f"block {layer}: removing neurons changes more than silencing them does (by {error:.1e}); the MLP of this architecture is not supported by structured"
        )


def _cut_again(streamed: StreamedModel, plan: Plan, layer: int, kept: list[list[int]]) -> None:
    matrices = [matrix for matrix in streamed.matrices(layer) if matrix.name in plan.goals]
    units = find_neurons(matrices)
    remove_neurons(units, [torch.tensor(stay, device=streamed.device) for stay in kept])


def config_sizes(streamed: StreamedModel) -> dict[str, int]:
    """The fields of the config that hold numbers of neurons of an MLP, with their values."""
    config = streamed.model.config.get_text_config(decoder=True)
    counts = {n.count for layer in range(len(streamed.blocks)) for n in find_neurons(streamed.matrices(layer))}
    sizes = {}
    for key in MLP_SIZES:
        size = getattr(config, key, None)
        if key == "n_inner" and size is None and hasattr(config, key):
            size = 4 * config.n_embd
        if isinstance(size, int) and any(count % size == 0 for count in counts):
            sizes[key] = size
    return sizes


def smaller_config(streamed: StreamedModel, plan: Plan) -> tuple[dict[str, int], dict[str, torch.Size]]:
    """New values of the config's sizes, and the shapes of all parameters in a model built from them.

    Raises:
        UserError: no field of the config gives the sizes of this architecture.
    """
    sizes = {key: _left(plan, size) for key, size in config_sizes(streamed).items()}
    name = type(streamed.model).__name__
    if not sizes:
        raise UserError(f"{name}: no field of its config gives its number of MLP neurons; use another method")
    if all(size == old for size, old in zip(sizes.values(), config_sizes(streamed).values(), strict=True)):
        raise UserError(
            f"structured pruning at sparsity {next(iter(plan.goals.values()))} would remove no neuron of {min(sizes.values())} (multiples of {plan.multiple} stay); raise --sparsity"
        )
    config = copy.deepcopy(streamed.model.config)
    inner = config.get_text_config(decoder=True)
    for key, size in sizes.items():
        setattr(inner, key, size)
    with torch.device("meta"):
        rebuilt = type(streamed.model)(config)
    return sizes, {key: parameter.shape for key, parameter in rebuilt.named_parameters(remove_duplicate=False)}


def _check_shapes(streamed: StreamedModel, layer: int, shapes: Mapping[str, torch.Size]) -> None:
    """What is left of a block must be what transformers will build from the new config."""
    for name, parameter in streamed.blocks[layer].named_parameters(prefix=streamed.names[layer]):
        if shapes.get(name) != parameter.shape:
            raise UserError(
                f"{name} would have the shape {tuple(parameter.shape)}, but the config can only say {tuple(shapes.get(name, ()))}; use another --sparsity or method"
            )


def _say_block(layer: int, blocks: int, rows: Sequence[dict[str, Any]], seconds: float) -> None:
    errors = [row["error"] for row in rows if row["error"] is not None]
    worst = f", relative error {max(errors):.3f} at worst" if errors else ""
    console.print(f"block {layer + 1} of {blocks}{worst}, {seconds:.1f} s", markup=False)


# --- outlier-weighed sparsity ------------------------------------------------------------------------------------------


def owl_sparsities(
    streamed: StreamedModel,
    tokens: Tensor,
    sparsity: float,
    *,
    threshold: float,
    spread: float,
    batch_size: int,
    limit: int,
    file: Path,
) -> list[float]:
    """Sparsity of each block by OWL (Yin et al., arXiv 2310.05175): blocks with more outliers among their Wanda scores lose less.

    A block's outlier ratio is the share of its scores |W| x input norm above ``threshold`` times their mean, in the dense model. Ratios are
    stretched to ``sparsity`` plus or minus ``spread`` at most, their mean kept.
    """
    text = Text(streamed, tokens, batch_size, limit, file)
    blocks = len(streamed.blocks)
    ratios = []
    with progress(f"outliers of {blocks} blocks", 2 * blocks * len(tokens)) as advance:
        for layer in range(blocks):
            with streamed.block(layer):
                matrices = streamed.matrices(layer)
                statistics, shares = gather(text, layer, matrices, gram=False, advance=advance)
                norms = {m.name: statistics[shares[m.name]].norm() for m in matrices if m.name in shares}
                scores = [wanda_scores(m.weight, norms[m.name]) for m in matrices if m.name in norms]
                count = sum(score.numel() for score in scores)
                mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
                ratios.append(sum(int((score > threshold * mean).sum()) for score in scores) / count)
                text.run(layer, keep=True, advance=advance)
    text.close()
    return stretch(ratios, sparsity, spread)


def stretch(ratios: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """OWL's rule: the densities ``1 - sparsity`` of blocks follow their ratios over a range of 2 x spread, mean kept."""
    low, high = min(ratios), max(ratios)
    scaled = [(ratio - low) / (high - low) * 2 * spread if high > low else 0.0 for ratio in ratios]
    mean = sum(scaled) / len(scaled)
    found = [sparsity - (value - mean) for value in scaled]
    if not all(0 <= value < 1 for value in found):
        raise UserError(
            f"sparsity {sparsity} with a spread of {spread} gives a block {min(found):.2f} or {max(found):.2f}; choose a smaller --owl-spread"
        )
    return found
