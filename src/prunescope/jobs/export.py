"""`prunescope export`: a model as a folder that an engine runs, with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prunescope.errors import UserError
from prunescope.export.llama_cpp import write_gguf
from prunescope.export.transformers import write_folder
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions
from prunescope.models.loaded import LoadedModel
from prunescope.runs.folder import write_config

__all__ = ["ExportOptions", "run"]

Engine = Literal["llama.cpp", "transformers"]


@dataclass(frozen=True)
class ExportOptions(Options):
    """See `prunescope.export`."""

    model: Model
    engine: Engine
    drop: str | None
    loading: LoadOptions
    output: OutputOptions


def run(options: ExportOptions) -> Path:
    options.check()
    loaded = options.loading.load(options.model)
    if options.drop:
        if loaded.dropped:
            raise UserError(f"{options.model} has sublayers dropped already ({loaded.dropped}); leave --drop out")
        loaded.drop(options.drop)
    options.output.require_space(sum(4 * p.numel() for p in loaded.model.parameters()) + 2**25)
    with options.output.staged() as folder:
        if folder is None:
            raise UserError("export: say where the folder goes, with --out DIR")
        if options.engine == "llama.cpp":
            with_tokenizer = write_gguf(loaded, folder / "model.gguf")
            how = "llama-cli -m model.gguf" if with_tokenizer else _IDS
        else:
            how = _PYTHON.format(extra=", trust_remote_code=True" if write_folder(loaded, folder) else "")
        write_config(folder, options.config())
        (folder / "README.md").write_text(_card(loaded, options.engine, how), "utf-8")
    options.output.say_written(f" ({options.engine})")
    return Path(str(options.output.out)).expanduser()


_IDS = "# model.gguf has no tokenizer: call llama_decode of llama.h with token ids; llama-cli and llama-server need one"
_PYTHON = 'transformers.AutoModelForCausalLM.from_pretrained("."{extra})'


def _card(loaded: LoadedModel, engine: Engine, how: str) -> str:
    dropped = loaded.dropped
    return f"""# {loaded.ref}, pruned

Written by prunescope for {engine}.

| | |
|---|---|
| base | {loaded.identity.get("source", loaded.ref)} |
| attention sublayers dropped | {list(dropped.attn)} of {loaded.dense_layers} |
| MLP sublayers dropped | {list(dropped.mlp)} of {loaded.dense_layers} |
| zero weights in what is left | {loaded.sparsity():.1%} |

Run it:

```
{how}
```
"""
