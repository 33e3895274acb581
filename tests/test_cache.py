"""Where the cache lies, and that it never decides a result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from prunescope.cache import cache_folder, remembered


@pytest.mark.skipif(sys.platform != "linux", reason="the path of XDG")
def test_the_cache_is_where_the_system_has_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PRUNESCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "prunescope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "prunescope"


def test_what_is_damaged_or_cannot_be_written_is_computed(tmp_path: Path) -> None:
    asked: list[int] = []

    def compute() -> float:
        asked.append(1)
        return float("nan")

    for _ in range(2):
        assert str(remembered(tmp_path / "cache", {"model": "m"}, compute)) == "nan"
    assert len(asked) == 1
    (entry,) = (tmp_path / "cache").iterdir()
    assert json.loads(entry.read_text())["key"] == {"model": "m"}
    entry.write_text("{")
    remembered(tmp_path / "cache", {"model": "m"}, compute)
    assert len(asked) == 2 and [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]
    (tmp_path / "file").write_text("")
    assert str(remembered(tmp_path / "file" / "below", {"model": "m"}, compute)) == "nan"
