"""SIGKILL at any moment, disks that are full, folders that cannot be written: nothing looks complete that is not, and nothing is lost.

`make test` tries a moment of every command, `make test-kill` fifty, drawn over the command's own run time.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from families import characters_folder

MOMENTS = 1
VOLATILE = {"wall_time_s", "peak_memory_bytes", "seconds", "started", "finished", "out", "resume", "overwrite", "times"}
STREAMED = ("layerwise-streamed", "divergence-streamed")  # both models on disk
RESUMABLE = (
    *STREAMED,
    "sparsify",
    "layerwise",
    "generate",
    "mcq",
    "divergence",
    "retrieve",
    "evaluate",
    "sweep",
    "heal",
)
COMMANDS = ("drop", *RESUMABLE)


class Killer:
    """The process that runs commands in children, see `killing.py`."""

    def __init__(self, cache: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PRUNESCOPE_CACHE": str(cache), "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killing.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def run(self, argv: list[str], after: float | None = None, *, unchecked: bool = False) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"argv": argv, "after": after, "unchecked": unchecked}) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    found = Killer(tmp_path_factory.mktemp("cache"))
    yield found
    assert found.process.stdin is not None
    assert found.process.stdout is not None
    found.process.stdin.close()
    found.process.stdout.close()
    found.process.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    characters_folder(folder / "model")
    (folder / "prompts.txt").write_text("cat dog\n2 + 3 = 5\nred, blue\n", "utf-8")
    written = [{"prompt": "cat dog", "continuation": " and"}, {"prompt": "2 + 3 =", "continuation": " 5"}]
    (folder / "continuations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written), "utf-8")
    (folder / "text.txt").write_text("a cat and a dog and 12 birds\n" * 6, "utf-8")
    rows = [{"question": f"{i} + 2", "choices": ["3", "4"], "answer": i % 2} for i in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "beir" / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        texts = [{"_id": f"{name[0]}{i}", "text": f"{name} {i}"} for i in range(4)]
        (folder / "beir" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), "utf-8")
    (folder / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tc0\t1\nq1\tc2\t1\n", "utf-8")
    return folder


def argv_of(command: str, place: Path) -> list[str]:
    model, drop = str(place / "model"), "drop:attn=1"
    if command in STREAMED:
        given = ["--stream", "true", "--continuations", f"{place}/continuations.jsonl", "--batch-size", "1"]
        plain = argv_of("divergence", place)
        return (
            ["layerwise", model, drop, *given]
            if "layerwise" in command
            else [*plain, "--scale", "false", "--stream", "true"]
        )
    writing = [model, drop, "--prompts", f"{place}/prompts.txt", "--max-new-tokens", "2", "--batch-size", "1"]
    calibration = ["--calibration", f"{place}/text.txt", "--samples", "2", "--seq-len", "8"]
    return {
        "drop": ["drop", model, "--n", "1", "--format", "zeroed", "--cache", "false", *calibration],
        "sparsify": ["sparsify", model, "--method", "sparsegpt", "--sparsity", "0.5", *calibration],
        "heal": [
            *("heal", drop, "--teacher", model, "--samples", "4", "--new-tokens", "3", "--held-out", "1"),
            *("--steps", "4", "--batch-size", "2", "--check-every", "1"),
        ],
        "layerwise": ["layerwise", *writing],
        "generate": ["generate", *writing],
        "mcq": ["mcq", model, drop, "--questions", f"{place}/questions.jsonl", "--batch-size", "1"],
        "divergence": [
            *("divergence", model, drop, "--text", f"{place}/text.txt", "--context", "16", "--batch-size", "1"),
        ],
        "retrieve": ["retrieve", model, drop, "--corpus", f"{place}/beir", "--depth", "2", "--recall-at", "1,2"],
        "evaluate": ["evaluate", model, drop, "--tasks", "reversal-mc,arithmetic-gen", "--limit", "2", "--shots", "1"],
        "sweep": [
            *("sweep", model, "--target", "attn", "--n", "1,2", "--tasks", "reversal-mc", "--limit", "2"),
            *("--shots", "1", "--prompts", f"{place}/prompts.txt", "--max-new-tokens", "2", *calibration),
        ],
    }[command]


def without_time(value: Any, out: str) -> Any:
    if isinstance(value, dict):
        return {key: without_time(entry, out) for key, entry in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [without_time(entry, out) for entry in value]
    return value.replace(out, "OUT") if isinstance(value, str) else value


def contents(folder: Path) -> dict[str, Any]:
    """What a folder holds, file by file: bytes, or what they say without times of day, durations and the folder's own name."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            found[name] = without_time(json.loads(path.read_text("utf-8")), str(folder))
        elif path.suffix == ".parquet":
            table = pq.read_table(path)
            found[name] = repr(table.drop_columns([c for c in table.column_names if c in VOLATILE]).to_pylist())
        elif path.suffix in (".yaml", ".md"):
            lines = path.read_text("utf-8").replace(str(folder), "OUT").splitlines()
            found[name] = [line for line in lines if not re.match(r"(resume|overwrite|out):", line)]
        else:
            found[name] = path.read_bytes()
    return found


def try_moments(command: str, killer: Killer, place: Path, tmp_path: Path, moments: int) -> Counter[str]:
    """Kill at ``moments`` moments; what each left is counted."""
    argv = argv_of(command, place)
    whole = tmp_path / "whole"
    first = killer.run([*argv, "--out", str(whole)])
    assert first["code"] == 0, first["said"]
    expected, out, seen = contents(whole), tmp_path / "out", Counter[str]()
    chance = random.Random(f"{command} {moments}")
    for _ in range(moments):
        killed = killer.run([*argv, "--out", str(out)], after=chance.uniform(0, first["seconds"]))
        if out.exists():  # killed after the rename, or not in time
            assert contents(out) == expected
            seen["complete"] += 1
        else:
            assert killed["code"] == -9, killed
            left = tmp_path / "out.partial"
            seen["begun" if left.exists() else "nothing"] += 1
            again = [*argv, "--out", str(out), *(["--resume"] if command in RESUMABLE else [])]
            done = killer.run(again)
            if done["code"] == 2 and command not in RESUMABLE and left.exists():
                done = killer.run([*again, "--overwrite"])
            assert done["code"] == 0, done["said"]
            assert contents(out) == expected
        shutil.rmtree(out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"], "something is left beside the folder"
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_and_resumed_a_command_gives_the_same_bytes(
    command: str, killer: Killer, place: Path, tmp_path: Path
) -> None:
    """Would catch a folder that is named before it is whole, a part that is read although it was cut off, a resumed run that counts a part
    twice or draws other random numbers."""
    assert sum(try_moments(command, killer, place, tmp_path, MOMENTS).values()) == MOMENTS


@pytest.mark.kill
@pytest.mark.parametrize("command", COMMANDS)
def test_fifty_moments(
    command: str, killer: Killer, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The long form; prints what was found."""
    seen = try_moments(command, killer, place, tmp_path, 50)
    with capsys.disabled():
        print(
            f"\n{command}: 50 moments: {seen['nothing']} before anything was written, {seen['begun']} with a folder begun, {seen['complete']} after the end; all ended in the same bytes"
        )


@pytest.fixture(params=["full", "read-only"])
def bad_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A file system of 64 KB, or one that cannot be written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = "size=64k" if request.param == "full" else "ro,size=64k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, check=False)  # fmt: skip
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield request.param, disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a child may just be ending


@pytest.mark.parametrize("command", ["drop", "sparsify", "layerwise", "sweep"])
def test_a_disk_that_takes_nothing(command: str, bad_disk: tuple[str, Path], killer: Killer, place: Path) -> None:
    """One line, no traceback, and nothing that looks complete."""
    kind, disk = bad_disk
    found = killer.run([*argv_of(command, place), "--out", str(disk / "out")])
    assert not (disk / "out").exists(), kind
    assert found["code"] in (1, 2) and "Traceback" not in found["said"], found["said"]
    assert [line for line in found["said"].splitlines() if line.startswith("prunescope: ")], found["said"]


SHORT = ("sparsify", "heal")


@pytest.mark.parametrize("command", [c if c in SHORT else pytest.param(c, marks=pytest.mark.kill) for c in COMMANDS])
def test_a_disk_that_fills_while_a_command_writes(command: str, killer: Killer, place: Path, tmp_path: Path) -> None:
    """At several shares of what is written: one line and exit code 2, nothing beside; with more space the bytes of an undisturbed run. Would
    catch an error of a full disk that a library words in its own way, and a file that was cut off and is taken for whole."""
    argv, whole, disk = argv_of(command, place), tmp_path / "whole", tmp_path / "disk"
    first = killer.run([*argv, "--out", str(whole)])
    assert first["code"] == 0, first["said"]
    expected = contents(whole)
    written = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    disk.mkdir()
    for share in (0.2, 0.5, 0.9):
        size = f"size={max(8192, int(written * share) // 4096 * 4096)}"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], capture_output=True, check=False)  # fmt: skip
        if mounted.returncode:
            pytest.skip("mounting a small tmpfs needs root")
        try:
            found = killer.run([*argv, "--out", str(disk / "out")], unchecked=True)
            said = [line for line in found["said"].splitlines() if line.startswith("prunescope: ")]
            assert found["code"] == 2 and "Traceback" not in found["said"] and "free some space" in said[-1], found
            assert not list(disk.iterdir())
            subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
            again = killer.run([*argv, "--out", str(disk / "out"), *(["--resume"] if command in RESUMABLE else [])])
            assert again["code"] == 0, again["said"]
            assert contents(disk / "out") == expected
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a child may just be ending
