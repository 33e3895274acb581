"""Write the tables of columns in docs/metrics.md from the page's glossary, `src/prunescope/report/page/columns.json`.

    python docs/make_columns.py

A column is explained in that JSON file alone; a test fails where the document differs from it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "metrics.md"
COLUMNS = ROOT / "src" / "prunescope" / "report" / "page" / "columns.json"


def with_tables(text: str) -> str:
    """The document with the table of every space written anew, between its two markers."""
    columns = json.loads(COLUMNS.read_text("utf-8"))
    for space in ("h", "z", "p"):
        rows = [f"| `{c['name']}` | {c['formula']} | {c['reading']} |" for c in columns if c["space"] == space]
        table = "\n".join(["| column | formula | how to read it |", "|---|---|---|", *rows])
        begin, end = f"<!-- columns of {space}: docs/make_columns.py -->", "<!-- end -->"
        text, count = re.subn(
            f"({re.escape(begin)}\n).*?(\n{end})", lambda m, t=table: m[1] + t + m[2], text, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{PAGE}: no place for the columns of {space}")
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
