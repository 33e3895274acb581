"""`prunescope speed --engine llama.cpp | vllm`: every model exported, loaded side by side and timed in turn, so that a machine's drift meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pyarrow as pa
import torch

from prunescope.errors import UserError
from prunescope.export.llama_cpp import write_gguf
from prunescope.export.llama_cpp_engine import LlamaCpp, require_engine
from prunescope.export.no_ops import write_no_ops
from prunescope.export.vllm_engine import Vllm, require_vllm
from prunescope.jobs.options import LoadOptions, Model, OutputOptions
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.shards import stored_tensors
from prunescope.models.variants import read_variant
from prunescope.progress import progress
from prunescope.report.terminal.scoring import show_engine_speed
from prunescope.results import SpeedResult
from prunescope.runs.provenance import run_record
from prunescope.speed.measure import Workload
from prunescope.speed.timing import Timing

__all__ = ["ENGINES", "require", "run_in_engine"]

_CACHE: Literal["F16"] = "F16"  # of keys and values in llama.cpp, as it has it if nothing else is said


@dataclass(frozen=True)
class _Running:
    """A model in its engine."""

    weight_bytes: int
    file_bytes: int
    cache_bytes: int  # keys and values of one text as long as the context
    cache_dtype: str
    write: Callable[
        [list[int], int], tuple[float, float]
    ]  # prompt, steps -> seconds of the prefill and of all steps but the first


def require(engine: str, python: str | None) -> str:
    """Name and version of ``engine``. Raises UserError where it is not here."""
    if engine == "vllm":
        return require_vllm(python)
    if python is not None:
        raise UserError(f"--engine-python is for vllm alone; {engine} runs with this Python")
    return require_engine()


def run_in_engine(
    engine: Literal["llama.cpp", "vllm"], python: str | None, models: list[Model], work: Workload, config: dict[str, Any], loading: LoadOptions,
    output: OutputOptions,
) -> SpeedResult:  # fmt: skip
    """Measure ``models``, the first of which is the base; ``config`` is what the run folder says of the options.

    Raises:
        UserError: the engine is not here, or cannot run one of the models.
    """
    started = time.monotonic()
    name, names = require(engine, python), [str(ref) for ref in models]
    length, steps = work.length, work.max_new_tokens
    context = length + steps + 1
    write, start = ENGINES[engine]
    with output.staged() as staging, TemporaryDirectory() as folder, ExitStack() as stack:
        exported = _exported(models, names, work, loading, Path(folder), write)
        generator = torch.Generator().manual_seed(work.seed)
        ids = torch.randint(exported.vocabulary, (length,), generator=generator).tolist()
        running = [start(place, exported.dtype, context, python, stack) for place in exported.folders]
        times: list[list[tuple[float, float]]] = [[] for _ in names]
        with progress(f"{len(names)} models", work.repeats + 1) as advance:
            for repeat in range(work.repeats + 1):  # the first warms up
                for one, found in zip(running, times, strict=True):
                    prefill, decode = one.write(ids, steps)
                    if repeat:
                        found.append((prefill, decode / (steps - 1)))
                advance(1)
        rows = _rows(engine, names, running, times, length, steps, context)
        info = {
            **run_record("speed", config, torch.device("cpu"), exported.descriptions, started),
            "engine": name,
            "threads": torch.get_num_threads(),
            "cache": running[0].cache_dtype,
            "summary": {row["model"]: {key: row[key] for key in row if key != "model"} for row in rows},
        }
        result = SpeedResult(info, pa.Table.from_pylist(rows))
        if staging is not None:
            result.write(staging)
    show_engine_speed(rows, info)
    output.say_written()
    return result


# --- what is written, and what runs it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exported:
    descriptions: list[dict[str, Any]]
    folders: list[Path]
    vocabulary: int
    dtype: str


def _exported(
    models: list[Model], names: list[str], work: Workload, loading: LoadOptions, folder: Path, write: Callable[[LoadedModel, str, Path], None]
) -> _Exported:  # fmt: skip
    """Every model written for its engine, one after another."""
    first = loading.load(models[0])
    descriptions, folders = [], []
    for i, (ref, name) in enumerate(zip(models, names, strict=True)):
        spec = read_variant(ref)
        drop = spec if isinstance(spec, DropSpec) else DropSpec()
        drop.check(len(first.anatomy))
        loaded: LoadedModel = first if i == 0 or drop else loading.load_other(ref)
        if loaded.context is not None and work.length + work.max_new_tokens > loaded.context:
            raise UserError(f"{name}: --length and --max-new-tokens are more than its context of {loaded.context} tokens; ask for less")  # fmt: skip
        place = folder / str(i)
        place.mkdir()
        with loaded.dropping(drop):
            write(loaded, name, place)
            descriptions.append(loaded.describe())
        folders.append(place)
    return _Exported(descriptions, folders, first.anatomy.vocab_size, str(first.dtype).removeprefix("torch."))


def _write_for_llama_cpp(loaded: LoadedModel, name: str, folder: Path) -> None:
    without = write_gguf(loaded, folder / "model.gguf")
    if without:
        raise UserError(f"{name}: llama.cpp needs a tokenizer in the file, and {without}")


def _in_llama_cpp(folder: Path, _: str, context: int, __: str | None, stack: ExitStack) -> _Running:
    import gguf

    file = folder / "model.gguf"
    engine = stack.enter_context(LlamaCpp(file, context=context, threads=torch.get_num_threads(), cache=_CACHE, exact=False))  # fmt: skip

    def write(ids: list[int], steps: int) -> tuple[float, float]:
        written = engine.write(ids, steps)
        return written.prefill_s, written.decode_s

    weights = int(sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors))
    return _Running(weights, file.stat().st_size, engine.cache_bytes(), _CACHE, write)


def _write_for_vllm(loaded: LoadedModel, _: str, folder: Path) -> None:
    write_no_ops(loaded, folder, "vllm")


def _in_vllm(folder: Path, dtype: str, context: int, python: str | None, stack: ExitStack) -> _Running:
    """Not compiled: compiling takes minutes of a CPU."""
    engine = stack.enter_context(Vllm(python, threads=torch.get_num_threads()))
    told = engine.load(folder, dtype=dtype, context=context)

    def write(ids: list[int], steps: int) -> tuple[float, float]:
        written = engine.write([ids], steps)[0]
        return written.prefill_s, written.decode_s

    weights = sum(tensor.nbytes for tensor in stored_tensors(folder, str(folder)).values())
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return _Running(weights, files, told.cache_bytes, told.cache_dtype, write)


ENGINES: dict[str, tuple[Callable[[LoadedModel, str, Path], None], Callable[..., _Running]]] = {
    "llama.cpp": (_write_for_llama_cpp, _in_llama_cpp),
    "vllm": (_write_for_vllm, _in_vllm),
}
"""Engine -> what writes a model for it, and what starts it."""


def _rows(
    engine: str, names: list[str], running: list[_Running], times: list[list[tuple[float, float]]], length: int, steps: int, context: int
) -> list[dict[str, Any]]:  # fmt: skip
    timings = [tuple(Timing(tuple(column)) for column in zip(*one, strict=True)) for one in times]
    rows = []
    for name, one, here in zip(names, running, timings, strict=True):
        row: dict[str, Any] = {
            "model": name, "engine": engine, "length": length, "new_tokens": steps,
            "weight_bytes": one.weight_bytes, "file_bytes": one.file_bytes, "context": context, "cache_bytes": one.cache_bytes,
        }  # fmt: skip
        for kind, tokens, timing, base in zip(("prefill", "decode"), (length, 1), here, timings[0], strict=True):
            row |= {
                f"{kind}_s": timing.median,
                f"{kind}_s_min": min(timing.seconds),
                f"{kind}_s_max": max(timing.seconds),
                f"{kind}_tokens_per_s": tokens / timing.median,
                f"{kind}_speedup": base.median / timing.median,
                f"{kind}_within_spread": timing is base or timing.same_as(base),
            }
        rows.append(row)
    for row in rows:
        row |= {"weight_ratio": row["weight_bytes"] / rows[0]["weight_bytes"], "cache_ratio": row["cache_bytes"] / rows[0]["cache_bytes"]}  # fmt: skip
    return rows
