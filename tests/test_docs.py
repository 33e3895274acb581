"""What the pages say about files, commands and options is there; a page that rots fails here, without building the site."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

import prunescope
from prunescope.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
EVERYWHERE = {"config", "print_config", "help", "version"}


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The names that GitHub and mkdocs give to headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """Would catch a page or picture that was renamed, and a heading that another page points to."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text("utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = page if not name else page.parent / name
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def test_the_site_shows_every_page() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]  # type: ignore[attr-defined]

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(listed) == sorted(page.name for page in DOCS)


def test_every_command_has_a_picture() -> None:
    """Would catch a command whose section shows nothing of it, and a picture that would fetch a font."""
    parts = re.split(r"^## ", (ROOT / "docs" / "commands.md").read_text("utf-8"), flags=re.MULTILINE)
    sections = {part.split("\n", 1)[0]: part for part in parts[1:]}
    for name in COMMANDS:
        assert re.search(r"^!\[[^\]]+\]\(\S+\)$", sections[name], flags=re.MULTILINE), name
    for picture in (ROOT / "docs" / "screens").glob("*.svg"):
        assert "font-face" not in picture.read_text("utf-8")
        assert f"prunescope&#160;{picture.stem}" in picture.read_text("utf-8"), picture.name


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash)?\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("prunescope ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines(page: Path) -> None:
    """Every command and option of a line that a reader may paste exists."""
    for line in commands_of(page):
        name = line.split()[1]
        if name.isupper() or name.startswith("-"):
            continue
        assert name in prunescope.__all__, line
        parameters = inspect.signature(getattr(prunescope, name)).parameters
        known = EVERYWHERE | {parameter.replace("dtype_", "dtype") for parameter in parameters}
        asked = {
            option.split("=")[0].replace("-", "_")
            for option in re.findall(r"(?<= --)[a-z][\w=-]*", line.split(" # ")[0])
        }
        asked -= {"for", "check"} if name == "export" else set()
        assert asked <= known, f"{page.name}: {line}: {asked - known}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 130


def test_the_picture_on_top_of_the_readme(tmp_path: Path) -> None:
    """Its script draws a run's columns: a step that too few prompts reach is left out, and the mean is over prompts."""
    spec = importlib.util.spec_from_file_location("make_hero", ROOT / "docs/make_hero.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = [
        {
            "regime": regime,
            "step": step,
            "h_cos": 0.9,
            "z_cos": 0.8,
            "p_cos": 0.1 * prompt + (regime == "teacher-forced"),
        }
        for regime in ("free-running", "teacher-forced")
        for prompt in range(6)
        for step in range(4 if prompt < 4 else 2)
    ]
    table = pa.Table.from_pylist(rows)
    steps, means = script.by_step(table, "free-running", "p_cos")
    assert steps.tolist() == [1, 2] and means == pytest.approx([0.25, 0.25])
    figure = script.draw(table, "title")
    assert [len(panel.lines) for panel in figure.axes] == [3, 3]
    figure.savefig(tmp_path / "hero.png")


@pytest.mark.parametrize("book", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda book: book.stem)
def test_notebooks_were_executed(book: Path) -> None:
    """Every cell in order and without an error, every function that they call is public, and no folder of a machine is shown."""
    text = book.read_text("utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    called = set(re.findall(r"prunescope\.(\w+)\(", "".join("".join(cell["source"]) for cell in cells)))
    assert called and called <= set(prunescope.__all__)
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
