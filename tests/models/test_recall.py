"""What a model wrote and read is taken from `Recall` by the next command, with the bits that it would have found anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prunescope
from families import characters_folder
from prunescope.compare.context import Transcript, read_states
from prunescope.models import generating
from prunescope.models.generating import Sampling, continue_texts
from prunescope.models.loaded import LoadedModel
from prunescope.models.recall import Recall, fingerprint

PROMPTS = [[5, 9, 11, 4, 60, 8, 33], [7, 3], [21, 40, 41, 42, 13]]
TEXTS = [Transcript([5, 9, 11], [4, 60, 8]), Transcript([7, 3], [9])]


@pytest.fixture
def passes(dense: LoadedModel) -> Callable[[], int]:
    """How many forward passes the model has made since it was last asked."""
    count = [0]
    dense.model.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))

    def since() -> int:
        found, count[0] = count[0], 0
        return found

    return since


def write(loaded: LoadedModel, steps: int = 12, **options: Any) -> tuple[list[list[int]], list[torch.Tensor]]:
    states: list[torch.Tensor] = []
    options = {"recall": True, "stop": False, "batch_size": 3} | options
    return continue_texts(loaded, PROMPTS, steps, see=states.append, **options), states


def same(a: Any, b: Any) -> bool:
    return a[0] == b[0] and len(a[1]) == len(b[1]) and all(map(torch.equal, a[1], b[1]))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=5, seed=4)])
def test_a_text_is_written_once_and_holds_the_shorter_ones(
    dense: LoadedModel, passes: Callable[[], int], sampling: Sampling
) -> None:
    """The second time no forward pass is made; 5 steps of 12 are, to the bit, what 5 steps alone give; 13 are written anew.

    Would catch an entry found by too little, and states that are cut in the wrong place or belong to another step.
    """
    plain = {steps: write(dense, steps, recall=False, sampling=sampling) for steps in (5, 12, 13)}
    passes()
    assert same(write(dense, 12, sampling=sampling), plain[12]) and passes() == 12
    assert same(write(dense, 12, sampling=sampling), plain[12]) and passes() == 0
    assert same(write(dense, 5, sampling=sampling), plain[5]) and passes() == 0
    assert same(write(dense, 13, sampling=sampling), plain[13]) and passes() == 13
    assert continue_texts(dense, PROMPTS, 12, batch_size=3, sampling=sampling, stop=False, recall=True) == plain[12][0]
    assert passes() == 0  # without states too


def test_whatever_decides_a_text_gives_another_entry(dense: LoadedModel, passes: Callable[[], int]) -> None:
    """Other prompts, batches, ends, sampling, numbers of the prompts, dropped sublayers. Would catch any of them left out of the key."""
    write(dense)
    passes()
    others: list[dict[str, Any]] = [
        {"batch_size": 2}, {"stop": True}, {"sampling": Sampling(1.0)}, {"sampling": Sampling(1.0, seed=1)}, {"sampling": Sampling(1.0), "numbers": [3, 4, 5]},
        {"sampling": Sampling(1.0, top_p=0.9)}, {"sampling": Sampling(0.5)},
    ]  # fmt: skip
    for options in others:
        expected = write(dense, recall=False, **options)
        assert passes()
        assert same(write(dense, **options), expected)
        assert passes(), options
    dense.drop("attn=1")
    expected = write(dense, recall=False)
    passes()
    assert same(write(dense), expected) and passes() == 12
    dense.restore()
    write(dense)
    assert passes() == 0  # nothing was lost meanwhile


def test_a_fixed_cache_does_not_take_a_longer_text(
    dense: LoadedModel, passes: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffers are as long as the text, so that another length may run other kernels."""
    monkeypatch.setattr(generating, "static_problem", lambda loaded: None)
    write(dense, 12)
    passes()
    write(dense, 12)
    assert passes() == 0
    write(dense, 5)
    assert passes() == 5


def test_states_are_read_once(dense: LoadedModel, passes: Callable[[], int]) -> None:
    """The states of the same batch; other texts, the same texts alone, and other steps of the same tokens are read."""
    expected = read_states(dense, TEXTS)
    passes()
    for forwards in (1, 0):
        found = read_states(dense, TEXTS, recall=True)
        assert all(map(torch.equal, found, expected)) and passes() == forwards
    other = [Transcript([5, 9], [11, 4, 60, 8]), TEXTS[1]]  # the same tokens, one step more
    for texts in (TEXTS[:1], TEXTS[::-1], other):
        found = read_states(dense, texts, recall=True)
        assert [len(states) for states in found] == [len(text.continuation) for text in texts] and passes() == 1


@pytest.mark.parametrize("through_data", [False, True])
def test_changed_weights_are_noticed(dense: LoadedModel, passes: Callable[[], int], through_data: bool) -> None:
    """A matrix that is pruned in place is read anew, and once it is put back the old states count again. What is written through ``.data`` torch does
    not count as written."""
    read_states(dense, TEXTS, recall=True)
    weight = next(p for p in dense.model.parameters() if p.dim() == 2)
    before = weight.detach().clone()
    place = weight.data if through_data else weight.detach()
    place[:, ::2] = 0
    expected = read_states(dense, TEXTS)
    passes()
    found = read_states(dense, TEXTS, recall=True)
    assert all(map(torch.equal, found, expected)) and passes() == 1
    place.copy_(before)
    read_states(dense, TEXTS, recall=True)
    assert passes() == 0


def test_the_checksum_sees_one_bit_and_two_that_change_places() -> None:
    """Would catch a sum that any order of the weights gives, and one that rounds a small change away."""
    model = torch.nn.Linear(2048, 1024)
    before = fingerprint(model)
    flat = model.weight.detach().view(-1)
    seen = {before}
    for change in (lambda: flat[7:9].copy_(flat[7:9].flip(0)), lambda: flat[99_999].nextafter_(torch.tensor(9.0))):
        change()
        seen.add(fingerprint(model))
    assert len(seen) == 3
    flat[99_999].nextafter_(torch.tensor(-9.0))
    flat[7:9] = flat[7:9].flip(0).clone()
    assert fingerprint(model) == before


def test_any_tensor_can_be_looked_at() -> None:
    """Slices that begin at an odd byte, transposed, empty and single numbers, of any dtype. Would catch a view that torch refuses."""
    model = torch.nn.Module()
    held = torch.arange(40_001, dtype=torch.int16).view(torch.bfloat16)
    odd: list[torch.Tensor] = [
        held[1:],
        torch.zeros(3, 5).T,
        torch.zeros(0),
        torch.tensor(True),
        torch.zeros(3, dtype=torch.float8_e4m3fn),
    ]
    for number, tensor in enumerate(odd):
        model.register_buffer(f"b{number}", tensor)
    before, key = fingerprint(model), Recall().key(model)
    odd[0][20_000] = 1
    assert fingerprint(model) != before and Recall().key(model) not in (None, key)


def test_memory_is_bounded_and_the_oldest_goes_first(dense: LoadedModel, passes: Callable[[], int]) -> None:
    recall = Recall(limit=100)
    model = torch.nn.Linear(2, 2)
    keys = [recall.key(model, number) for number in range(4)]
    assert len(set(keys)) == 4
    for key in keys[:3]:
        recall.put(key, torch.zeros(8))  # 32 bytes
    assert recall.get(keys[0]) is not None  # now asked for later than number 1
    recall.put(keys[3], torch.zeros(8))
    assert [recall.get(key) is not None for key in keys] == [True, False, True, True] and recall.nbytes == 96
    recall.put(keys[1], torch.zeros(26))
    assert recall.nbytes == 0  # what is larger than the limit is not kept
    dense.recall.limit = 0
    for _ in range(2):
        passes()
        read_states(dense, TEXTS, recall=True)
        assert passes() == 1 and dense.recall.nbytes == 0


def test_commands_find_the_same_with_and_without(tmp_path: Path) -> None:
    """`layerwise`, then `generate` and `mcq` against two targets: equal tables, samples and floors, with fewer passes of the dense model.

    Would catch states of one target's run that are not the dense model's, and a table that owes anything to what ran before.
    """
    folder = str(characters_folder(tmp_path / "dense"))
    (tmp_path / "prompts.txt").write_text("one two three\nfour\nfive six\n")
    how: Any = {"prompts": str(tmp_path / "prompts.txt"), "max_new_tokens": 8}
    found: dict[bool, list[Any]] = {}
    counts: dict[bool, int] = {}
    for keep in (True, False):
        dense = prunescope.load(folder)
        dense.recall.limit *= keep
        forwards: list[int] = []
        dense.model.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        results: list[Any] = [prunescope.layerwise(dense, **how)]
        for target in ("drop:attn=1", "drop:mlp=2"):
            results.append(prunescope.generate(dense, target, **how))
            results.append(prunescope.mcq(dense, target, limit=3))
        found[keep], counts[keep] = results, len(forwards)
    for kept, anew in zip(found[True], found[False], strict=True):
        assert repr(kept.table().to_pydict()) == repr(anew.table().to_pydict())  # NaN for NaN
        assert kept.samples() == anew.samples()
        assert kept.info["noise_floor"] == anew.info["noise_floor"]
    assert counts[True] <= counts[False] - 8 - 8 - 3  # the text, twice, and what `mcq` and the floors read


def test_every_command_looks_at_all_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row written through ``.data`` between two commands, where no glance falls. Would catch scores of the weights of before."""
    monkeypatch.setattr("prunescope.models.recall._glance", lambda tensors: "")
    dense = prunescope.load(str(characters_folder(tmp_path / "dense")))
    first = prunescope.mcq(dense, "drop:mlp=2", limit=3)
    dense.model.get_input_embeddings().weight.data[:, 3] += 0.5
    changed = prunescope.mcq(dense, "drop:mlp=2", limit=3)
    dense.recall.limit = 0
    anew = prunescope.mcq(dense, "drop:mlp=2", limit=3)
    told = [repr(run.table().to_pydict()) for run in (first, changed, anew)]
    assert told[1] == told[2] != told[0]


def test_zeros_are_counted_once(dense: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of zeros is that of the weights as they are: after a write in place, with a sublayer dropped, and back again.

    Would catch a share that is counted for every description, or remembered over a change of the weights or of the sublayers.
    """
    counted = []
    count = torch.Tensor.count_nonzero
    monkeypatch.setattr(torch.Tensor, "count_nonzero", lambda tensor: counted.append(1) or count(tensor))

    def by_hand() -> float:
        matrices = [p for block in dense.anatomy.blocks for p in block.module.parameters() if p.dim() >= 2]
        return sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)

    assert dense.sparsity() == by_hand() and counted
    counted.clear()
    assert dense.sparsity() == by_hand() and not counted
    with torch.no_grad():
        next(p for p in dense.anatomy.blocks[1].module.parameters() if p.dim() >= 2)[0] = 0
    whole = by_hand()
    assert dense.sparsity() == whole > 0
    dense.drop("attn=1;mlp=1")
    assert dense.sparsity() == by_hand() == 0
    dense.restore()
    assert dense.sparsity() == whole
