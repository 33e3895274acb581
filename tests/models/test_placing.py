"""Models on several GPUs. Here all hooks of accelerate are on, and every part lies on the CPU: what its wrapped forwards could break shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import prunescope
from families import characters_folder
from prunescope.models.anatomy import find_anatomy
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.models.placing import homeward, is_sharded


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placing")
    characters_folder(folder / "model")
    (folder / "prompts.txt").write_text("cat dog\n2 + 3 = 5\n", "utf-8")
    (folder / "text.txt").write_text("a cat and a dog and 12 birds\n" * 3, "utf-8")
    return folder


def placed(folder: Path) -> LoadedModel:
    """As transformers gives it where the blocks lie on two GPUs, but for where they lie."""
    from accelerate import dispatch_model

    loaded = load_model(folder, device="cpu")
    names = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(5)),
    ]
    dispatch_model(loaded.model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    loaded.model.hf_device_map = dict.fromkeys(names, "cpu") | {"lm_head": torch.device("cpu")}
    assert is_sharded(loaded.model) and "forward" in loaded.model.model.layers[0].__dict__
    return replace(loaded, anatomy=find_anatomy(loaded.model))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("layerwise", {"max_new_tokens": 3, "lens": "final-norm"}),
        ("generate", {"max_new_tokens": 3, "cache": False}),
        ("divergence", {"context": 8, "scale": False}),
        ("drop", {"n": 3, "select": "kl", "samples": 2, "seq_len": 8, "cache": False}),
    ],
)
def test_a_model_with_hooks_gives_the_numbers_of_a_plain_one(
    command: str, options: dict[str, Any], place: Path
) -> None:
    """Would catch a forward of accelerate's that is lost when blocks are passed by, and a norm whose copy still calls the model's own."""
    found = []
    for load in (placed, lambda folder: load_model(folder, device="cpu")):
        dense, target = load(place / "model"), load(place / "model")
        target.drop("attn=1;mlp=2")
        if command == "drop":
            models: dict[str, Any] = {"model": dense}
        else:
            text = (
                {"text": str(place / "text.txt")}
                if command == "divergence"
                else {"prompts": str(place / "prompts.txt")}
            )
            models = {"dense": dense, "target": target, **text}
        found.append(str(getattr(prunescope, command)(**models, **options, device="cpu").table().to_pylist()))
        assert load is not placed or "forward" in dense.model.model.layers[0].__dict__
    assert found[0] == found[1]


def test_what_needs_one_device_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = placed(place / "model")
    prompts = {"prompts": str(place / "prompts.txt"), "max_new_tokens": 1}
    monkeypatch.setattr("prunescope.jobs.heal.load_model", lambda *a, **k: loaded)
    for call, message in (
        (lambda: prunescope.sweep(loaded, method="wanda", sparsity="0.5", samples=2, seq_len=8, **prompts), "wanda pruning in memory"),
        (lambda: prunescope.heal("drop:attn=1", teacher=loaded), "lies on several GPUs, where training"),
        (lambda: prunescope.load(str(place / "model"), device="gpus"), "device 'gpus': 0 GPUs here"),
        (lambda: prunescope.load("smollm2-135m", device="gpus"), "a GGUF file is read to one device"),
        (lambda: prunescope.sparsify(str(place / "model"), device="gpus", method="magnitude", sparsity=0.5), "works on one device"),
    ):  # fmt: skip
        with pytest.raises(prunescope.UserError, match=message):
            call()


def test_what_is_watched_comes_to_the_head(place: Path) -> None:
    loaded = placed(place / "model")
    tensor = torch.zeros(1)
    assert homeward(loaded)(tensor) is tensor  # already there
    loaded.anatomy.head.weight = torch.nn.Parameter(torch.zeros(2, 2, device="meta"))  # type: ignore[union-attr]
    assert homeward(loaded)(tensor).device.type == "meta"
