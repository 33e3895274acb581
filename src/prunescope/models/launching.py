"""How the kernels of a step are launched."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

__all__ = ["early"]


@cache
def early(device: torch.device) -> dict[str, Any]:
    """Options of a kernel that may start before the one before it has ended, and waits for its end itself (programmatic dependent launch, from Hopper
    on): what a launch costs is hidden."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 9:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}
