"""How batches follow each other on their way through the models, and what of a model runs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from families import tiny_folder
from prunescope.compare.streams import Ahead
from prunescope.models.loading import load_model
from prunescope.models.residual import Passage, headless, watching
from prunescope.runs.workers import alone


def in_order(rows: Ahead, batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """As one process computes them."""
    found: list[list[int]] = []
    alone(batches, rows, lambda _, table: found.append(table))
    return found


def test_a_batch_is_begun_before_the_one_before_is_waited_for() -> None:
    """Would catch a batch that is begun twice or never, tables in another order, and one begun ahead where there is no room for it."""
    told: list[str] = []

    def begin(batch: Sequence[int]) -> Callable[[], list[int]]:
        told.append(f"begin {batch[0]}")

        def wait() -> list[int]:
            told.append(f"wait {batch[0]}")
            return list(batch)

        return wait

    batches = [range(0, 2), range(2, 4), range(4, 5)]
    rows = Ahead(begin, True)
    assert in_order(rows, batches) == [[0, 1], [2, 3], [4]]
    assert told == ["begin 0", "begin 2", "wait 0", "begin 4", "wait 2", "wait 4"]
    told.clear()
    rows = Ahead(begin, True)  # the second is there from an interrupted run
    assert in_order(rows, [batches[0], batches[2]]) == [[0, 1], [4]]
    assert told == ["begin 0", "begin 4", "wait 0", "wait 4"]
    told.clear()
    single = Ahead(begin, False)
    assert in_order(single, batches) == [[0, 1], [2, 3], [4]]
    assert told == ["begin 0", "wait 0", "begin 2", "wait 2", "begin 4", "wait 4"]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_the_stream_alone_is_the_stream_of_all_hooks_and_needs_no_head(family: str, tmp_path: Path) -> None:
    """Would catch a middle of a block that is taken from a hook which is no longer there, in a parallel block and with post-norms too, and a head
    that stays silent afterwards."""
    loaded = load_model(tiny_folder(family, tmp_path / "a"), device="cpu")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    seen: list[list[Passage]] = [[], []]
    with torch.no_grad():
        before = loaded.model(input_ids=ids, use_cache=False).logits
        with watching(loaded, seen[0].append):
            loaded.model(input_ids=ids, use_cache=False)
        with watching(loaded, seen[1].append, stream_only=True), headless(loaded):
            silent = loaded.model(input_ids=ids, use_cache=False).logits
        after = loaded.model(input_ids=ids, use_cache=False).logits
    assert silent.shape == before.shape and not silent.any() and before.any()
    assert torch.equal(before, after)
    assert len(seen[0]) == len(seen[1]) == 2 * len(loaded.anatomy)
    for full, short in zip(*seen, strict=True):
        assert (full.layer, full.kind) == (short.layer, short.kind)
        assert torch.equal(full.before, short.before) and torch.equal(full.after, short.after)
