"""What every run folder says of how it was made."""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prunescope.models.dropping import DropSpec
from prunescope.models.loaded import LoadedModel
from prunescope.runs import folder as results

__all__ = ["describe_target", "machine_record", "run_record"]


def run_record(
    command: str, config: dict[str, Any], dense: LoadedModel, target: dict[str, Any] | None, started: float
) -> dict[str, Any]:
    """The fields of run.json that do not depend on what was found; ``started`` is `time.monotonic()` at the start."""
    written = {**config, **{k: None if config[k] is None else str(config[k]) for k in ("dense", "target")}}
    return {
        **machine_record(command, written, dense.device, started),
        "models": {"dense": dense.describe(), "target": target},
    }


def machine_record(command: str, config: dict[str, Any], device: torch.device, started: float) -> dict[str, Any]:
    """The fields of run.json that say how and on what a run was made, without its models."""
    return {
        "schema_version": results.SCHEMA_VERSION,
        "command": command,
        "config": config,
        "seed": config["seed"],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("prunescope", "torch", "transformers", "pyarrow")},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "wall_time_s": round(time.monotonic() - started, 3),
        "peak_memory_bytes": _peak_memory(),
    }


def describe_target(dense: LoadedModel, target: LoadedModel | DropSpec | None) -> dict[str, Any] | None:
    """What a run folder records of the target; None where every sublayer is dropped in turn."""
    if target is None or isinstance(target, LoadedModel):
        return None if target is None else target.describe()
    with dense.dropping(target):
        return dense.describe()


def _peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None on a system that does not tell."""
    status = Path("/proc/self/status")
    if status.is_file() and "VmHWM:" in (content := status.read_text("utf-8")):
        return int(content.split("VmHWM:")[1].split()[0]) * 1024  # getrusage would start from the parent's
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
