"""llama.cpp on this machine, prebuilt in the package xllamacpp, in a process of its own: it aborts on a file that it cannot use."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Literal, Self
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from prunescope.errors import UserError

__all__ = ["ENGINE", "LlamaCpp", "Written", "require_engine"]

ENGINE = "xllamacpp"
_NEVER = re.compile(r"EOG token +=\s*(\d+)")
_KV_SIZE = re.compile(r"KV buffer size =\s*([0-9.]+) MiB")


@dataclass(frozen=True)
class Written:
    """What the engine wrote after a prompt, greedily."""

    tokens: tuple[int, ...]
    logprobs: dict[
        int, dict[int, float]
    ]  # by step: of the most likely tokens; the engine leaves out a step in the middle of a character
    prefill_s: float
    decode_s: float  # for all steps but the first, which the prefill gives


def require_engine() -> str:
    """The version of the engine's package. Raises UserError where it is not installed."""
    from importlib.metadata import version

    if importlib.util.find_spec(ENGINE) is None:
        raise UserError(
            f"llama.cpp is not installed here: pip install {ENGINE} (prebuilt, for a CPU; the tested version is in requirements-engines.txt)"
        )
    return f"{ENGINE} {version(ENGINE)}"


class LlamaCpp:
    """A GGUF file loaded by llama.cpp. Use it in a ``with`` block.

    Args:
        file: the GGUF file; it must have a tokenizer, though prompts are token ids.
        context: tokens that fit into the key/value cache.
        cache: precision of keys and values.
        exact: without the fused attention, which is off by up to 0.01 of a log-probability on a CPU.
    Raises:
        UserError: the engine is not installed, or ends while it loads the file.
    """

    def __init__(
        self, file: Path, *, context: int, threads: int = 1, cache: Literal["F32", "F16"] = "F32", exact: bool = True
    ) -> None:
        require_engine()
        self.file = file
        settings = {"file": str(file), "context": context, "threads": threads, "cache": cache, "exact": exact}
        self._folder = TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prunescope.export.llama_cpp_worker", json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        self._address = self._process.stdout.readline().strip()
        if not self._address:
            error = self._ended()
            self.close()
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def write(self, ids: list[int], steps: int, logprobs: int = 1) -> Written:
        """``steps`` greedy tokens after the prompt ``ids``, with the ``logprobs`` most likely ones at each step."""
        asked = {
            "prompt": ids, "n_predict": steps, "temperature": 0, "n_probs": logprobs, "ignore_eos": True, "cache_prompt": False, "return_tokens": True,
        }  # fmt: skip
        found = self._ask("completion", asked)
        times = found["timings"]
        if len(found["tokens"]) != steps:
            raise UserError(
                f"llama.cpp wrote {len(found['tokens'])} of {steps} tokens of {self.file.name}: its context is too short"
            )
        rows: dict[int, dict[int, float]] = {}
        step = 0
        for one in found.get("completion_probabilities", []):
            step = found["tokens"].index(one["id"], step)
            rows[step] = {top["id"]: top["logprob"] for top in one["top_logprobs"]}
            step += 1
        return Written(tuple(found["tokens"]), rows, times["prompt_ms"] / 1000, times["predicted_ms"] / 1000)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, as the engine reads them."""
        found: list[int] = self._ask("tokenize", {"content": text, "add_special": True, "parse_special": True})[
            "tokens"
        ]
        return found

    def never_written(self) -> list[int]:
        """Tokens that end a text for the engine; `write` gives them no probability."""
        return sorted({int(i) for i in _NEVER.findall(self._log.read_text(errors="replace"))})

    def cache_bytes(self) -> int:
        """Bytes of the key/value cache, from the engine's log, which has two decimals of a MiB."""
        return round(sum(map(float, _KV_SIZE.findall(self._log.read_text(errors="replace")))) * 2**20)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._folder.cleanup()

    def _ask(self, path: str, asked: dict[str, Any]) -> Any:
        request = Request(f"{self._address}/{path}", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request) as reply:
                return json.loads(reply.read())
        except HTTPError as error:
            raise UserError(f"llama.cpp refuses {path} of {self.file.name}: {error.read().decode()[:200]}") from error
        except (URLError, ConnectionError, HTTPException) as error:
            raise self._ended() from error

    def _ended(self) -> UserError:
        code = self._process.wait(60)
        lines = self._log.read_text(errors="replace").splitlines()
        said = [line.strip() for line in lines if "error loading model:" in line or "GGML_ASSERT" in line]
        return UserError(f"llama.cpp ended with {code} on {self.file.name}: {(said or lines or ['no log'])[-1][:200]}")
