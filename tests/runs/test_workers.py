"""Work shared by several processes: the same tables to the bit, whoever computed what and whoever died."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import prunescope
from families import characters_folder
from prunescope.jobs.options import LoadOptions, SpreadOptions
from prunescope.jobs.pair import load_pair
from prunescope.runs import workers as module
from prunescope.runs.parcels import Parcel
from prunescope.runs.workers import Workers, processes

COMMANDS = ("layerwise", "generate", "mcq", "divergence", "retrieve", "evaluate", "sweep", "drop")
# whose workers load a dense model and a target, with the items of a run; layerwise writes its texts first
PAIRS = {"layerwise": 8, "generate": 4, "mcq": 4, "divergence": 10, "retrieve": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    characters_folder(folder / "model")
    (folder / "prompts.txt").write_text("cat dog\n2 + 3 = 5\na\nthe end of it\n", "utf-8")
    (folder / "text.txt").write_text("a cat and a dog and 12 birds\n" * 3, "utf-8")
    asked = [{"question": f"{i} + 2", "choices": [str(i), str(i + 2)], "answer": 1} for i in range(4)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked), "utf-8")
    (folder / "beir" / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [{"_id": f"{name[0]}{i}", "text": f"{name} {i} {'cat' * i}"} for i in range(5)]
        (folder / "beir" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tc0\t1\n", "utf-8")
    return folder


def rows_of(command: str, place: Path, **how: Any) -> str:
    """Every number of the table and of the noise floor, to the last digit; as text, so that NaN equals NaN."""
    dense, drop, one = str(place / "model"), "drop:attn=1", {"batch_size": 1, "device": "cpu"}
    pair: dict[str, Any] = {"dense": dense, "target": drop, **one}
    writing = {"prompts": str(place / "prompts.txt"), "max_new_tokens": 3}
    quick: dict[str, Any] = {"tasks": "reversal-mc,arithmetic-mc", "limit": 3, "shots": 1, "cache": False, **one}
    options: dict[str, Any] = {
        "layerwise": pair | writing,
        "generate": pair | writing | {"temperature": 0.7, "cache": False},  # draws follow from the prompt's number
        "mcq": pair | {"questions": str(place / "questions.jsonl"), "cache": False},
        "divergence": pair | {"text": str(place / "text.txt"), "context": 8, "scale": False},
        "retrieve": pair | {"corpus": str(place / "beir"), "depth": 3, "recall_at": "1"},
        "evaluate": {"models": [dense, drop], **quick},
        "sweep": {"model": dense, "target": "attn", "n": "1,2", "samples": 2, "seq_len": 8, **writing, **quick},
        "drop": {
            "model": dense,
            "n": 3,
            "select": "search",
            "generations": 2,
            "samples": 3,
            "seq_len": 8,
            "cache": False,
            **one,
        },
    }[command]
    found = getattr(prunescope, command)(**options, **how)
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in found.table().to_pylist()]
    return str((rows, getattr(found, "info", {}).get("noise_floor")))


@contextmanager
def _given(workers: Workers, *_: Any, **__: Any) -> Iterator[Workers]:
    yield workers


@pytest.fixture(scope="module")
def warm(place: Path) -> Iterator[Workers]:
    """This process and another, which has loaded its models: every engine is tried on the two."""
    loads = partial(load_pair, str(place / "model"), "drop:attn=1", LoadOptions("float32", "cpu", None, False))
    with processes(2, loads, torch.device("cpu")) as found:
        yield found


def loaded(workers: Workers) -> Workers:
    """With a second process that has its models; else this one may be done before."""
    workers.made.clear()
    workers.hands(2, len)[1].prepare(_lengths).result()
    return workers


def _lengths(*_: Any) -> Any:
    return len


def pid_of(workers: Workers) -> int:
    hand: Any = workers._hands[1]
    return int(next(iter(hand._pool._processes)))


@pytest.fixture
def slow_here(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process leaves time for the other one; gives the items that it has computed."""
    mine: list[Any] = []

    def compute(self: Any, item: Any, following: Any) -> Any:
        def slowly() -> Any:
            mine.append(item)
            time.sleep(0.3)
            return self._compute(item)

        return self._thread.submit(slowly)

    monkeypatch.setattr(module._Here, "compute", compute)
    return mine


@pytest.mark.parametrize("command", PAIRS)
def test_two_processes_give_the_rows_of_one(
    command: str, place: Path, warm: Workers, slow_here: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch draws that follow from the place in a batch, parts mixed up on their way, and a worker with another target."""
    alone = rows_of(command, place)
    monkeypatch.setattr("prunescope.compare.retrieval._CHUNK", 1)
    monkeypatch.setattr(SpreadOptions, "started", lambda self, *a, **k: _given(loaded(warm)))
    assert not slow_here
    assert alone == rows_of(command, place, workers=2)
    assert slow_here and len(slow_here) < PAIRS[command], "both took part"


def test_what_a_killed_worker_was_at_is_done_again(
    place: Path, warm: Workers, slow_here: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is stopped as it is given an item, and killed as this process takes its second: that item must not be missing."""
    alone, first = rows_of("mcq", place), pid_of(loaded(warm))
    plainly, given = module._Process.compute, []

    def stopped(self: Any, item: Any, following: Any) -> Any:
        given.append(item)
        if len(given) == 1:
            os.kill(first, signal.SIGSTOP)
        return plainly(self, item, following)

    here = module._Here.compute

    def killing(self: Any, item: Any, following: Any) -> Any:
        if len(slow_here) == 1:
            os.kill(first, signal.SIGKILL)
        return here(self, item, following)

    monkeypatch.setattr(module._Here, "compute", killing)
    monkeypatch.setattr(module._Process, "compute", stopped)
    monkeypatch.setattr(SpreadOptions, "started", lambda self, *a, **k: _given(loaded(warm)))
    assert rows_of("mcq", place, workers=2) == alone
    assert pid_of(warm) != first and given[0] not in slow_here[:2]


class _Told:
    """Computes nothing, and keeps what it heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def expect(self, item: str) -> None:
        self.heard.append(("expect", item))

    def __call__(self, item: str) -> str:
        self.heard.append(("asked", item))
        return item.upper()


def test_a_worker_is_asked_for_what_it_was_told_to_expect() -> None:
    """Would catch a batch that two workers begin, and one that nobody computes since another was told of it."""
    told, found = [_Told(), _Told()], {}
    workers = Workers(2, lambda number: module._Here(told[number]), helps=False)
    workers.sharing(len)(list("abcdefg"), _Told(), found.__setitem__)
    assert found == dict(enumerate("ABCDEFG"))
    for one in told:
        asked = [item for what, item in one.heard if what == "asked"]
        expected = [item for what, item in one.heard if what == "expect"]
        assert asked[1 : 1 + len(expected)] == expected
    assert sorted(item for one in told for what, item in one.heard if what == "asked") == list("abcdefg")
    workers.stop()


def test_an_item_for_every_worker_before_any_is_kept_for_one() -> None:
    """Would catch a worker that takes an item and keeps the last one for itself, while another has nothing to do."""
    both = threading.Barrier(2, timeout=20)

    class Meeting(_Told):
        def __call__(self, item: str) -> str:
            both.wait()
            return super().__call__(item)

    found: dict[int, str] = {}
    workers = Workers(2, lambda _: module._Here(Meeting()), helps=False)
    workers.sharing(len)(["a", "b"], Meeting(), found.__setitem__)
    workers.stop()
    assert found == {0: "A", 1: "B"}


def test_a_worker_goes_on_while_what_it_gave_is_written() -> None:
    """Would catch a worker that waits for a part to be written, or for a table to be added to the others."""
    last = threading.Event()

    def compute(item: int) -> int:
        if item:
            last.set()
        return item

    workers = Workers(1, lambda _: module._Here(compute), helps=False)
    workers.sharing(len)([0, 1], compute, lambda place, _: place or _written_after(last))
    workers.stop()


def _written_after(begun: threading.Event) -> None:
    assert begun.wait(20), "the next item was begun"


@pytest.mark.parametrize("room", [True, False])
def test_large_tables_come_through_a_file(room: bool, tmp_path: Path) -> None:
    """Would catch buffers that are mixed up, arrays that cannot be written to, files that stay, and a full disk that ends the run."""
    numbers = np.arange(30_001, dtype=np.float64)
    table = pa.table({"a": numbers, "b": [None, *map(str, range(30_000))], "c": numbers.astype(np.int8)})
    sent = pickle.dumps(Parcel((table, numbers, "small"), tmp_path if room else tmp_path / "absent"))
    assert (len(sent) < 20_000) == room == bool(list(tmp_path.iterdir()))
    got, array, word = pickle.loads(sent)
    array += 1
    assert got.equals(table) and (array == numbers + 1).all() and word == "small" and not list(tmp_path.iterdir())


def test_small_things_come_through_the_pipe(tmp_path: Path) -> None:
    sent = pickle.dumps(Parcel([np.arange(5), "word"], tmp_path))
    assert not list(tmp_path.iterdir())
    array, word = pickle.loads(sent)
    assert array.tolist() == [0, 1, 2, 3, 4] and word == "word"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"workers": 0}, "--workers 0: it must be at least 1"),
        ({"workers": 2, "stream": True}, "--stream: one process reads the blocks"),
        ({"ray_address": "127.0.0.1:1"}, "--ray-address 127.0.0.1:1: no Ray cluster there"),
    ],
)
def test_what_cannot_be_shared_is_said_in_one_line(
    how: dict[str, Any], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray") if "ray_address" in how else None
    if ray is not None:
        monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("refused")))
    with pytest.raises(prunescope.UserError, match=message):
        rows_of("mcq", place, **how)


def test_a_loaded_model_cannot_be_given_to_a_worker(place: Path) -> None:
    loaded = prunescope.load(str(place / "model"), device="cpu")
    with pytest.raises(prunescope.UserError, match="every worker loads its own"):
        prunescope.generate(loaded, "drop:attn=1", prompts=str(place / "prompts.txt"), max_new_tokens=1, workers=2)


def test_a_mistake_in_a_worker_is_one_here(place: Path, warm: Workers, slow_here: list[Any]) -> None:
    """Would catch a mistake that kills the worker, is tried three times, or comes as a traceback of another process."""
    share = loaded(warm).sharing(_mistaken)
    with pytest.raises(prunescope.UserError, match="no such thing"):
        share([1, 2, 3], str, lambda *_: None)


def _mistaken(*_: Any) -> Any:
    def compute(item: Any) -> Any:
        raise prunescope.UserError("no such thing")

    return compute


@pytest.mark.workers
def test_an_item_that_kills_every_worker_ends_the_run() -> None:
    """Would catch a run that starts workers for ever."""
    workers = Workers(1, lambda _: module._Process(tuple, 1, None, Path()), helps=False)
    with pytest.raises(prunescope.UserError, match="died 3 times at the same items"):
        workers.sharing(_fatal)(["a", "b"], str, lambda *_: None)
    workers.stop()


def _fatal(*_: Any) -> Any:
    return lambda item: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.workers
def test_a_noise_floor_whose_worker_was_killed_is_measured_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, killed = rows_of("layerwise", place), []
    plainly = module._Process.compute

    def compute(self: Any, item: Any, following: Any) -> Any:
        future = plainly(self, item, following)
        if item == range(1) and not killed:  # the first batch of rows; the texts are written all at once
            killed.extend(self._pool._processes)
            os.kill(killed[0], signal.SIGKILL)
        return future

    monkeypatch.setattr(module._Process, "compute", compute)
    loads = partial(load_pair, str(place / "model"), "drop:attn=1", LoadOptions("float32", "cpu", None, False))
    workers = Workers(1, lambda _: module._Process(loads, 1, None, tmp_path), helps=False)
    monkeypatch.setattr(SpreadOptions, "started", lambda self, *a, **k: _given(workers))
    assert rows_of("layerwise", place, workers=2) == alone and killed
    workers.stop()


@pytest.mark.workers
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_on_two_processes_of_its_own(command: str, place: Path) -> None:
    assert rows_of(command, place) == rows_of(command, place, workers=2)


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    """A Ray cluster of two cores that all tests share."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.mark.workers
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_on_two_ray_workers(command: str, place: Path, session: Any) -> None:
    assert rows_of(command, place) == rows_of(command, place, workers=2, ray_address="auto")


@pytest.mark.workers
def test_what_a_killed_ray_worker_was_at_is_done_again(
    place: Path, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, killed = rows_of("layerwise", place), []
    plainly = module._Actor.compute

    def compute(self: Any, item: Any, following: Any) -> Any:
        if not killed:
            killed.append(session.get(self._actor.__ray_call__.remote(lambda worker: os.getpid())))
            os.kill(killed[0], signal.SIGSTOP)
            future = plainly(self, item, following)
            os.kill(killed[0], signal.SIGKILL)
            return future
        return plainly(self, item, following)

    monkeypatch.setattr(module._Actor, "compute", compute)
    assert rows_of("layerwise", place, workers=2, ray_address="auto") == alone and killed


@pytest.mark.workers
def test_the_benchmark_shares_a_sweep_a_sparsegpt_block_and_steps_of_heal() -> None:
    """Its other parts run at a toy size with those of all benchmarks."""
    script = Path(__file__).parents[2] / "benchmarks" / "parallel_gpu.py"
    toy = "--shape tiny --device cpu --parts sweep,sparsegpt,heal --prompts 8 --items 2 --samples 4 --length 16 --texts 5 --text-length 16 --steps-heal 4"
    done = subprocess.run([sys.executable, script, *toy.split()], capture_output=True, text=True, timeout=900)
    assert done.stdout.count("the same bits: True") == 2, done.stderr
    off = re.search(r"heal: .* losses of 4 steps differ by at most (\S+) of themselves", done.stdout)
    assert off and float(off[1]) < 1e-4, done.stdout + done.stderr
