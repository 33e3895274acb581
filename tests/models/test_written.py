"""What is written must load in plain transformers before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from families import tiny_folder
from prunescope.cli import main
from prunescope.errors import UserError
from prunescope.models.written import check_written


@pytest.mark.parametrize("how", ["renamed", "another shape"])
def test_weights_that_transformers_would_not_find_are_named(how: str, tmp_path: Path) -> None:
    """A wrong name is filled with random numbers by transformers, with a warning that nobody reads."""
    folder = tiny_folder("llama", tmp_path / "dense")
    check_written(folder, transformers.LlamaForCausalLM)
    file, name = folder / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(file)
    if how == "renamed":
        tensors[f"{name}_blocks"] = tensors.pop(name)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="nothing was written") as caught:
        check_written(folder, transformers.LlamaForCausalLM)
    assert how != "renamed" or ("1 weights" in str(caught.value) and name in str(caught.value))


@pytest.mark.parametrize(
    "argv",
    [
        ["drop", "--n", "1", "--format", "zeroed", "--calibration", "self", "--samples", "2", "--seq-len", "8"],
        ["sparsify", "--method", "magnitude", "--sparsity", "0.5", "--calibration", "none"],
    ],
)
def test_nothing_is_left_of_a_folder_that_would_not_load(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """GPT-OSS, as released, was once written with names that load as random experts, and exit code 0."""
    dense = tiny_folder("llama", tmp_path / "dense")
    real_save, real_load = transformers.LlamaForCausalLM.save_pretrained, transformers.LlamaForCausalLM.from_pretrained

    def losing(self: Any, folder: Any, state_dict: dict[str, torch.Tensor], **options: Any) -> None:
        real_save(self, folder, state_dict=dict(list(state_dict.items())[:-3]), **options)

    def missing(folder: Any, *args: Any, **options: Any) -> Any:
        found = real_load(folder, *args, **options)
        if options.get("output_loading_info") and options.get("device_map") == "meta":
            found[1]["missing_keys"] = {"model.norm.weight"}
        return found

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", losing)
    if argv[0] == "sparsify":  # its shards are written by hand
        monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", missing)
    out = tmp_path / "out"
    assert main([argv[0], str(dense), *argv[1:], "--device", "cpu", "--out", str(out)]) == 2
    assert "transformers would not find" in capfd.readouterr().err
    assert not out.exists()
