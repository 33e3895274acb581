"""Names as people read them, for tables, figures and pages alike."""

from __future__ import annotations

from pathlib import Path

__all__ = ["measure_name", "short"]


def short(name: str) -> str:
    """A name that fits into a title, with nothing in it that matplotlib would read as mathematics."""
    name = Path(name).name if name.startswith(("/", ".", "~")) else name
    name = name if len(name) <= 40 else "..." + name[-37:]
    return name.replace("$", r"\$")


def measure_name(name: str) -> str:
    """``ndcg_10`` -> ``nDCG@10``."""
    kind, _, cut = name.partition("_")
    word = {"ndcg": "nDCG", "ap": "MAP", "rr": "MRR"}.get(kind, kind)
    return f"{word}@{cut}" if cut else word
