"""One model pruned by several processes: the masks and weights of one, to the bit."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import prunescope
from families import tiny_folder
from prunescope.models.blockwise import stream_model
from prunescope.prune.blocks import prune_model
from prunescope.prune.calibrate import InputStatistic
from prunescope.prune.masks import Goal
from prunescope.prune.plan import make_plan
from prunescope.prune.team import Team, _tree, joined

TOKENS = torch.randint(3, 40, (7, 12), generator=torch.Generator().manual_seed(4))
METHODS: dict[str, dict[str, Any]] = {"sparsegpt": {}, "wanda": {"refine": "swaps"}}


def prune(model: Path, method: str, out: Path, team: Team) -> dict[str, Any]:
    """Batches of two: the text's four, of which the last has one sample."""
    streamed = stream_model(str(model), out / "converted", device="cpu")
    plan = make_plan(streamed, method, Goal(0.5), **METHODS[method])  # type: ignore[arg-type]
    found = prune_model(
        streamed, plan, TOKENS, out, perplexity=TOKENS, batch_size=2, perplexity_batch_size=1, team=team
    )
    return {"rows": found.rows, "perplexity": found.perplexity}


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def _second(model: Path, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with joined("cpu", None) as team:
        for method in METHODS:
            prune(model, method, folder / method, team)


def test_two_processes_prune_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a share that is counted twice or left out, sums in another order, and weights that did not reach a process: then the next
    block would be calibrated on others. Perplexity too is that of one process."""
    model = tiny_folder("llama", tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    for method in METHODS:
        for name in ("one", "two"):
            (tmp_path / name / method).mkdir(parents=True)
    other = multiprocessing.get_context("spawn").Process(
        target=_second, args=(model, tmp_path / "two", place | {"RANK": "1"})
    )
    other.start()
    for name, value in (place | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with joined("cpu", None) as team:
        assert (team.rank, team.world, team.shares) == (0, 2, 2)
        found = {method: prune(model, method, tmp_path / "two" / method, team) for method in METHODS}
    other.join(60)
    assert other.exitcode == 0
    for method in METHODS:
        assert prune(model, method, tmp_path / "one" / method, Team(shares=2)) == found[method]
        ones, twos = weights(tmp_path / "one" / method), weights(tmp_path / "two" / method)
        assert ones.keys() == twos.keys() and all(torch.equal(ones[name], twos[name]) for name in ones)


def test_shares_change_the_sums_by_rounding_alone(tmp_path: Path) -> None:
    """Against one share, whose rows are summed one batch after the other: each error within float32's rounding of the sums."""
    model = tiny_folder("llama", tmp_path / "model")
    found = []
    for shares in (1, 4):
        (tmp_path / str(shares)).mkdir()
        found.append(prune(model, "wanda", tmp_path / str(shares), Team(shares=shares)))
    for one, four in zip(found[0]["rows"], found[1]["rows"], strict=True):
        assert one["tokens"] == four["tokens"] == TOKENS.numel()
        assert four["error"] == pytest.approx(one["error"], rel=1e-4)


def test_pieces_cover_the_text_and_break_between_batches() -> None:
    for world, shares in ((1, 1), (1, 4), (2, 2), (2, 4), (4, 4)):
        pieces = [own for rank in range(world) for own in Team(rank, world, shares).own(21, 4)]
        assert [i for own in pieces for i in own] == list(range(21)) and len(pieces) == shares
        assert all(own.start % 4 == 0 and len(own) for own in pieces)


def test_the_tree_is_that_of_pairs() -> None:
    """1e8 + 1 - 1e8 + 1 in float32: 1 from the left, 0 by pairs."""

    def part(value: float) -> InputStatistic:
        one = InputStatistic(1, torch.device("cpu"), gram=False)
        one.squares.fill_(value)
        return one

    parts = [lambda value=value: part(value) for value in (1e8, 1.0, -1e8, 1.0)]
    total = _tree(parts)  # type: ignore[arg-type]
    assert total is not None and float(total.squares) == 0.0
    three = _tree([None, parts[1], parts[3]])  # type: ignore[list-item]
    assert three is not None and float(three.squares) == 2.0 and _tree([None, None]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": 3}, "cannot be shared so"),
        ({"shares": 4, "samples": 2, "batch_size": 1}, "fewer than 4 shares"),
        ({"shares": 2, "method": "structured"}, "structured removes whole neurons in one process"),
    ],
)
def test_shares_that_cannot_be_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 30}" for i in range(400)), "utf-8")
    given = {"samples": 4, "method": "wanda", **options}
    with pytest.raises(prunescope.UserError, match=message):
        prunescope.sparsify(
            str(model), sparsity=0.5, calibration=str(tmp_path / "text.txt"), seq_len=8, device="cpu", **given
        )


@pytest.mark.workers
def test_torchrun_writes_what_one_process_does(tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 31}" for i in range(4000)), "utf-8")
    command = ["sparsify", str(model), "--sparsity", "0.5", "--calibration", str(tmp_path / "text.txt"), "--samples", "8", "--seq-len", "16", "--batch-size", "2", "--device", "cpu"]  # fmt: skip
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prunescope"]
    for start, out in ((run, "two"), (["-m", "prunescope"], "one")):
        more = ["--out", str(tmp_path / out), *(["--shares", "2"] if out == "one" else [])]
        subprocess.run([sys.executable, *start, *command, *more], check=True, timeout=200, capture_output=True)
    ones, twos = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert ones and all(torch.equal(ones[name], twos[name]) for name in ones)
