"""`prunescope export`: a model as a folder that an engine runs, with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prunescope.errors import UserError
from prunescope.export.card import card
from prunescope.export.check import check, require
from prunescope.export.hub import check_repository, push
from prunescope.export.llama_cpp import write_gguf
from prunescope.export.no_ops import write_no_ops
from prunescope.export.parts import Needs
from prunescope.export.transformers import write_folder
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions
from prunescope.models.loaded import LoadedModel
from prunescope.models.packed import refuse_packed
from prunescope.progress import console
from prunescope.runs.folder import open_run, write_config

__all__ = ["Engine", "ExportOptions", "run", "write_for"]

Engine = Literal["llama.cpp", "transformers", "vllm", "sglang"]


@dataclass(frozen=True)
class ExportOptions(Options):
    """See `prunescope.export`."""

    model: Model
    engine: Engine
    drop: str | None
    run_check: bool
    engine_python: str | None
    measured: str | None
    push_to_hub: str | None
    private: bool
    loading: LoadOptions
    output: OutputOptions

    def check(self) -> None:
        super().check()
        if self.run_check:
            require(self.engine, self.engine_python)
        elif self.engine_python is not None:
            raise UserError("--engine-python is for --check; give both or neither")
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub)
        elif self.private:
            raise UserError("--private says how --push-to-hub makes the repository; give both or neither")


def run(options: ExportOptions) -> Path:
    options.check()
    runs = [open_run(name.strip()) for name in (options.measured or "").split(",") if name.strip()]
    loaded = options.loading.load(options.model)
    if options.drop:
        if loaded.dropped:
            raise UserError(f"{options.model} has sublayers dropped already ({loaded.dropped}); leave --drop out")
        loaded.drop(options.drop)
    if options.engine != "transformers":
        refuse_packed(str(options.model), loaded.model, f"--for {options.engine}")
    options.output.require_space(sum(4 * p.numel() for p in loaded.model.parameters()) + 2**25)
    checked = None
    with options.output.staged() as folder:
        if folder is None:
            raise UserError("export: say where the folder goes, with --out DIR")
        needs = write_for(options.engine, loaded, folder)
        if needs.without_tokenizer:
            console.print(f"no tokenizer in model.gguf: {needs.without_tokenizer}", markup=False)
        if options.run_check:
            if needs.without_tokenizer:
                raise UserError(f"--check: llama.cpp needs a tokenizer in the file, and {needs.without_tokenizer}")
            checked = check(loaded, options.engine, folder, options.engine_python)
            console.print(str(checked), markup=False)
        write_config(folder, options.config())
        text = card(loaded, options.engine, needs, runs=runs, checked=str(checked) if checked else None)
        (folder / "README.md").write_text(text, "utf-8")
    options.output.say_written(f" ({options.engine})")
    path = Path(str(options.output.out)).expanduser()
    if options.push_to_hub is not None:
        console.print(f"pushed: {push(path, options.push_to_hub, private=options.private)}", markup=False)
    return path


def write_for(engine: Engine, loaded: LoadedModel, folder: Path) -> Needs:
    """Write ``loaded`` for ``engine`` into ``folder``. Returns what it needs to run."""
    if engine == "llama.cpp":
        return Needs(without_tokenizer=write_gguf(loaded, folder / "model.gguf"))
    if engine == "transformers":
        return Needs(code=write_folder(loaded, folder))
    return write_no_ops(loaded, folder, engine)
