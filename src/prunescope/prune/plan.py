"""What every matrix shall lose, decided before any work: goals by name, sizes that a config can say, samples at a time."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from prunescope.errors import UserError
from prunescope.models.blockwise import StreamedModel
from prunescope.models.experts import Experts, count_fields, find_experts
from prunescope.models.matrices import MLP_SIZES, Neurons, find_neurons
from prunescope.prune.masks import Goal
from prunescope.prune.refine import Refine

__all__ = [
    "RESHAPING",
    "Method",
    "PruningPlan",
    "experts_of",
    "has_fused_experts",
    "make_plan",
    "removed_neurons",
    "samples_at_a_time",
    "smaller_config",
]

Method = Literal["magnitude", "wanda", "sparsegpt", "structured", "experts"]
RESHAPING = ("structured", "experts")  # methods that change shapes, and the config with them
_EXPERT_MULTIPLE = 8  # PyTorch's grouped product of fused experts takes rows of whole 16 bytes
_TOKENS_AT_A_TIME, _TOKENS_ON_GPU = 2048, 8192


@dataclass(frozen=True)
class PruningPlan:
    """What each matrix shall lose, by its name; for `structured`, what each MLP shall lose of its neurons."""

    method: Method
    goals: dict[str, Goal]  # matrices with nothing to lose are left out
    block_size: int = 128
    damping: float = 0.01
    variant: bool = False
    refine: Refine | None = None
    refine_steps: int | None = None
    sizes: tuple[int, ...] = ()  # numbers of neurons that the config names, for `structured`
    multiple: int = 1  # of which the neurons that stay are a multiple

    @property
    def gram(self) -> bool:
        """Whether Gram matrices of the inputs are needed, and not their norms alone."""
        return self.method == "sparsegpt" or self.refine is not None


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
    refine: Refine | None = None,
    refine_steps: int | None = None,
) -> PruningPlan:
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
        if chosen.of and width % chosen.of and method not in RESHAPING:
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
    if method == "experts":
        if goal.of or overrides or by_layer is not None:
            raise UserError(
                "experts removes the same number of whole experts in every layer, since config.json holds one count; give --sparsity alone"
            )
        goals = {matrix.name: goal for matrix in matrices if matrix.fused}
        expert_counts(streamed, goal)  # complains
    kept = {name: chosen for name, chosen in goals.items() if chosen.of or chosen.sparsity > 0}
    weights = {matrix.name: matrix.weight.numel() for matrix in matrices}
    if not any(chosen.count(weights[name]) for name, chosen in kept.items()):
        raise UserError(f"nothing would be pruned at sparsity {goal}; raise it")
    sizes = tuple(sorted(set(config_sizes(streamed).values()))) if method == "structured" else ()
    multiple = _EXPERT_MULTIPLE if any(matrix.fused for matrix in matrices) else 1
    return PruningPlan(method, kept, block_size, damping, variant, refine, refine_steps, sizes, multiple)


def _matches(name: str, pattern: str) -> bool:
    plain = name.removesuffix(".weight")
    return any(fnmatch.fnmatchcase(spelling, pattern) for spelling in (name, plain, name.partition("[")[0]))


def has_fused_experts(streamed: StreamedModel) -> bool:
    """Whether a block keeps its experts in one weight; then samples run one by one, so that batches change nothing."""
    return any(matrix.fused for layer in range(len(streamed.blocks)) for matrix in streamed.matrices(layer))


def samples_at_a_time(streamed: StreamedModel, length: int, asked: int | None = None) -> int:
    """Samples of ``length`` tokens in a batch: as many as ``asked`` for, by default 2048 tokens (8192 on a GPU); one where experts are
    fused, since which rows an expert gets must not depend on the batch."""
    tokens = _TOKENS_ON_GPU if streamed.device.type == "cuda" else _TOKENS_AT_A_TIME
    return 1 if has_fused_experts(streamed) else asked or max(1, tokens // length)


# --- neurons -----------------------------------------------------------------------------------------------------------


def removed_neurons(plan: PruningPlan, neurons: Neurons) -> int:
    """Neurons that go; at least one stays. Shared experts are several experts side by side, and lose a multiple of what one loses."""
    one = next(
        (size for size in plan.sizes if neurons.count % size == 0 and neurons.count not in plan.sizes), neurons.count
    )
    return neurons.count // one * (one - _left(plan, one))


def _left(plan: PruningPlan, size: int) -> int:
    """Neurons that stay of ``size``: never none, and a multiple where experts are fused."""
    goal = next(iter(plan.goals.values()))
    left = max(1, size - goal.count(size))
    return min(size, -(-left // plan.multiple) * plan.multiple)


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


def experts_of(streamed: StreamedModel, layer: int) -> Experts | None:
    """The routed experts of block ``layer``, see `find_experts`."""
    top_k = getattr(streamed.model.config.get_text_config(decoder=True), "num_experts_per_tok", None)
    return find_experts(streamed.loaded.anatomy.blocks[layer], streamed.names[layer], top_k)


def expert_counts(streamed: StreamedModel, goal: Goal) -> dict[str, int]:
    """The fields of the config that hold the number of routed experts, with how many remain.

    Raises:
        UserError: no block has experts, blocks have different numbers of them, or see `find_experts` and `Experts.left`.
    """
    config = streamed.model.config.get_text_config(decoder=True)
    found = [experts for layer in range(len(streamed.blocks)) if (experts := experts_of(streamed, layer))]
    name = type(streamed.model).__name__
    if not found:
        raise UserError(f"{name}: no block has routed experts; choose another --method")
    counts = {experts.count for experts in found}
    fields = count_fields(config, found[0].count)
    if len(counts) > 1 or not fields:
        raise UserError(f"{name}: no field of its config gives its number of experts ({', '.join(map(str, sorted(counts)))}); choose another --method")  # fmt: skip
    left = {experts.left(goal.count) for experts in found}
    return dict.fromkeys(fields, left.pop())


def smaller_config(streamed: StreamedModel, plan: PruningPlan) -> tuple[dict[str, int], dict[str, torch.Size]]:
    """New values of the config's sizes, and the shapes of all parameters in a model built from them.

    Raises:
        UserError: no field of the config gives the sizes of this architecture.
    """
    if plan.method == "experts":
        sizes = expert_counts(streamed, next(iter(plan.goals.values())))
        return sizes, _rebuilt(streamed, sizes)
    sizes = {key: _left(plan, size) for key, size in config_sizes(streamed).items()}
    name = type(streamed.model).__name__
    if not sizes:
        raise UserError(f"{name}: no field of its config gives its number of MLP neurons; use another method")
    if all(size == old for size, old in zip(sizes.values(), config_sizes(streamed).values(), strict=True)):
        raise UserError(
            f"structured pruning at sparsity {next(iter(plan.goals.values()))} would remove no neuron of {min(sizes.values())} (multiples of {plan.multiple} stay); raise --sparsity"
        )
    return sizes, _rebuilt(streamed, sizes)


def _rebuilt(streamed: StreamedModel, sizes: Mapping[str, int]) -> dict[str, torch.Size]:
    """The shapes of all parameters of a model whose config says ``sizes``."""
    config = copy.deepcopy(streamed.model.config)
    inner = config.get_text_config(decoder=True)
    for key, size in sizes.items():
        setattr(inner, key, size)
    with torch.device("meta"):
        rebuilt = type(streamed.model)(config)
    return {key: parameter.shape for key, parameter in rebuilt.named_parameters(remove_duplicate=False)}
