"""What is kept between calls: drop scores and self-sampled calibration tokens, as small JSON files under the user's cache folder.

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

__all__ = ["cache_folder", "remembered"]


def cache_folder() -> Path:
    """$PRUNESCOPE_CACHE, else the user's cache folder."""
    return Path(os.environ.get("PRUNESCOPE_CACHE") or user_cache_dir("prunescope", appauthor=False))


def remembered(folder: Path | None, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """What ``compute`` gave for ``key`` before, else what it gives now. Its result must be JSON; NaN is kept."""
    if folder is None:
        return compute()
    path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"
    try:
        return json.loads(path.read_text("utf-8"))["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = compute()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as beside:
            beside.write_text(json.dumps({"key": key, "value": value}), "utf-8")
    return value
