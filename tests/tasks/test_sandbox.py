"""Attacks of generated programs, each run for real, as whoever runs the tests (root too)."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from pathlib import Path

import pytest

from prunescope.tasks.sandbox import CodeEval, run_program

LINUX = sys.platform.startswith("linux") and os.uname().machine == "x86_64"
ATTACKS = {
    "loops for ever": "while True: pass",
    "sleeps": "import time; time.sleep(100)",
    "prints for ever": "while True: print('x' * 1000)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that swallows errors": "import os\nwhile True:\n    try: os.fork()\n    except BaseException: pass",
    "starts a program": "import subprocess; subprocess.run(['true'], check=True)",
    "shell": "import os\nassert os.system('true') == 0",
    "fills memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "fills the disk": "f = open('f', 'wb')\nwhile True: f.write(b'x' * 10**6)",
    "many files": "import os\nfor i in range(10**6): os.open(str(i), os.O_CREAT | os.O_WRONLY)",
    "socket": "import socket; socket.socket()",
    "network": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "kills its parent": "import os\nos.kill(os.getppid(), 0)",
    "leaves before the tests": "import os; os._exit(0)",
    "exits": "raise SystemExit(0)",
    "fails": "assert 1 + 1 == 3",
    "does not compile": "def f(:",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_stopped_and_counted_as_a_failure(attack: str) -> None:
    started = time.monotonic()
    found = run_program(ATTACKS[attack], seconds=2, cpu_seconds=1)
    assert not found.passed and found.reason
    assert time.monotonic() - started < 8


@pytest.mark.skipif(not LINUX, reason="the filter of system calls is for Linux on x86-64")
@pytest.mark.parametrize(
    "attack, code",
    [
        ("fork", "os.fork()"),
        ("fork by hand", "ctypes.CDLL(None, use_errno=True).syscall(57) < 0 and fail()"),
        ("clone3 by hand", "ctypes.CDLL(None).syscall(435, 0, 0) < 0 and fail()"),
        ("io_uring", "ctypes.CDLL(None).syscall(425, 8, 0) < 0 and fail()"),
        ("socket by hand", "ctypes.CDLL(None).syscall(41, 2, 1, 0) < 0 and fail()"),
        ("write", "open('/tmp/prunescope-attack', 'w')"),
        ("remove", "os.remove(path)"),
        ("rename", "os.rename(path, path + '2')"),
        ("memory as a file", "os.memfd_create('x')"),
        ("limits", "__import__('resource').setrlimit(7, (10**6, 10**6))"),
    ],
)
def test_the_kernel_alone_refuses(attack: str, code: str, tmp_path: Path) -> None:
    """With neither the audit hook nor a change of user: what native code could do is refused all the same, root or not."""
    victim = tmp_path / "victim"
    victim.write_text("x")
    program = f"import ctypes, os\npath = {str(victim)!r}\ndef fail(): raise OSError\n{code}"
    found = run_program(program, without=("audit", "nobody", "namespace"))
    assert "seccomp" in found.layers
    assert not found.passed and found.reason in ("PermissionError", "OSError", "ValueError")
    assert victim.read_text() == "x" and not Path("/tmp/prunescope-attack").exists()


def test_without_the_filter_limits_and_audit_hook_hold() -> None:
    """What is left on other systems."""
    for code in (
        "import os; os.fork()",
        "import socket; socket.socket()",
        "open('f', 'w')",
        "import os; os.system('true')",
    ):
        found = run_program(code, without=("seccomp",))
        assert found.reason == "PermissionError" and "audit" in found.layers and "seccomp" not in found.layers


def test_honest_programs_pass_and_the_run_goes_on() -> None:
    """The call of the harness's code_eval, pass@k by hand: of four candidates two pass, so two draws miss both in 1 of 6 cases."""
    good, bad = "def f(x):\n    import math, re, collections, json\n    return x + 1", "while True: pass"
    numbers, outcomes = CodeEval().compute(
        ["assert f(1) == 2"], [[good, "def f(x): return x", good, "f = 3"]], k=[1, 2]
    )
    assert numbers == pytest.approx({"pass@1": 0.5, "pass@2": 5 / 6})
    assert [one["passed"] for _, one in outcomes[0]] == [True, False, True, False]
    assert not run_program(bad, seconds=2, cpu_seconds=1).passed
    assert run_program("import numpy as np\nassert np.arange(4).sum() == 6").passed
    assert run_program(good + "\nassert f(1) == 2").passed


def test_reference_solutions_pass_and_without_their_bodies_fail(shared_data: Path) -> None:
    """Every sixteenth problem of HumanEval. Would catch a layer that stops what honest solutions need."""
    with gzip.open(shared_data / "humaneval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::16]
    for row in rows:
        tests = f"{row['test']}\ncheck({row['entry_point']})"
        assert run_program(f"{row['prompt']}{row['canonical_solution']}\n{tests}").passed, row["task_id"]
        assert not run_program(f"{row['prompt']}    pass\n{tests}").passed, row["task_id"]
