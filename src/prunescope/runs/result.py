"""What every command returns: one base for all results. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunescope.runs.folder import Run, open_run, remove_parts, staged, write_run

if TYPE_CHECKING:
    from typing import Self

    import pyarrow as pa

__all__ = ["Draw", "Result", "RunResult", "StrPath"]

StrPath = str | os.PathLike[str]
Draw = Callable[
    ["pa.Table", Mapping[str, Any], Sequence[Mapping[str, Any]], Path], object
]  # table, info, samples, folder


@dataclass
class Result:
    """What a command found or made; ``info`` is what `run.json` or `prunescope.json` says of it."""

    info: dict[str, Any]

    def table(self) -> pa.Table:
        """The rows that were found; each command says of what."""
        raise NotImplementedError

    @property
    def summary(self) -> dict[str, Any]:
        """What the rows come to; each command says what it holds."""
        return dict(self.info["summary"])

    def samples(self) -> list[dict[str, Any]]:
        """Prompts, questions or queries with the texts of both models; empty where a command keeps none."""
        return []

    def write(self, folder: Path) -> None:
        """Write everything into ``folder``, which exists."""
        raise NotImplementedError


@dataclass
class RunResult(Result):
    """The result of a command that writes a run folder; the same as the folder holds."""

    _table: pa.Table = field(repr=False)
    _samples: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @classmethod
    def of_run(cls, run: Run) -> Self:
        """The result that a complete run folder holds."""
        return cls(run.info, run.table(), run.samples())

    def table(self) -> pa.Table:
        return self._table

    def samples(self) -> list[dict[str, Any]]:
        return list(self._samples)

    def save(self, folder: StrPath, *, overwrite: bool = False) -> Run:
        """Write the run folder, figures included. Raises UserError if it exists."""
        with staged(folder, overwrite=overwrite) as staging:
            self.write(staging)
        return open_run(folder)

    def write(self, folder: Path, *, figures: bool = True) -> None:
        """Write everything into ``folder``, which exists; without ``figures`` all but these."""
        draw = self.drawing() if figures else None
        if draw is not None:
            (folder / "figures").mkdir(exist_ok=True)
            self.draw(draw, folder / "figures")
        write_run(folder, self.info, self.tables(), self._samples)
        remove_parts(folder)

    def draw(self, draw: Draw, folder: Path) -> None:
        draw(self._table, self.info, self._samples, folder)

    def tables(self) -> dict[str, pa.Table]:
        """The tables of the folder by the names of their files; "" is the command's own."""
        return {"": self._table}

    def drawing(self) -> Draw | None:
        """What draws the figures of the folder; None for a command that has none."""
        return None
