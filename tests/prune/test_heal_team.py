"""Healing by two processes (gloo): the numbers of one, but for the order of the sums. In float64, so that no other difference hides among them."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prunescope.prune.heal as module
from families import characters_folder, tiny_folder
from prunescope.models.loading import load_model
from prunescope.prune.heal import Healed, HealPlan, Text, heal
from prunescope.prune.heal_team import add_gradients, check_same
from prunescope.prune.reconstruct import reconstruction_error
from prunescope.prune.team import ALONE, Team, joined
from prunescope.prune.trainable import Trainable, make_trainable

PLAN = HealPlan(steps=4, batch_size=5, reconstruct=2, learning_rate=0.01, clip=0.5, weight_decay=0.1, on_policy=0.5, check_every=2, chunk=7)  # fmt: skip


def some_texts(count: int, seed: int) -> list[Text]:
    """Continuations of 1 to 12 tokens: processes with as many texts count other numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
    return [(torch.randint(4, 60, (2 + i % 3,), generator=generator).tolist(), torch.randint(4, 60, (n,), generator=generator).tolist()) for i, n in enumerate(lengths)]  # fmt: skip


def healed(models: Path, what: str, team: Team, folder: Path | None = None) -> tuple[Healed, dict[str, Tensor]]:
    """``dropped``: all stages on a model without two branches; ``sparse``: half of every matrix zero, three texts a step, one at a time."""
    student = load_model(models / "student", device="cpu", dtype="float64", drop="attn=2;mlp=4" if what == "dropped" else None)  # fmt: skip
    teacher = load_model(models / "teacher", device="cpu", dtype="float64")
    plan = PLAN
    if what == "sparse":
        plan = dataclasses.replace(PLAN, batch_size=3, micro_batch=1, reconstruct=0, on_policy=0.0)
        with torch.no_grad():
            for parameter in student.model.parameters():
                if parameter.dim() == 2:
                    parameter[parameter.abs() < parameter.abs().median()] = 0
    trained = make_trainable(student)
    found = heal(student, teacher, trained, some_texts(9, 1), some_texts(3, 2), plan, folder=folder, team=team)
    return found, {name: p.detach().clone() for name, p in student.model.named_parameters()}


def together(models: Path, team: Team) -> dict[str, tuple[Healed, dict[str, Tensor]]]:
    """What both processes do. The sparse model is interrupted between two checks and goes on in new processes' place, with fresh models."""
    found = {"dropped": healed(models, "dropped", team)}
    folder = None if team.rank else models / "state"
    step = module._step

    def stopping(*args: Any) -> Any:
        if args[6] == 3:
            raise KeyboardInterrupt
        return step(*args)

    module._step = stopping  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        healed(models, "sparse", team, folder)
    module._step = step
    assert team.rank or (models / "state" / module._STATE).is_file()
    found["sparse"] = healed(models, "sparse", team, folder)
    return found


def gradients(team: Team) -> list[list[float] | None]:
    """Of four weights: one that both processes reach, one that each alone does, and one that nobody does; the large one is sent by itself."""
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2,), (1100, 1000), (1,))]
    reached = [[1.0, 2.0, None, None], [10.0, None, 5.0, None]][team.rank]
    for weight, value in zip(weights, reached, strict=True):
        weight.grad = None if value is None else torch.full_like(weight, value)
    add_gradients(team, weights)
    return [None if p.grad is None else p.grad.unique().tolist() for p in weights]


def drifted(team: Team) -> str:
    weight = nn.Parameter(torch.tensor([1.0, 1e-7 * team.rank]))
    with pytest.raises(RuntimeError) as caught:
        check_same(team, Trainable({"weight": weight}))
    return str(caught.value)


def _second(models: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with joined("cpu", None) as team:
        for what, (_, weights) in together(models, team).items():
            save_file({name: t.contiguous() for name, t in weights.items()}, models / f"second-{what}.safetensors")
        gradients(team), drifted(team)


def test_two_processes_heal_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a mean over each share's tokens in place of the batch's, a text that nobody or everybody reads, own texts with other draws, a
    reconstruction divided by a share's own changes, means of AdamW that one process lost when it was resumed, and zeros that fill."""
    for name, seed in (("teacher", 0), ("student", 1)):
        tiny_folder("llama", tmp_path / name, seed)
    (tmp_path / "state").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    other = multiprocessing.get_context("spawn").Process(target=_second, args=(tmp_path, place | {"RANK": "1"}))
    other.start()
    alone = {what: healed(tmp_path, what, ALONE) for what in ("dropped", "sparse")}
    for name, value in (place | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with joined("cpu", None) as team:
        shared = together(tmp_path, team)
        assert gradients(team) == [[11.0], [2.0], [5.0], None]
        assert "process 1" in drifted(team)
    other.join(60)
    assert other.exitcode == 0
    for what, (one, weights) in alone.items():
        two, others = shared[what]
        assert len(one.rows) == len(two.rows) == (6 if what == "dropped" else 4)
        for row, same in zip(one.rows, two.rows, strict=True):
            assert (same["stage"], same["on_policy"], same["tokens"]) == (row["stage"], row["on_policy"], row["tokens"])
            for name in ("loss", "gradient_norm", "held_out_kl"):
                assert (same[name] or 0) == pytest.approx(row[name] or 0, rel=1e-10), (what, row["step"], name)
        assert (two.best_step, two.tokens) == (one.best_step, one.tokens) and one.best_step
        assert two.kl_best == pytest.approx(one.kl_best, rel=1e-10) and two.kl_best < two.kl_before
        second = load_file(tmp_path / f"second-{what}.safetensors")
        for name, weight in weights.items():
            torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-8, msg=f"{what} {name}")
            assert torch.equal(others[name], second[name]), name
            if what == "sparse":
                assert torch.equal(others[name] == 0, weight == 0), name
    assert {row["on_policy"] for row in alone["dropped"][0].rows} == {False, True}


def test_shares_cover_everything_once() -> None:
    """Fewer texts than processes too: one of them has none."""
    for count in (0, 1, 2, 5, 7, 16):
        teams = [Team(rank, 3) for rank in range(3)]
        assert [i for team in teams for i in team.span(count)] == list(range(count))
        texts = some_texts(count, 3)
        dealt = [text for team in teams for part in module._micro(texts, 2, team) for text in part]
        assert sorted(map(str, dealt)) == sorted(map(str, texts))


def test_reconstruction_of_parts_adds_up(tmp_path: Path) -> None:
    """With micro-batches each part was divided by what the dense model adds in that part: another loss than that of the whole batch."""
    for name, seed in (("teacher", 0), ("student", 1)):
        tiny_folder("llama", tmp_path / name, seed)
    student, teacher = (load_model(tmp_path / name, device="cpu", dtype="float64") for name in ("student", "teacher"))
    student.drop("attn=2;mlp=4")
    texts = some_texts(4, 5)
    whole = reconstruction_error(student, teacher, *module._read_places(student, texts))
    parts = [texts[:1], texts[1:]]
    changes = module._changes(student, teacher, parts, ALONE)
    sums = [reconstruction_error(student, teacher, *module._read_places(student, part), changes) for part in parts]
    assert float((sums[0] + sums[1]).detach()) == pytest.approx(float(whole.detach()), rel=1e-12)


@pytest.mark.workers
def test_torchrun_heals_as_one_process_does_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Would catch a second process that writes or prints, one that a resumed run leaves behind, and a mistake told twice."""
    dense = characters_folder(tmp_path / "dense")
    command = ["heal", "drop:attn=1", "--teacher", str(dense), "--samples", "24", "--new-tokens", "6", "--held-out", "5", "--batch-size", "5", "--steps", "30",
               "--check-every", "2", "--patience", "99", "--on-policy", "0.3", "--learning-rate", "1e-3", "--dtype", "float64", "--device", "cpu"]  # fmt: skip
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prunescope"]
    once: dict[str, Any] = {"timeout": 400, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "prunescope", *command, "--out", str(tmp_path / "one")], check=True, **once)
    job = subprocess.Popen([*two, *command, "--out", str(tmp_path / "two")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 300
    while (
        not (tmp_path / "two.partial" / module._STATE).is_file() and job.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    job.terminate()
    job.wait(60)
    assert not (tmp_path / "two").exists()
    done = subprocess.run([*two, *command, "--out", str(tmp_path / "two"), "--resume"], **once)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("written: ") == 1
    curves = [pq.read_table(tmp_path / name / "curves.parquet").to_pylist() for name in ("one", "two")]
    assert len(curves[0]) == 30 and [row["loss"] for row in curves[0]] == pytest.approx([row["loss"] for row in curves[1]], rel=1e-9)  # fmt: skip
    records = [json.loads((tmp_path / name / "prunescope.json").read_text("utf-8")) for name in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["kl"] == pytest.approx(records[1]["kl"], rel=1e-6)  # as written: in float32
    wrong = subprocess.run([*two, *command, "--held-out", "99", "--out", str(tmp_path / "bad")], **once)
    assert wrong.returncode and wrong.stderr.count("prunescope: 24 texts of") == 1 and "Connection" not in wrong.stderr
    assert not list(tmp_path.glob("bad*"))
