"""`prunescope speed`: what each model costs in memory and time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions
from prunescope.jobs.speed_engine import require, run_in_engine
from prunescope.models.dropping import DropSpec
from prunescope.models.references import is_drop
from prunescope.models.semistructured import check_kernels
from prunescope.models.variants import VariantSpec, read_variant
from prunescope.progress import progress
from prunescope.report.terminal.scoring import show_speed
from prunescope.results import SpeedResult
from prunescope.runs.provenance import run_record
from prunescope.speed.measure import Measured, Workload, check_length, forget, measure, time_again
from prunescope.speed.rows import notes, rows_of, short
from prunescope.speed.timing import measure_rates

__all__ = ["SpeedOptions", "run"]


@dataclass(frozen=True)
class SpeedOptions(Options):
    """See `prunescope.speed`."""

    models: list[Model]
    batch_size: str
    length: int
    max_new_tokens: int
    repeats: int
    sparse_kernels: bool
    seed: int
    engine: Literal["transformers", "llama.cpp", "vllm"]
    engine_python: str | None
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        if not self.models:
            raise UserError("speed needs at least one model, for example smollm2-135m drop:attn=3,5")
        names = self.names
        if is_drop(names[0]):
            raise UserError(f"{names[0]}: sublayers are dropped from the first model; name that model first")
        rounded = next((name for name in names if isinstance(read_variant(name), VariantSpec)), None)
        if rounded is not None:
            raise UserError(
                f"{rounded}: quant: rounds weights in memory and runs at the dense speed; give a quantised checkpoint"
            )
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise UserError(f"{twice} is named twice; name every model once")
        if self.max_new_tokens < 4:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: at least 4 are needed to time a step")
        sizes = self.batch_sizes
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise UserError(f"--batch-size {self.batch_size}: write different numbers with commas, for example 1,8")
        if self.engine != "transformers":
            if self.sparse_kernels:
                raise UserError(f"--sparse-kernels are PyTorch's; {self.engine} has none, leave one of the two out")
            require(self.engine, self.engine_python)
        elif self.engine_python is not None:
            raise UserError("--engine-python is for --engine vllm; give both or neither")
        super().check()

    @property
    def names(self) -> list[str]:
        """The models as the user wrote them."""
        return [str(ref) for ref in self.models]

    @property
    def batch_sizes(self) -> list[int]:
        """Empty where they cannot be read."""
        try:
            return [int(part) for part in str(self.batch_size).split(",")]
        except ValueError:
            return []

    @property
    def workload(self) -> Workload:
        sizes = tuple(self.batch_sizes)
        return Workload(sizes, self.length, self.max_new_tokens, self.repeats, self.seed, self.sparse_kernels)


def run(options: SpeedOptions) -> SpeedResult:
    started = time.monotonic()
    options.check()
    if options.engine != "transformers":
        return run_in_engine(
            options.engine,
            options.engine_python,
            options.models,
            options.workload,
            options.config(),
            options.loading,
            options.output,
        )
    names, workload = options.names, options.workload
    found: dict[int, Measured] = {}
    descriptions: dict[int, dict[str, Any]] = {}
    first = options.loading.load(options.models[0])
    device, dtype = first.device, first.dtype
    if options.sparse_kernels:
        check_kernels(device, dtype)
    specs = {i: spec for i, ref in enumerate(options.models) if isinstance(spec := read_variant(ref), DropSpec)}
    for spec in specs.values():
        spec.check(len(first.anatomy))
    with options.output.staged() as staging, progress(f"{len(names)} models", len(names)) as advance:
        rates = measure_rates(device, dtype)
        for i in [0, *specs, *(i for i in range(1, len(names)) if i not in specs)]:
            advance.note(names[i])
            loaded = first if i == 0 or i in specs else options.loading.load_other(options.models[i])
            check_length(loaded, workload)
            with loaded.dropping(specs.get(i, DropSpec())):
                descriptions[i] = loaded.describe()
                found[i] = measure(loaded, names[i], workload)
            if i and i == max(specs, default=0):
                time_again(loaded, found[0], workload)
            del loaded
            if i == max(specs, default=0):  # nothing more is dropped from the first
                del first
            forget(device)
            advance(1)
        measured = [found[i] for i in range(len(names))]
        if options.sparse_kernels and not any(one.facts["sparse_layers"] for one in measured):
            raise UserError(
                f"--sparse-kernels: none of {', '.join(names)} has 2:4 weights; make some with sparsify --pattern 2:4, or leave it out"
            )
        rows = [row for one in measured for row in rows_of(one, measured[0], rates, workload)]
        info = {
            **run_record("speed", options.config(), device, [descriptions[i] for i in range(len(names))], started),
            "dtype": str(dtype).removeprefix("torch."),
            "rates": {"bytes_per_s": rates.bytes_per_s, "operations_per_s": rates.operations_per_s},
            "notes": {one.name: notes(one.facts) for one in measured},
            "summary": {f"{row['model']}, batch {row['batch_size']}": short(row) for row in rows},
        }
        result = SpeedResult(info, pa.Table.from_pylist(rows))
        if staging is not None:
            result.write(staging)
    show_speed(rows, info)
    options.output.say_written()
    return result
