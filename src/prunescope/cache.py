"""What is kept between calls: drop scores, rungs of the ladder and self-sampled calibration tokens, as small JSON files under the user's cache folder.

An entry is named by a hash of everything that decides its content. A damaged one counts as absent, and a cache that cannot be
written costs time, never the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from prunescope.files import replacing

__all__ = ["cache_folder", "recalled", "remembered"]


def cache_folder() -> Path:
    """$PRUNESCOPE_CACHE, else the user's cache folder."""
    return Path(os.environ.get("PRUNESCOPE_CACHE") or user_cache_dir("prunescope", appauthor=False))


def remembered(folder: Path | None, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """What ``compute`` gave for ``key`` before, else what it gives now. Its result must be JSON; NaN is kept."""
    if folder is None:
        return compute()
    with suppress(LookupError):
        return recalled(folder, key)
    path = _place(folder, key)
    value = compute()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as beside:
            beside.write_text(json.dumps({"key": key, "value": value}), "utf-8")
    return value


def recalled(folder: Path | None, key: Mapping[str, Any]) -> Any:
    """What `remembered` keeps for ``key``. Raises LookupError where that is nothing."""
    try:
        return json.loads(_place(folder, key).read_text("utf-8"))["value"]  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LookupError(str(key)) from error


def _place(folder: Path, key: Mapping[str, Any]) -> Path:
    return folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"
