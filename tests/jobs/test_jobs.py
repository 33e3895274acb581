"""What all commands have in common: their options, their results, what `--resume` says of a complete folder."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import prunescope
from families import characters_folder
from prunescope.cli import COMMANDS, main
from prunescope.jobs.options import LoadOptions, OutputOptions, SpreadOptions
from prunescope.runs.result import Result

JOBS = [name for name in COMMANDS if name != "demo"]
RESUMABLE = ("layerwise", "generate", "mcq", "divergence", "retrieve", "evaluate", "sweep")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, prompts, questions and a collection."""
    folder = tmp_path_factory.mktemp("jobs")
    characters_folder(folder / "model")
    (folder / "prompts.txt").write_text("cat dog\n2 + 3 = 5\n", "utf-8")
    (folder / "text.txt").write_text("a cat and a dog and 12 birds\n" * 3, "utf-8")
    question = {"question": "2 + 2", "choices": ["3", "4"], "answer": 1}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n", "utf-8")
    (folder / "beir" / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [{"_id": f"{name[0]}{i}", "text": f"{name} {i}"} for i in range(3)]
        (folder / "beir" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tc0\t1\n", "utf-8")
    return folder


def options_of(command: str, place: Path) -> dict[str, Any]:
    """A small job of every command, in its Python form."""
    dense, drop = str(place / "model"), "drop:attn=1"
    writing = {"dense": dense, "target": drop, "prompts": str(place / "prompts.txt"), "max_new_tokens": 2}
    calibration = {"samples": 2, "seq_len": 8, "cache": False}
    return {
        "drop": {"model": dense, "n": 1, **calibration},
        "sparsify": {"model": dense, "method": "magnitude", "sparsity": 0.5, "calibration": "none"},
        "heal": {
            **{"target": drop, "teacher": dense, "samples": 4, "new_tokens": 3, "held_out": 1},
            **{"steps": 2, "batch_size": 2, "cache": False},
        },
        "export": {"model": dense, "engine": "transformers"},
        "layerwise": writing,
        "generate": writing,
        "mcq": {"dense": dense, "target": drop, "questions": str(place / "questions.jsonl")},
        "divergence": {
            **{"dense": dense, "target": "quant:int8", "text": str(place / "text.txt"), "context": 8},
            **{"ladder": "q8_0,q4_0", "cache": False},
        },
        "retrieve": {"dense": dense, "target": drop, "corpus": str(place / "beir"), "depth": 2, "recall_at": "1,2"},
        "evaluate": {"models": [dense, drop], "tasks": "reversal-mc", "limit": 2, "shots": 1},
        "sweep": {
            **{"model": dense, "target": "attn", "n": "1", "tasks": "reversal-mc", "limit": 2, "shots": 1},
            **{"prompts": str(place / "prompts.txt"), "max_new_tokens": 2, **calibration},
        },
        "speed": {"models": [dense, drop], "batch_size": "1", "length": 4, "max_new_tokens": 4, "repeats": 1},
    }[command]


def argv_of(command: str, place: Path) -> list[str]:
    words = [command]
    for name, value in options_of(command, place).items():
        bare = name in ("model", "dense", "models") or (name == "target" and command not in ("drop", "sweep"))
        values = value if isinstance(value, list) else [value]
        words += map(str, values) if bare else (f"--{name.replace('_', '-')}", *map(str, values))
    return words


@pytest.mark.parametrize("command", JOBS)
def test_options_are_the_parameters_of_the_public_function(command: str) -> None:
    """A parameter that does not reach the job, or that `config.yaml` would not hold, has no field and fails here."""
    job = importlib.import_module(f"prunescope.jobs.{command}")
    options = getattr(job, f"{command.capitalize()}Options")
    groups = {"loading": LoadOptions, "output": OutputOptions, "spread": SpreadOptions}
    names = [
        name
        for field in fields(options)
        for name in ([f.name for f in fields(groups[field.name])] if field.name in groups else [field.name])
    ]
    parameters = inspect.signature(COMMANDS[command]).parameters
    assert is_dataclass(options) and options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert set(names) - {"resume"} == set(parameters) - {"resume"}
    assert "Any" not in {str(field.type) for field in fields(options)}
    returned = inspect.signature(job.run).return_annotation
    assert list(inspect.signature(job.run).parameters) == ["options"]
    assert returned == inspect.signature(COMMANDS[command]).return_annotation


def test_every_result_has_one_base() -> None:
    for name in prunescope.__all__:
        if name.endswith("Result"):
            result = getattr(prunescope, name)
            assert issubclass(result, Result)
            for method in ("table", "samples", "save"):
                assert callable(getattr(result, method))
            assert isinstance(inspect.getattr_static(result, "summary"), property)


@pytest.mark.parametrize("command", RESUMABLE)
def test_a_complete_folder_is_said_to_be_complete_once(
    command: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not that it was written: nothing was."""
    argv = [*argv_of(command, place), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(argv) == 0
    assert capfd.readouterr().err.count("written: ") == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main([*argv, "--resume"]) == 0
    said = capfd.readouterr().err
    assert said.count("complete already: ") == 1 and "written: " not in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.draws
@pytest.mark.parametrize("command", [name for name in JOBS if name not in ("report", "export", "advise")])
def test_a_result_is_what_its_folder_holds_and_home_is_found(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save("~/x")` wrote under the home folder and then looked for a folder named ``~``; samples of a speed run were called damaged."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = COMMANDS[command](**options_of(command, place), device="cpu")
    saved = found.save("~/saved")
    assert (tmp_path / "saved").is_dir() and not Path("~").exists()
    assert found.table().num_rows > 0 and found.summary
    if isinstance(saved, Path):
        assert saved == tmp_path / "saved"
        return
    assert str(saved.table().to_pylist()) == str(found.table().to_pylist())  # as text, so that NaN equals NaN
    assert saved.samples() == json.loads(json.dumps(found.samples()))
    assert bool(found.samples()) == (command in ("layerwise", "generate", "mcq", "divergence", "retrieve"))
    assert prunescope.open("~/saved").info == saved.info
    with pytest.raises(prunescope.UserError, match="exists"):
        found.save("~/saved")


def test_a_loaded_model_is_taken_wherever_a_reference_is(place: Path) -> None:
    loaded = prunescope.load(str(place / "model"), device="cpu")
    options = options_of("generate", place) | {"dense": loaded}
    assert prunescope.generate(**options).info["config"]["dense"] == str(place / "model")
    assert get_type_hints(prunescope.generate)["dense"] is str  # what the command line reads; type checkers see more


def test_functions_stay_functions_where_a_package_or_module_has_their_name() -> None:
    """After one call the import system had put the module `prunescope.demo` in the function's place."""
    for name in ("demo", "report", "sweep", "speed"):
        importlib.import_module(f"prunescope.{name}")
        assert inspect.isfunction(getattr(prunescope, name))
    importlib.import_module("prunescope.sweep.points")
    assert inspect.isfunction(prunescope.sweep)


@pytest.mark.parametrize("command", ["layerwise", "report"])
def test_help_of_a_command_loads_no_torch(command: str) -> None:
    """jsonargparse would run the imports that are for type checkers, torch among them, to understand the types."""
    code = f"import sys, prunescope.cli\ntry:\n    prunescope.cli.main([{command!r}, '--help'])\nexcept SystemExit: pass\nassert not {{'torch', 'transformers', 'pyarrow'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
