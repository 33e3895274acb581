"""From sizes and times to the rows of `speed`, and in words where a format saves nothing."""

from __future__ import annotations

from typing import Any

from prunescope.speed.measure import Measured, Workload
from prunescope.speed.timing import Rates

__all__ = ["notes", "rows_of", "short"]

_FEW_ZEROS = 0.01  # a share of zeros below which a model counts as dense


def rows_of(one: Measured, base: Measured, rates: Rates, workload: Workload) -> list[dict[str, Any]]:
    """The table's rows of a model, one for each batch size; ``base`` is the first model, which gains are relative to."""
    rows = []
    for size, (prefill, step) in one.times.items():
        operations = None if one.operations is None else size * (one.operations + one.head_operations)
        floors = {
            "prefill": None if operations is None else operations / rates.operations_per_s,
            "decode": None if operations is None else one.facts["step_bytes"] / rates.bytes_per_s,
        }
        row = {
            "model": one.name,
            "batch_size": size,
            "length": workload.length,
            "new_tokens": workload.max_new_tokens,
            **{key: value for key, value in one.facts.items() if key != "base"},
        }
        tokens = {"prefill": size * workload.length, "decode": size}
        for kind, timing, other in zip(("prefill", "decode"), (prefill, step), base.times[size], strict=True):
            floor = floors[kind]
            row |= {
                f"{kind}_s": timing.median,
                f"{kind}_s_min": min(timing.seconds),
                f"{kind}_s_max": max(timing.seconds),
                f"{kind}_tokens_per_s": tokens[kind] / timing.median,
                f"{kind}_floor_s": floor,
                f"{kind}_over_floor": None if floor is None else timing.median / floor,
                f"{kind}_speedup": other.median / timing.median,
                f"{kind}_within_spread": one is base or timing.same_as(other),
            }
        rows.append(row)
    return rows


def short(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that stand in the summary."""
    keys = ("memory_bytes", "prefill_tokens_per_s", "prefill_speedup", "decode_tokens_per_s", "decode_speedup")
    return {key: row[key] for key in (*keys, "prefill_within_spread", "decode_within_spread")}


def notes(facts: dict[str, Any]) -> list[str]:
    """Where a format saves nothing, in plain words."""
    found = []
    if facts["format"] == "zeroed":
        found.append(
            "zeroed saves nothing: silent sublayers are stored, computed and cached like any other; compact saves all, recipe time and cache"
        )
    if facts["format"] == "recipe":
        found.append(f"a recipe saves nothing on disk: it has no weights and needs those of {facts['base']}")
    if facts["taken_out_bytes"]:
        found.append(
            "dropping saves time and cache, but no memory: the weights stay loaded, so that they can be put back"
        )
    zeros = f"{100 * facts['zeros_in_matrices']:.0f} % zeros"
    if facts["sparse_layers"]:
        found.append(
            f"{facts['sparse_layers']} layers multiply with 2:4 kernels, which saves memory (time only where the gains say so); on disk their zeros are stored like any number"
        )
    elif facts["two_four_layers"]:
        found.append(
            f"2:4 as dense tensors saves nothing: {zeros}, stored and multiplied like any number; --sparse-kernels uses them (CUDA, half precision)"
        )
    elif facts["zeros_in_matrices"] > _FEW_ZEROS and facts["format"] != "zeroed":
        found.append(f"unstructured zeros save nothing: {zeros}, stored and multiplied like any number")
    return found
