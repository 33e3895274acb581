"""Whether models are read from disk is decided from the headers of their files and the memory that is free.

The memory is faked; sizes are held against the parameters of the models once they are loaded, and runs against those of models in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import prunescope
from families import characters_folder, tiny_folder
from prunescope.models import fitting
from prunescope.models.dropping import DropSpec
from prunescope.models.loading import load_model
from prunescope.models.saving import save_dropped


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placing")
    for seed in (0, 1):
        characters_folder(folder / f"model{seed}", seed)
    rows = [{"prompt": "cat dog", "continuation": " and"}, {"prompt": "2 + 3 =", "continuation": " 5"}]
    (folder / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "text.txt").write_text("a cat and a dog and 12 birds\n" * 6, "utf-8")
    (folder / "prompts.txt").write_text("cat\n", "utf-8")
    asked = {"question": "2 + 2", "choices": ["3", "4"], "answer": 1}
    (folder / "questions.jsonl").write_text(json.dumps(asked) + "\n", "utf-8")
    return folder


def job(command: str, place: Path) -> Any:
    dense, target = (str(place / f"model{seed}") for seed in (0, 1))
    text = str(place / "text.txt")
    options: dict[str, Any] = {
        "layerwise": {"dense": dense, "target": target, "continuations": str(place / "given.jsonl")},
        "mcq": {"dense": dense, "target": target, "questions": str(place / "questions.jsonl")},
        "divergence": {"dense": dense, "target": target, "text": text, "context": 16, "scale": False},
        "drop": {"model": dense, "n": 2, "calibration": text, "samples": 3, "seq_len": 16, "cache": False},
    }[command]
    return lambda **more: getattr(prunescope, command)(device="cpu", **options, **more)


def taken(folder: Path) -> int:
    """Bytes of the parameters of a model in memory."""
    return sum(p.numel() * p.element_size() for p in load_model(folder, device="cpu").model.parameters())


@pytest.mark.parametrize("command", ["layerwise", "mcq", "divergence", "drop"])
def test_what_does_not_fit_is_read_from_disk(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A byte decides: would catch a target, or the memory of the columns, that is not counted; and numbers that depend on where the weights are."""
    run = job(command, place)
    needed = sum(
        size + size // 16
        for size in (taken(place / f"model{seed}") for seed in ((0,) if command == "drop" else (0, 1)))
    )
    needed += 0 if command == "drop" else 512 * 2**20
    found = {}
    for free in (needed - 1, needed):
        monkeypatch.setattr("prunescope.jobs.streaming.free_bytes", lambda device, free=free: free)
        found[free] = run()
        said = "blocks are read from disk (--stream false loads the models)" in capfd.readouterr().err
        assert said == found[free].info["placement"]["streamed"] == (free < needed)
    streamed, held = found.values()
    assert streamed.info["placement"] == {"streamed": True, "needed_bytes": needed, "free_bytes": needed - 1}
    assert held.info["placement"] == {"streamed": False}
    if command == "drop":
        assert streamed.rows == held.rows
    else:
        assert repr(streamed.table().to_pylist()) == repr(held.table().to_pylist())
        assert streamed.info["key"] == held.info["key"]
    monkeypatch.setattr("prunescope.jobs.streaming.free_bytes", lambda device: 1)
    assert run(stream=False).info["placement"] == {"streamed": False}


@pytest.mark.parametrize(
    ("command", "more", "why"),
    [
        ("generate", {"prompts": "prompts.txt", "max_new_tokens": 1}, "give texts with --continuations"),
        ("divergence", {"target": "quant:int8"}, "quantised in memory"),
        ("mcq", {"target": "recipe"}, "is a recipe"),
        ("drop", {"order": "consecutive", "target": "block"}, "use --order discrete"),
    ],
)  # fmt: skip
def test_what_does_not_fit_and_cannot_be_streamed_is_loaded_and_said(
    command: str, more: dict[str, Any], why: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Would catch an automatic choice that refuses what worked before."""
    if more.get("target") == "recipe" and not (place / "recipe").is_dir():
        (place / "recipe").mkdir()
        save_dropped(load_model(place / "model0", device="cpu"), DropSpec((1,), ()), place / "recipe", "recipe")
    monkeypatch.setattr("prunescope.jobs.streaming.free_bytes", lambda device: 1)
    run = getattr(prunescope, command)
    options = {
        "generate": {"dense": "model0", "target": "model1"},
        "mcq": {"dense": "model0", "questions": "questions.jsonl"},
        "divergence": {"dense": "model0", "text": "text.txt", "context": 16, "scale": False},
        "drop": {"model": "model0", "n": 1, "calibration": "text.txt", "samples": 2, "seq_len": 16, "cache": False},
    }[command] | more
    options = {k: str(place / v) if isinstance(v, str) and (place / v).exists() else v for k, v in options.items()}  # type: ignore[attr-defined]
    assert run(device="cpu", **options).info["placement"] == {"streamed": False}
    said = [line for line in capfd.readouterr().err.splitlines() if "but blocks cannot be read from disk" in line]
    assert len(said) == 1 and why in said[0]


def test_sizes_from_headers(tmp_path: Path) -> None:
    """Against the parameters of the loaded model: would catch tied weights counted twice, and the dtype of the file for that of the computation."""
    for family in ("llama", "gpt2", "mixtral"):
        folder = tiny_folder(family, tmp_path / family)
        assert fitting.weight_bytes(str(folder), device="cpu") == taken(folder)
        assert 2 * (fitting.weight_bytes(str(folder), dtype="bfloat16", device="cpu") or 0) == taken(folder)
    parameters = 134_515_008  # of SmolLM2-135M, its tied head once
    assert fitting.weight_bytes("smollm2-135m", device="cpu") == 4 * parameters
    small = fitting.weight_bytes("smollm2-135m", device="cpu", enough=2**40)
    assert small is not None and small < parameters * 4  # not looked into
    assert fitting.weight_bytes(str(tmp_path / "none"), device="cpu") is None


def test_sizes_of_models_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the local cache, where it holds the weights, else from what the hub says of their files. Would catch bytes of the file for those in memory."""
    folder = tiny_folder("llama", tmp_path / "model")
    answers = {"some/model": str(folder / "model.safetensors")}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda ref, name, revision: answers.get(ref) if name == "model.safetensors" else None,
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    counts = SimpleNamespace(parameter_count={"BF16": 10, "F32": 3, "U8": 7})
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda ref, revision: counts)
    assert fitting.weight_bytes("some/model", device="cpu") == taken(folder)
    assert fitting.weight_bytes("other/model", device="cpu") == 4 * 13 + 7
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fitting.weight_bytes("other/model", device="cpu") is None


def test_free_memory_within_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of the control group counts, without the pages of files in it."""
    (tmp_path / "memory.max").write_text("1000000\n", "ascii")
    (tmp_path / "memory.current").write_text("900000\n", "ascii")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 300000\nactive_file 50000\n", "ascii")
    monkeypatch.setattr(fitting, "_CGROUP", tmp_path)
    assert fitting.free_bytes("cpu") == 450000 and fitting.machine_bytes() == 1000000
    (tmp_path / "memory.max").write_text("max\n", "ascii")
    assert (fitting.free_bytes("cpu") or 0) > 450000 and fitting.machine_bytes() == psutil.virtual_memory().total
