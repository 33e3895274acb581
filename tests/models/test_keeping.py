"""The file behind a run whose hidden states stay on the device, as on a GPU; here the device is the CPU."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_streamed import assert_same, both_ways

from families import tiny_folder
from prunescope.errors import UserError
from prunescope.models import finding, keeping, streaming
from prunescope.models.blockwise import stream_model
from prunescope.models.dropping import DropSpec
from prunescope.models.keeping import Conditions, Keeper
from prunescope.models.streaming import Carried


def bytes_of(path: Path) -> list[float]:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).tolist()


def test_what_is_kept_and_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that are changed after they were offered, a run that waits for a slow disk, two files at once, a last state that is lost."""
    go, plain = threading.Event(), keeping.replacing
    monkeypatch.setattr(keeping, "replacing", lambda path: (go.wait(20), plain(path))[1])
    keeper = Keeper(lambda layer: tmp_path / f"part-{layer}.bin")
    states = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])]
    keeper.offer(1, states)
    states[0].zero_()
    keeper.offer(2, states)  # the disk is busy
    assert not list(tmp_path.glob("*"))
    go.set()
    keeper.offer(3, [torch.tensor([[7.0, 8.0]]), torch.tensor([9.0])], must=True)
    keeper.finish()
    assert [p.name for p in tmp_path.glob("*")] == ["part-3.bin"]
    assert bytes_of(tmp_path / "part-3.bin") == [7.0, 8.0, 9.0]
    keeper.close()
    assert not list(tmp_path.glob("*"))


def test_states_offered_once_are_those_of_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file written from the states themselves, which later blocks may change in place."""
    go, plain = threading.Event(), keeping.replacing
    monkeypatch.setattr(keeping, "replacing", lambda path: (go.wait(20), plain(path))[1])
    keeper, states = Keeper(lambda layer: tmp_path / f"{layer}"), [torch.tensor([1.0, 2.0])]
    keeper.offer(1, states)
    states[0].zero_()
    go.set()
    keeper.finish()
    assert bytes_of(tmp_path / "1") == [1.0, 2.0]


def test_a_disk_that_is_full_is_not_passed_over(tmp_path: Path) -> None:
    """A run that says nothing while nothing of it is kept."""
    keeper = Keeper(lambda layer: tmp_path / "missing" / f"{layer}")
    keeper.offer(1, [torch.ones(2)])
    with pytest.raises(FileNotFoundError):
        keeper.finish()


def test_what_must_be_on_the_disk_first_and_what_may_not_be_kept(tmp_path: Path) -> None:
    """States in front of a block whose rows are still on their way: a run that goes on from them would lack those rows. And states that did not pass."""
    seen: list[list[str]] = []
    keeper = Keeper(lambda layer: tmp_path / f"{layer}")
    keeper.before = lambda: seen.append([path.name for path in tmp_path.glob("*")])
    keeper.offer(1, [torch.ones(2)], good=torch.tensor(True))
    keeper.offer(2, [torch.zeros(2)], good=torch.tensor(False), must=True)
    keeper.finish()
    assert seen == [[]] and [path.name for path in tmp_path.glob("*")] == ["1"] and bytes_of(tmp_path / "1") == [1, 1]


def test_conditions_are_looked_at_in_order_and_one_group_late() -> None:
    """An error that is lost, or told of another block."""
    conditions = Conditions()
    assert conditions.ask() is None
    conditions.look()
    for layer, holds in enumerate([(True, True), (True, False), (False, True)]):
        for flag in holds:
            conditions.require(torch.tensor(flag), ValueError(str(layer)))
        good = conditions.ask()
        assert good is not None and bool(good) == all(holds)
        if layer < 2:
            conditions.look(left=1)
    with pytest.raises(ValueError, match="1"):
        conditions.look(left=1)
    with pytest.raises(ValueError, match="2"):
        conditions.look()
    conditions.require(torch.tensor(False), ValueError("3"))
    with pytest.raises(ValueError, match="3"):  # of a group that was not closed
        conditions.look()


@pytest.mark.parametrize("fault", ["infinite", "another"])
def test_a_block_that_does_not_pass_leaves_no_states(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host runs a block ahead. Would catch a run that goes on after its interruption from states that were found wrong."""
    monkeypatch.setattr(streaming, "_at_once", lambda carried: True)
    folder = str(tiny_folder("llama", tmp_path / "model"))
    (tmp_path / "parts").mkdir()
    carried = Carried(
        stream_model(folder, tmp_path / "scratch", device="cpu"), [torch.tensor([[5, 6, 7]])], tmp_path / "parts"
    )
    plain = streaming.Recorded.run

    def run(self: Any, streamed: Any, number: int, layer: int, *others: Any) -> torch.Tensor:
        found = plain(self, streamed, number, layer, *others)
        if layer != 2:
            return found
        return found * float("inf") if fault == "infinite" and number == 1 else found + (fault == "another")

    monkeypatch.setattr(streaming.Recorded, "run", run)
    with pytest.raises(  # noqa: PT012
        FloatingPointError if fault == "infinite" else UserError, match=r"block 2 (holds|on its own)"
    ):
        while carried.layer < 5:
            with carried.streamed.block(carried.layer):
                carried.run(lambda number: None, lambda number, hidden: None)
            carried._keeper.finish()  # so that every state is offered
            assert carried.layer < 4  # a block later at most
    carried._keeper.finish()
    left = [path.name for path in (tmp_path / "parts").glob("*")]
    assert len(left) == 1 and left[0] <= "part-dense-00002.bin"


@pytest.mark.parametrize(("family", "target"), [("llama", "model"), ("gemma2", "drop"), ("mixtral", "drop")])
def test_columns_of_states_that_stay(family: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is given another's stream, and one whose stream a block before has changed."""
    monkeypatch.setattr(streaming, "_at_once", lambda carried: True)
    dense, other = (tiny_folder(family, tmp_path / name, seed=i) for i, name in enumerate("ab"))
    assert_same(*both_ways(dense, other if target == "model" else DropSpec(mlp=(1,)), tmp_path / "scratch"))


def test_goes_on_from_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of one block taken for those of another after an interruption, and a file that stays behind."""
    monkeypatch.setattr(streaming, "_at_once", lambda carried: True)
    folder, texts = (
        str(tiny_folder("llama", tmp_path / "model")),
        [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 4]])],
    )
    (tmp_path / "parts").mkdir()

    def opened() -> Carried:
        return Carried(stream_model(folder, tmp_path / "scratch", device="cpu"), texts, tmp_path / "parts")

    def blocks(carried: Carried, until: int) -> None:
        while carried.layer < until:
            with carried.streamed.block(carried.layer):
                carried.run(lambda number: None, lambda number, hidden: None)

    cut = opened()
    blocks(cut, 3)
    cut.settle()
    again = opened()
    assert again.layer in (1, 2, 3)  # of what came while the file was being written nothing is kept
    blocks(again, 6)
    found = [again.stream(i).clone() for i in range(2)]
    again.settle()
    assert len(list((tmp_path / "parts").glob("*"))) == 1
    again.close()
    assert not list((tmp_path / "parts").glob("*"))
    monkeypatch.setattr(streaming, "_at_once", lambda carried: False)
    plain = opened()
    blocks(plain, 6)
    for number, stream in enumerate(found):
        assert torch.equal(stream, plain.stream(number))


def test_a_method_that_a_library_left_behind_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate leaves its modules a forward of their own. Would catch a signature that is asked for at every call, and the residual of a module
    looked for in the wrong place."""

    class Adding(torch.nn.Linear):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) + residual

    asked: list[object] = []
    plain = finding.signature
    monkeypatch.setattr(finding, "signature", lambda forward: asked.append(forward) or plain(forward))
    module, stream = Adding(2, 2), torch.ones(2)
    module.forward = module.forward  # type: ignore[method-assign]
    for _ in range(3):
        assert finding.given_residual(module, (torch.zeros(2), stream), {}) is stream
    assert len(asked) == 1
    module.forward = lambda x, residual: x  # type: ignore[method-assign, assignment, misc]
    assert finding.given_residual(module, (torch.zeros(2), stream), {}) is stream
    assert finding.given_residual(torch.nn.Linear(2, 2), (stream, stream), {}) is None
