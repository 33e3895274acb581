"""`prunescope speed --engine llama.cpp`: every model exported, loaded side by side and timed in turn, so that a machine's drift meets all alike."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pyarrow as pa
import torch

from prunescope.errors import UserError
from prunescope.export.llama_cpp import write_gguf
from prunescope.export.llama_cpp_engine import LlamaCpp, require_engine
from prunescope.jobs.options import LoadOptions, Model, OutputOptions
from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.models.variants import read_variant
from prunescope.progress import progress
from prunescope.report.terminal.scoring import show_engine_speed
from prunescope.results import SpeedResult
from prunescope.runs.provenance import run_record
from prunescope.speed.measure import Workload
from prunescope.speed.timing import Timing

__all__ = ["run_in_llama_cpp"]

_CACHE: Literal["F16"] = "F16"  # of keys and values, as llama.cpp has it if nothing else is said


def run_in_llama_cpp(
    models: list[Model], work: Workload, config: dict[str, Any], loading: LoadOptions, output: OutputOptions
) -> SpeedResult:
    """Measure ``models``, the first of which is the base; ``config`` is what the run folder says of the options.

    Raises:
        UserError: the engine is not here, or cannot run one of the models.
    """
    started = time.monotonic()
    engine, names = require_engine(), [str(ref) for ref in models]
    length, steps = work.length, work.max_new_tokens
    context = length + steps + 1
    with output.staged() as staging, TemporaryDirectory() as folder, ExitStack() as stack:
        descriptions, files, vocabulary = _exported(models, names, work, loading, Path(folder))
        generator = torch.Generator().manual_seed(work.seed)
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        engines = [
            stack.enter_context(LlamaCpp(file, context=context, threads=torch.get_num_threads(), cache=_CACHE, exact=False))
            for file in files
        ]  # fmt: skip
        times: list[list[tuple[float, float]]] = [[] for _ in names]
        with progress(f"{len(names)} models", work.repeats + 1) as advance:
            for repeat in range(work.repeats + 1):  # the first warms up
                for one, found in zip(engines, times, strict=True):
                    written = one.write(ids, steps)
                    if repeat:
                        found.append((written.prefill_s, written.decode_s / (steps - 1)))
                advance(1)
        rows = _rows(names, files, engines, times, length, steps, context)
        info = {
            **run_record("speed", config, torch.device("cpu"), descriptions, started),
            "engine": engine,
            "threads": torch.get_num_threads(),
            "cache": _CACHE,
            "summary": {row["model"]: {key: row[key] for key in row if key != "model"} for row in rows},
        }
        result = SpeedResult(info, pa.Table.from_pylist(rows))
        if staging is not None:
            result.write(staging)
    show_engine_speed(rows, info)
    output.say_written()
    return result


def _exported(
    models: list[Model], names: list[str], work: Workload, loading: LoadOptions, folder: Path
) -> tuple[list[dict[str, Any]], list[Path], int]:
    """What each model is, its GGUF file, and how many tokens the first has."""
    first = loading.load(models[0])
    descriptions, files = [], []
    for i, (ref, name) in enumerate(zip(models, names, strict=True)):
        spec = read_variant(ref)
        drop = spec if isinstance(spec, DropSpec) else DropSpec()
        drop.check(len(first.anatomy))
        loaded: LoadedModel = first if i == 0 or drop else loading.load_other(ref)
        if loaded.context is not None and work.length + work.max_new_tokens > loaded.context:
            raise UserError(f"{name}: --length and --max-new-tokens are more than its context of {loaded.context} tokens; ask for less")  # fmt: skip
        with loaded.dropping(drop):
            file = folder / f"{i}.gguf"
            without = write_gguf(loaded, file)
            if without:
                raise UserError(f"{name}: llama.cpp needs a tokenizer in the file, and {without}")
            descriptions.append(loaded.describe())
        files.append(file)
    return descriptions, files, first.anatomy.vocab_size


def _rows(
    names: list[str], files: list[Path], engines: list[LlamaCpp], times: list[list[tuple[float, float]]], length: int, steps: int, context: int
) -> list[dict[str, Any]]:  # fmt: skip
    timings = [tuple(Timing(tuple(column)) for column in zip(*one, strict=True)) for one in times]
    rows = []
    for name, file, engine, here in zip(names, files, engines, timings, strict=True):
        row: dict[str, Any] = {
            "model": name, "engine": "llama.cpp", "length": length, "new_tokens": steps,
            "weight_bytes": _weight_bytes(file), "file_bytes": file.stat().st_size, "context": context, "cache_bytes": engine.cache_bytes(),
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


def _weight_bytes(file: Path) -> int:
    import gguf

    return int(sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors))
