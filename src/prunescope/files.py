"""Write a file so that whatever bears its name is whole: beside it first, then renamed. Read JSON of strangers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["parse_json", "replacing", "system_error_number"]


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` when the block ends well, and is removed if it does not.

    Args:
        shared: several processes may write the same file at once, so each gets a path of its own. What a killed process leaves then stays.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.writing" if shared else f"{path.name}.writing")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def parse_json(text: str | bytes, **options: Any) -> Any:
    """As `json.loads`, but everything that is no JSON raises ValueError: what is nested too deeply as well."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def system_error_number(error: BaseException) -> int | None:
    """The system's number of what went wrong, such as `errno.ENOSPC`, None if it is no error of the system. Safetensors says it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None
