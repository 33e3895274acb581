"""prunescope: prune any Hugging Face causal language model and see where pruning breaks it, in h, z or p.

Everything public is named here. Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import prunescope.export
import prunescope.report
import prunescope.speed
import prunescope.sweep  # noqa: F401 (packages first, so that the functions of these names are what stays)
from prunescope.commands import (
    advise,
    divergence,
    drop,
    evaluate,
    export,
    generate,
    heal,
    layerwise,
    load,
    mcq,
    report,
    retrieve,
    sparsify,
    speed,
    sweep,
)
from prunescope.demo import demo
from prunescope.errors import UserError
from prunescope.results import (
    AdviseResult,
    DemoResult,
    DivergenceResult,
    DropResult,
    EvaluateResult,
    GenerateResult,
    HealResult,
    LayerwiseResult,
    McqResult,
    RetrieveResult,
    SparsifyResult,
    SpeedResult,
    SweepResult,
)
from prunescope.runs.folder import Run
from prunescope.runs.folder import open_run as open

__version__ = "0.2.0"
__all__ = [
    "AdviseResult",
    "DemoResult",
    "DivergenceResult",
    "DropResult",
    "EvaluateResult",
    "GenerateResult",
    "HealResult",
    "LayerwiseResult",
    "McqResult",
    "RetrieveResult",
    "Run",
    "SparsifyResult",
    "SpeedResult",
    "SweepResult",
    "UserError",
    "advise",
    "demo",
    "divergence",
    "drop",
    "evaluate",
    "export",
    "generate",
    "heal",
    "layerwise",
    "load",
    "mcq",
    "open",
    "report",
    "retrieve",
    "sparsify",
    "speed",
    "sweep",
]
