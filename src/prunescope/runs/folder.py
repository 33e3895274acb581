"""Run folders: what they hold, written beside and renamed when complete, read back without torch.

A folder that bears the run's name is complete. While a run works, its folder is called ``NAME.partial``; a run that can be
continued leaves finished parts there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunescope.errors import UserError, first_line
from prunescope.files import parse_json, replacing, system_error_number

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "SCHEMA_VERSION",
    "Columns",
    "Run",
    "check_free",
    "open_run",
    "remove_parts",
    "require_space",
    "staged",
    "write_config",
    "write_json",
    "write_run",
]

SCHEMA_VERSION = 1
TABLES = {
    "layerwise": "layerwise.parquet",
    "generate": "generation.parquet",
    "mcq": "mcq.parquet",
    "divergence": "divergence.parquet",
    "retrieve": "retrieval.parquet",
    "evaluate": "items.parquet",
    "sweep": "sweep.parquet",
    "speed": "speed.parquet",
    "advise": "advice.parquet",
}
_NO_SAMPLES = ("sweep", "speed", "advise")  # commands whose folders hold no samples.jsonl
_OURS = ("run.json", "prunescope.json", "demo.json")  # a folder that --overwrite may replace holds one of these
_MARKER = ".unfinished"  # in a folder that a run still works on
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Columns:
    """A parquet file of which each column is read as it is asked for; it stands in for a `pyarrow.Table` where columns are all that is used."""

    def __init__(self, path: Path, damaged: Callable[[Exception], UserError]) -> None:
        import pyarrow.parquet as pq

        self._damaged = damaged
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise damaged(error) from error
        self.schema = self._file.schema_arrow
        self.column_names: list[str] = self.schema.names

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        if name not in self.column_names:
            raise KeyError(name)
        try:
            return self._file.read([name])[name]
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error


class Run:
    """A run folder, read. ``info`` is run.json; tables are pyarrow."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info

    @property
    def command(self) -> str:
        return str(self.info["command"])

    @property
    def summary(self) -> dict[str, Any]:
        """Per space and column: mean, median, min, max, p1, p5, p95, p99 and a 95 % confidence interval over prompts."""
        return dict(self.info["summary"])

    @property
    def noise_floor(self) -> dict[str, float]:
        """Per deviation column: the largest value that the dense model gives against itself."""
        return dict(self.info.get("noise_floor", {}).get("floor", {}))

    def table(self, name: str | None = None) -> pa.Table:
        """The rows of the run; or, of a run with several tables, those of ``NAME.parquet``."""
        import pyarrow.parquet as pq

        path = self.folder / (TABLES[self.command] if name is None else f"{name}.parquet")
        try:
            return pq.read_table(path)
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error

    def columns(self) -> Columns:
        """The rows of the run, a column at a time: for a table that need not fit into the memory."""
        path = self.folder / TABLES[self.command]
        return Columns(path, lambda error: self._damaged(path, error))

    def _damaged(self, path: Path, error: Exception) -> UserError:
        return UserError(
            f"{path} cannot be read ({first_line(error)}); the run folder is damaged, run {self.command} again"
        )

    def samples(self) -> list[dict[str, Any]]:
        """Prompts and texts; empty for a command that keeps none."""
        path = self.folder / "samples.jsonl"
        if self.command in _NO_SAMPLES:
            return []
        try:
            return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); the run folder is damaged, run {self.command} again"
            ) from error


def open_run(folder: str | os.PathLike[str]) -> Run:
    """Open a run folder. Raises UserError if it is missing, half-written, damaged or of a newer schema."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        partial = path.with_name(path.name + ".partial")
        if (partial / "run.json").is_file():
            raise UserError(
                f"{path} is not finished; continue it with --resume, or give {partial} for what is there already"
            )
        raise UserError(f"{path}: no such run folder; give the --out folder of a finished run")
    unfinished = path.name.endswith(".partial")
    if not (path / "run.json").is_file():
        raise UserError(f"{path} is not a finished run (no run.json); run it again, or continue it with --resume")
    try:
        info = parse_json((path / "run.json").read_text("utf-8"))
        version, command = info["schema_version"], info["command"]
        newer = version > SCHEMA_VERSION
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / 'run.json'} cannot be read ({type(error).__name__}: {error}); run it again"
        ) from error
    if unfinished and info.get("complete") is not False:  # a sweep's finished points can be read before it is complete
        raise UserError(f"{path} is not a finished run; run it again, or continue it with --resume")
    if newer:
        raise UserError(
            f"{path} has schema version {version}, newer than this prunescope knows ({SCHEMA_VERSION}); upgrade prunescope"
        )
    if command not in TABLES or not (path / TABLES[command]).is_file():
        raise UserError(f"{path} lacks the table of its command {command!r}; the run folder is damaged, run it again")
    summary = info.get("summary")
    if isinstance(summary, dict) and "foretells" in summary:  # the name until 0.2
        summary["predicts"] = summary.pop("foretells")
    return Run(path, info)


# --- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def staged(
    out: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False, keep_parts: bool = False
) -> Iterator[Path]:
    """A folder ``OUT.partial`` to write into, renamed to ``OUT`` when the block ends well.

    If the block fails, the folder is removed, unless it holds finished parts (``part-*``) that a resumed run can use. After a mistake of
    the user it is removed all the same, but with ``keep_parts`` for parts (``part-*.parquet``) that were finished before it showed.

    Raises:
        UserError: ``OUT`` exists (without ``overwrite``), or is not ours to overwrite, or cannot be written.
    """
    check_free(out, overwrite=overwrite, resume=resume)
    final, partial = _names(out)
    try:
        if partial.exists() and not resume:
            shutil.rmtree(partial)
        made = [parent for parent in partial.parents if not parent.exists()]
        partial.mkdir(parents=True, exist_ok=True)
        (partial / _MARKER).touch()
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error.strerror}; choose another --out") from error
    try:
        yield partial
        (partial / _MARKER).unlink()
        old = final.with_name(f"{final.name}.old-{os.getpid()}")
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        mistake = isinstance(error, UserError) and not resume
        mistake = mistake and not (keep_parts and any(partial.glob("part-*.parquet")))
        no_space = system_error_number(error) in NO_SPACE
        useful = any(partial.glob("part-*")) or any((partial / name).is_file() for name in _OURS)
        if mistake or (no_space and not resume) or not useful:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:  # the deepest first; one that holds something stays
                with suppress(OSError):
                    parent.rmdir()
        if no_space:
            raise UserError(f"{final} cannot be written: {error}; free some space or choose another --out") from error
        raise


def _names(out: str | os.PathLike[str]) -> tuple[Path, Path]:
    final = Path(out).expanduser().absolute()
    if not final.name:
        raise UserError(f"{out} cannot be a run folder; choose another --out")
    return final, final.with_name(final.name + ".partial")


def check_free(out: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
    """Say early that ``out`` is taken. Raises UserError."""
    final, partial = _names(out)
    if partial.is_dir() and not (partial / _MARKER).exists() and any(partial.iterdir()):
        if not any((partial / name).is_file() for name in _OURS):
            raise UserError(f"{partial} is in the way and was not written by prunescope; choose another --out")
        if not final.exists():
            partial.rename(final)  # complete, and cut off between two renames
    if overwrite and resume:
        raise UserError("--overwrite and --resume contradict each other; give one of them")
    if final.exists() and not overwrite and not (resume and any((final / name).is_file() for name in _OURS)):
        raise UserError(f"{final} exists; choose another --out or give --overwrite")
    if final.exists() and not (
        final.is_dir() and (not any(final.iterdir()) or any((final / name).is_file() for name in _OURS))
    ):
        raise UserError(f"{final} was not written by prunescope, so --overwrite leaves it alone; choose another --out")
    if not overwrite and not resume and any(partial.glob("part-*")):
        raise UserError(
            f"{partial} holds the finished part of an interrupted run; continue it with --resume or start over with --overwrite"
        )


def require_space(out: str | os.PathLike[str], needed: int) -> None:
    """Raise UserError if the disk of ``out`` has less than ``needed`` bytes free."""
    folder = Path(out).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{out}: {needed / 2**20:.0f} MB are needed but {free / 2**20:.0f} MB are free on this disk; free some space or choose another --out"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside, sync and rename, so that what bears the name is whole. NaN becomes null."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        json.dump(_plain(content), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def write_run(
    folder: Path, info: Mapping[str, Any], tables: Mapping[str, pa.Table], samples: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the tables, samples and config of a run into ``folder``, each beside and renamed, run.json last.

    Args:
        tables: by the names of their files, without ``.parquet``; the one named "" is the command's own.
    """
    import pyarrow.parquet as pq

    for name, table in tables.items():
        with replacing(folder / (f"{name}.parquet" if name else TABLES[info["command"]])) as beside:
            pq.write_table(table, beside)
    if info["command"] not in _NO_SAMPLES:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        # half a surrogate pair has no UTF-8, but a JSON escape, which is what backslashreplace writes
        (folder / "samples.jsonl").write_bytes(lines.encode("utf-8", "backslashreplace"))
    write_config(folder, info["config"])
    write_json(folder / "run.json", info)


def remove_parts(folder: Path) -> None:
    """Remove the finished parts from which a complete run was made."""
    for path in folder.glob("part-*"):
        path.unlink()


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.yaml``: what a command ran with, as its ``--config`` reads it."""
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True), "utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
