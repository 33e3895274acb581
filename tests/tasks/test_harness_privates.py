"""What `tasks/harness.py` takes from other libraries that they do not promise. These tests fail where it has moved: then look at the upper
bounds in pyproject.toml."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from typing import Any

import pytest

from prunescope.tasks import harness
from prunescope.tasks.sandbox import CodeEval

pytest.importorskip("lm_eval")


def test_the_task_factory_is_where_local_data_comes_in() -> None:
    """`_load` replaces a manager's factory by one that builds single tasks from files."""
    from lm_eval.tasks._factory import TaskFactory

    for name in ("_build_task", "_load_full_config"):
        assert list(inspect.signature(getattr(TaskFactory, name)).parameters) == ["self", "entry", "overrides"]
    manager: Any = copy.copy(harness._manager())
    assert type(manager._factory) is TaskFactory
    built = []

    class Factory(TaskFactory):  # type: ignore[misc]
        def _build_task(self, entry: Any, overrides: Any) -> Any:
            built.append((entry.name, self._load_full_config(entry, overrides)["dataset_path"]))
            raise LookupError

    manager._factory = Factory(meta={})
    with pytest.raises(LookupError):
        manager.load(["gsm8k"])
    assert built == [("gsm8k", "openai/gsm8k")]
    assert type(harness._manager()._factory) is TaskFactory  # of the copy alone


def test_tasks_that_run_code_get_the_sandbox() -> None:
    """They load the metric `code_eval` through `evaluate.load` when their module is imported."""
    import evaluate

    real = evaluate.load
    for name in ("humaneval", "mbpp"):
        module = f"lm_eval.tasks.{name}.utils"
        sys.modules.pop(module, None)
        try:
            with harness._code_eval():
                found = importlib.import_module(module)
        finally:
            sys.modules.pop(module, None)
        assert any(isinstance(value, CodeEval) for value in vars(found).values()), name
    assert evaluate.load is real
