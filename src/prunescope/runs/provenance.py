"""What every run folder and checkpoint says of how it was made."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from prunescope.runs.folder import SCHEMA_VERSION

__all__ = ["device_name", "run_record", "versions"]


def run_record(
    command: str, config: Mapping[str, Any], device: torch.device, models: Any, started: float, *more: str
) -> dict[str, Any]:
    """The fields of run.json that do not depend on what was found.

    Args:
        models: what is recorded of the models that took part, as `LoadedModel.describe` gives it.
        started: `time.monotonic()` at the start.
        more: further packages whose versions count.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "config": dict(config),
        "seed": config["seed"],
        "versions": {"python": platform.python_version(), **versions("pyarrow", *more)},
        "device": device_name(device),
        "wall_time_s": round(time.monotonic() - started, 3),
        "peak_memory_bytes": _peak_memory(),
        "models": models,
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of what decides numbers, prunescope, torch and transformers, and of ``more`` packages where they are installed."""
    found = {name: version(name) for name in ("prunescope", "torch", "transformers")}
    for name in more:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


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
