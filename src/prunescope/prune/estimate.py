"""What a run of `sparsify` would do and need, from shapes alone and one measured matrix product."""

from __future__ import annotations

import time
from typing import Any

import torch

from prunescope.models.blockwise import StreamedModel
from prunescope.models.matrices import find_neurons
from prunescope.prune.calibrate import rows_held
from prunescope.prune.plan import RESHAPING, PruningPlan, removed_neurons, smaller_config
from prunescope.prune.refine import GRADUAL_STEPS, SCANS, STEPS

__all__ = ["estimate"]


def estimate(
    streamed: StreamedModel, plan: PruningPlan, tokens: int, tokens_at_a_time: int, limit: int
) -> dict[str, Any]:
    """Modules with what they would lose, bytes to write, and rough memory (bytes) and time (seconds).

    Time counts floating-point operations: two passes of the text, the Gram matrices, and SparseGPT's factorisation and updates, at the
    rate of a matrix product measured now. Memory is that of the largest block on top of the process itself.
    """
    if plan.method in RESHAPING:
        smaller_config(streamed, plan)  # complains where the run would
    rows: list[dict[str, Any]] = []
    operations, memory = 0.0, 0
    for layer in range(len(streamed.blocks)):
        matrices = streamed.matrices(layer)
        parameters = sum(p.numel() for p in streamed.blocks[layer].parameters())
        operations += (4 if tokens else 0) * parameters * tokens
        widths: dict[tuple[str, int | None, int], int] = {}
        removed = {}
        if plan.method == "structured":
            removed = {neurons.name: removed_neurons(plan, neurons) for neurons in find_neurons(matrices)}
        for matrix in (m for m in matrices if m.name in plan.goals and (not removed or m.name in removed)):
            outputs, inputs = matrix.weight.shape
            goal = plan.goals[matrix.name]
            gone = (
                goal.count(outputs * inputs) if plan.method != "wanda" or plan.variant else goal.count(inputs) * outputs
            )
            if plan.method == "experts":
                gone = int(outputs * inputs * goal.sparsity)
            if removed:
                gone = outputs * removed[matrix.name]
            rows.append(
                {
                    "layer": layer,
                    "name": matrix.name,
                    "outputs": outputs,
                    "inputs": inputs,
                    "asked": str(goal),
                    "zeros": gone,
                }
            )
            owner = matrix.parameter.rsplit(".", 2)[0]
            widths[owner, matrix.expert, inputs] = outputs
            if plan.method == "sparsegpt":
                operations += (1 + (plan.refine is not None)) * 2.0 * outputs * inputs**2
            operations += _refining(plan, outputs, inputs)
        if plan.gram:
            operations += sum(1.2 * tokens * n**2 + 2.0 / 3 * n**3 for _, _, n in widths)
        waits = 2 if streamed.device.type == "cuda" else 0  # bytes of each number that `InputStatistic` holds back
        grams = sum(4 * n * n + waits * n * rows_held(n) for _, _, n in widths) + 8 * max(
            (n * n for _, _, n in widths), default=0
        )
        largest = max((m.weight.numel() for m in matrices), default=0)
        itemsize = streamed.model.dtype.itemsize
        activations = 8 * tokens_at_a_time * max((m.weight.shape[1] for m in matrices), default=0) * itemsize
        memory = max(
            memory,
            parameters * itemsize
            + 12 * largest
            + activations
            + grams * (1 + 2 * (plan.refine is not None)) * plan.gram,
        )
    hidden = tokens * streamed.loaded.anatomy.hidden_size * streamed.model.dtype.itemsize
    written = sum(tensor.nbytes for tensor in streamed.stored.values())
    total = sum(row["outputs"] * row["inputs"] for row in rows)
    return {
        "modules": rows,
        "sparsity": sum(row["zeros"] for row in rows) / total,
        "bytes_written": written,
        "memory_bytes": memory + min(hidden, limit),
        "spilled_bytes": hidden if hidden > limit else 0,
        "seconds": operations / _rate(streamed.device),
        "tokens": tokens,
    }


def _refining(plan: PruningPlan, outputs: int, inputs: int) -> float:
    """Operations of `refine`, once on trial and once for good. Swaps look at a quarter of a row's pairs in a scan, with some four operations each that wait for memory."""
    if plan.refine is None:
        return 0.0
    scans, steps = (
        plan.refine_steps or SCANS,
        plan.refine_steps or (GRADUAL_STEPS if plan.refine == "admm-gradual" else STEPS),
    )
    products = scans * ("swaps" in plan.refine) * 10.0 + steps * ("admm" in plan.refine) * 2.0
    return 2 * products * outputs * inputs**2


def _rate(device: torch.device) -> float:
    """Floating-point operations a second of a float32 matrix product, measured."""
    a = torch.ones(1024, 1024, device=device)
    a @ a
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        b = a @ a
        float(b[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best
