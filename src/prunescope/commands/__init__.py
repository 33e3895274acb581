"""Prune a causal language model and see where pruning breaks it: in h (hidden states), z (logits) or p (probabilities)."""

# The public functions. Each is a command of the same name: its signature gives the options, its docstring the help, `jobs/NAME.py` the
# body. Jobs are imported inside them, so that `import prunescope` and `--help` load neither torch nor transformers.

from __future__ import annotations

from prunescope.commands.comparing import divergence, generate, layerwise, mcq, retrieve
from prunescope.commands.pruning import drop, export, heal, load, sparsify
from prunescope.commands.scoring import advise, evaluate, report, speed, sweep

__all__ = [
    "advise",
    "divergence",
    "drop",
    "evaluate",
    "export",
    "generate",
    "heal",
    "layerwise",
    "load",
    "mcq",
    "report",
    "retrieve",
    "sparsify",
    "speed",
    "sweep",
]
