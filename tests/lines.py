"""Which lines of the package the tests run: `PRUNESCOPE_LINES=90 pytest` lists the others, and fails under 90 %.

A tracer slows down everything on Python 3.11, torch's and transformers' Python too: half as long again where tests are small. Slipcover puts a
probe into each line as a module is imported, and takes it out once the line has been seen.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from slipcover import FileMatcher, ImportManager, Slipcover, merge_coverage
from slipcover.slipcover import print_coverage

SOURCE = Path(__file__).resolve().parents[1] / "src" / "prunescope"
COMPILED = [
    str(SOURCE / name) for name in ("*_kernels.py", "*/triton_*.py", "*/numba_sums.py")
]  # Triton and numba read them as they are
FOLDER = "PRUNESCOPE_LINES_FOLDER"


class Lines:
    """A plugin of pytest: every process leaves what it saw in one folder, and the first one sums up."""

    def __init__(self, least: float) -> None:
        """Starts now: what is imported before is not seen."""
        self.least = least
        self.first = FOLDER not in os.environ
        if self.first:
            os.environ[FOLDER] = tempfile.mkdtemp(prefix="prunescope-lines-")
        self.seen = Slipcover(
            source=[str(SOURCE)], omit=COMPILED, exclude_also=["if TYPE_CHECKING:", "raise NotImplementedError"]
        )
        ImportManager(self.seen, FileMatcher([SOURCE], COMPILED)).__enter__()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        found = self.seen.get_coverage()
        if not self.first:
            (Path(os.environ[FOLDER]) / f"{os.getpid()}.json").write_text(json.dumps(found), "utf-8")
            return
        self.total: dict[str, Any] = found
        for file in Path(os.environ[FOLDER]).iterdir():
            merge_coverage(self.total, json.loads(file.read_text("utf-8")))
            file.unlink()
        Path(os.environ[FOLDER]).rmdir()
        if self.total["summary"]["percent_covered"] < self.least and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self) -> None:
        print_coverage(self.total, skip_covered=True)
        percent = self.total["summary"]["percent_covered"]
        print(f"\n{percent:.1f} % of the lines were run; {self.least:g} % are required")


LINES = Lines(float(os.environ["PRUNESCOPE_LINES"]))
