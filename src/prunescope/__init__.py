"""prunescope: prune any Hugging Face causal language model and see where pruning breaks it, in h, z or p.

Everything public is named here. Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import prunescope.report  # noqa: F401 (the package first, so that the function of its name is what stays)
from prunescope.commands import (
    DemoResult,
    DropResult,
    GenerateResult,
    LayerwiseResult,
    McqResult,
    SparsifyResult,
    SpeedResult,
    demo,
    drop,
    generate,
    layerwise,
    load,
    mcq,
    report,
    sparsify,
    speed,
)
from prunescope.errors import UserError
from prunescope.results import Run
from prunescope.results import open_run as open

__version__ = "0.1.0"
__all__ = [
    "DemoResult",
    "DropResult",
    "GenerateResult",
    "LayerwiseResult",
    "McqResult",
    "Run",
    "SparsifyResult",
    "SpeedResult",
    "UserError",
    "demo",
    "drop",
    "generate",
    "layerwise",
    "load",
    "mcq",
    "open",
    "report",
    "sparsify",
    "speed",
]
