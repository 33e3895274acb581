"""Run a program that a model wrote, and say whether it passed. Nothing it does may reach anything else.

The program runs in a Python of its own (`sandbox_child.py`, which says what each layer of the confinement guarantees), in a process
group and a temporary folder of its own, with an environment of two variables, its output thrown away. It has passed if it ran to its end and the
runner, not the program, said so.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

__all__ = ["CodeEval", "Outcome", "run_program"]

_RUNNER = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Outcome:
    """``passed`` or not; ``reason`` is the exception's name, ``timeout``, or how the process ended; ``layers`` what confined it."""

    passed: bool
    reason: str
    layers: tuple[str, ...]


def run_program(
    program: str, *, seconds: float = 10.0, cpu_seconds: int = 5, memory_mb: int = 1024, without: Sequence[str] = ()
) -> Outcome:
    """Run a Python program; it passes if it ends without an exception.

    Args:
        program: source code.
        seconds: of the wall clock, after which it is killed.
        cpu_seconds: of processor time, after which the kernel kills it.
        memory_mb: address space in MB, the interpreter's own included.
        without: layers left out, for tests of the others (``seccomp``, ``namespace``, ``nobody``, ``audit``).
    """
    nonce = secrets.token_hex(16)
    head = f"{nonce} {cpu_seconds} {memory_mb * 2**20} {','.join(without) or '-'}\n"
    with tempfile.TemporaryDirectory(prefix="prunescope-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER.read_text("utf-8"), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        try:
            said = _talk(process, reading, (head + program).encode("utf-8", "replace"), time.monotonic() + seconds)
        finally:
            os.close(reading)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = said.decode("utf-8", "replace").split("\n") if said is not None else []
    layers = next((tuple(filter(None, line[7:].split(","))) for line in lines if line.startswith("layers ")), ())
    if said is None:
        return Outcome(False, "timeout", layers)
    if f"passed {nonce}" in lines:
        return Outcome(True, "", layers)
    failed = next((line[7:] for line in lines if line.startswith("failed ")), None)
    return Outcome(False, failed or f"ended with {process.returncode}", layers)


def _talk(process: subprocess.Popen[bytes], reading: int, text: bytes, until: float) -> bytes | None:
    """Hand over the program and read what the runner says, to its end; None if the time is over. Never waits longer."""
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    said, rest = b"", memoryview(text)
    while (left := until - time.monotonic()) > 0:
        writers = [process.stdin] if len(rest) else []
        ready, free, _ = select.select([reading], writers, [], left)
        if free:
            try:
                rest = rest[os.write(process.stdin.fileno(), rest) :]
            except BrokenPipeError:
                rest = rest[len(rest) :]
            if not len(rest):
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        if ready:
            chunk = os.read(reading, 4096)
            said = (said + chunk)[:65536]
            if not chunk:
                return said
    with contextlib.suppress(OSError):
        process.stdin.close()
    return None


class CodeEval:
    """Stands where the harness's tasks load ``code_eval``: the same call and the same numbers, every program in the sandbox."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k (Chen et al. 2021, the unbiased estimate) over problems, and what became of every candidate.

        Args:
            references: a test a problem, run after the candidate.
            predictions: candidates of each problem.
        """
        outcomes: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        rates: dict[str, list[float]] = {}
        for number, (test, candidates) in enumerate(zip(references, predictions, strict=True)):
            found = [run_program(f"{candidate}\n{test}") for candidate in candidates]
            outcomes[number] = [
                (i, {"task_id": number, "passed": one.passed, "result": one.reason or "passed", "completion_id": i})
                for i, one in enumerate(found)
            ]
            n, c = len(found), sum(one.passed for one in found)
            for at in k:
                if n >= at:
                    rates.setdefault(f"pass@{at}", []).append(1 - comb(n - c, at) / comb(n, at))
        return {name: sum(values) / len(values) for name, values in rates.items()}, outcomes
