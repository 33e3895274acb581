"""What keeps the house in order beside import-linter (`make lint`): files that can be read, and one place for each kind of knowledge."""

from __future__ import annotations

import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "prunescope"
LONG = {"compare/kernels/numba_sums.py"}


def sources() -> dict[str, str]:
    return {str(path.relative_to(SOURCE)): path.read_text("utf-8") for path in sorted(SOURCE.rglob("*.py"))}


def test_files_can_be_read_in_one_go() -> None:
    lengths = {name: text.count("\n") for name, text in sources().items()}
    assert {name: lines for name, lines in lengths.items() if lines > 450 and name not in LONG} == {}
    scripts = {path.name: path.read_text("utf-8").count("\n") for path in (SOURCE / "report/page/script").glob("*.js")}
    assert scripts
    assert {name: lines for name, lines in scripts.items() if lines > 300} == {}


def test_what_exists_once_is_not_written_by_hand_again() -> None:
    """Each pattern with the one file that may hold it."""
    once = {
        r"1\.96|1\.9599": "stats.py",  # the normal quantile
        r"removeprefix\(\"drop:\"\)": "models/references.py",  # what a TARGET may be
        r"\.with_suffix\(\"\.tmp\"\)|\.writing\"": "files.py",  # write beside, then rename
        r"str\(error\)[.\w()]*\.splitlines\(\)": "errors.py",  # first line of another library's message
        r"dict\(locals\(\)\)": None,  # options are typed
        r"os\.environ\.get\(\"XDG_CACHE_HOME": None,  # platformdirs knows
    }
    for pattern, home in once.items():
        found = {name for name, text in sources().items() if re.search(pattern, text)}
        assert found <= {home}, f"{pattern} stands in {sorted(found)}"
