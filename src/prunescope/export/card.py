"""The model card of an exported folder: what was done, what it cost where that was measured, and how to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunescope.export.parts import Needs
from prunescope.models.loaded import LoadedModel
from prunescope.runs.folder import Run

__all__ = ["card"]

_RUN = {
    "llama.cpp": "```sh\nllama-cli -m model.gguf\nllama-server -m model.gguf\n```",
    "vllm": "```sh\nvllm serve .{trust_flag}\n```",
    "sglang": "```sh\npython -m sglang.launch_server --model-path .{trust_flag}\n```",
    "transformers": '```python\ntransformers.AutoModelForCausalLM.from_pretrained("."{trust})\n```',
}
_COLUMNS = ("kl_dense_target", "top1_agree", "z_cos_dev", "nll_dense", "nll_target")


def card(
    loaded: LoadedModel,
    engine: str,
    needs: Needs,
    *,
    checked: str | None,
    runs: list[Run],
) -> str:
    """Markdown with the metadata that the hub reads.

    Args:
        needs: what the folder asks of who runs it.
        checked: what `--check` says.
        runs: run folders that measured the damage.
    """
    dropped, record = loaded.dropped, loaded.record or {}
    base = (record.get("base") or {}).get("source") or loaded.identity.get("source", loaded.ref)
    recipe = {
        "base": _short(str(base)),
        "attention sublayers dropped": f"{list(dropped.attn)} of {loaded.dense_layers}",
        "MLP sublayers dropped": f"{list(dropped.mlp)} of {loaded.dense_layers}",
        "zero weights in what is left": f"{loaded.sparsity():.1%}",
    }
    recipe |= {
        key: str(record[key])
        for key in ("method", "pattern", "select", "score", "calibration", "heal")
        if record.get(key)
    }
    how = _RUN[engine].format(
        trust=", trust_remote_code=True" if needs.code else "",
        trust_flag=" --trust-remote-code" if needs.code else "",
    )
    if needs.plugin:
        how = "vLLM finds the class in prunescope's plugin; `--no-deps` leaves vLLM's packages as they are.\n\n```sh\npip install --no-deps prunescope\nvllm serve .\n```"
    if needs.without_tokenizer:
        how = f"`model.gguf` has no tokenizer: {needs.without_tokenizer}. Call `llama_decode` of llama.h with token ids; `llama-cli` and `llama-server` need one."
    parts = [
        _front(str(base), engine), f"# {_short(loaded.ref)}, pruned", f"Written by prunescope for {engine}.",
        "## Recipe", _table(recipe), "## Measured damage", *(map(_damage, runs) if runs else ["Not measured."]),
        "## Run it", how, "## Check", (checked or "Not run in the engine: `export --check` does.") ,
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _front(base: str, engine: str) -> str:
    library = {"llama.cpp": "gguf"}.get(engine, "transformers")
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [pruned, prunescope]"]
    if base.count("/") == 1 and not base.startswith((".", "~", "/")):
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---"])


def _table(values: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])


def _damage(run: Run) -> str:
    """Means of the columns that tell most, or the scores of tasks, from the summary of a run folder."""
    rows = {}
    for place, value in _numbers(run.summary).items():
        *names, last = place
        if (last == "mean" and names[-1] in _COLUMNS) or last in ("value", "score"):
            rows[" ".join(map(_short, names))] = f"{value:.4g}"
    return f"By `prunescope {run.command}`:\n\n{_table(rows)}" if rows else f"`prunescope {run.command}` tells of none."


def _numbers(values: dict[str, Any], place: tuple[str, ...] = ()) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _numbers(value, (*place, name))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[(*place, name)] = float(value)
    return found


def _short(reference: str) -> str:
    """A hub id as it is, a folder or file by its name alone."""
    return Path(reference).name if reference.startswith((".", "~", "/")) else reference
