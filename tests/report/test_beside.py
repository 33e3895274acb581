"""Figures drawn by another process are those that are drawn here, and what it cannot draw is drawn here or complained of."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import prunescope
from families import tiny_folder
from prunescope.report.figures import beside as module
from prunescope.report.figures import style
from prunescope.report.figures.beside import Beside
from prunescope.runs.result import RunResult

pytestmark = pytest.mark.draws


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("beside")
    (folder / "prompts.txt").write_text("w5 w9\nw7\n")
    model = str(tiny_folder("llama", folder / "dense"))
    return prunescope.generate(model, "drop:attn=1", prompts=str(folder / "prompts.txt"), max_new_tokens=4)


def written(run: RunResult, folder: Path) -> Path:
    folder.mkdir()
    run.write(folder, figures=False)
    return folder


def figures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}


def test_another_process_draws_the_same_bytes(run: RunResult, tmp_path: Path) -> None:
    """Would catch figures that owe something to what the files do not hold. Which of several folders the other process gets to is left open."""
    (tmp_path / "here").mkdir()
    run.write(tmp_path / "here")
    draw = run.drawing()
    assert draw is not None
    with Beside() as beside:
        one = written(run, tmp_path / "one")
        assert not (one / "figures").exists()
        assert beside._drawn(f"{draw.__module__}:{draw.__qualname__}", one)
        assert beside.cpu_seconds > 0
        rest = [written(run, tmp_path / name) for name in ("two", "three")]
        for folder in rest:
            beside.add(draw, folder)
        beside.finish()
    assert all(figures(folder) == figures(tmp_path / "here") for folder in (one, *rest))
    assert beside._process is not None and beside._process.returncode == 0


def test_what_it_cannot_draw_is_drawn_here(run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that cannot be started, or that dies, costs nothing but time."""
    draw = run.drawing()
    assert draw is not None
    for number, command in enumerate((str(tmp_path / "no-python"), shutil.which("true") or "true")):
        monkeypatch.setattr(module.sys, "executable", command)
        folder = written(run, tmp_path / str(number))
        with Beside() as beside:
            beside.add(draw, folder)
            beside.finish()
        assert figures(folder)


def test_a_figure_that_fails_is_said(run: RunResult, tmp_path: Path) -> None:
    """The error is the one that drawing here raises. Would catch one that stays in the other process."""
    draw = run.drawing()
    assert draw is not None
    folder = written(run, tmp_path / "run")
    (folder / "generation.parquet").write_bytes(b"no table")
    with Beside() as beside:
        beside.add(draw, folder)
        with pytest.raises(Exception, match=r"(?i)parquet|generation"):
            beside.finish()


def test_leaving_early_stops_it(run: RunResult, tmp_path: Path) -> None:
    """An error elsewhere does not wait for figures. Would catch a process that is left behind."""
    draw = run.drawing()
    assert draw is not None
    with Beside() as beside:
        for name in ("one", "two", "three"):
            beside.add(draw, written(run, tmp_path / name))
    assert beside._thread is not None and not beside._thread.is_alive()
    assert beside._process is None or beside._process.poll() is not None


def test_it_can_be_started_before_there_is_anything_to_draw(run: RunResult, tmp_path: Path) -> None:
    """The same process draws later, and one that was given nothing ends too."""
    draw = run.drawing()
    assert draw is not None
    with Beside() as idle:
        idle.start()
        first = idle._process
        assert first is not None and first.poll() is None
        assert idle._drawn(f"{draw.__module__}:{draw.__qualname__}", written(run, tmp_path / "run"))
        assert idle._process is first
    assert first.poll() is not None and figures(tmp_path / "run")


def test_powers_of_ten_are_parsed_once(tmp_path: Path) -> None:
    """A file drawn after another is the one that matplotlib draws by itself. Would catch a parser that keeps what another file needs otherwise."""
    from matplotlib import textpath
    from matplotlib.figure import Figure

    parsed = textpath.MathTextParser._parse_cached.cache_info

    def drawn() -> tuple[bytes, int]:
        """The SVG, and how many labels were parsed for it."""
        before = parsed().misses
        with style.style():
            figure = Figure()
            figure.subplots().set(yscale="log", ylim=(1e-3, 1e4))
            figure.savefig(tmp_path / "drawn.svg", metadata={"Date": None})
        return (tmp_path / "drawn.svg").read_bytes(), parsed().misses - before

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(style, "patch", SimpleNamespace(object=lambda *_: nullcontext()))  # matplotlib's own way
        drawn()
        plain, anew = drawn()
    assert anew > 0 and drawn()[0] == plain
    assert drawn() == (plain, 0)


def test_a_figure_is_laid_out_as_matplotlib_does_and_drawn_once_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SVG and PNG, byte for byte, of panels, an outside legend and titles. Would catch places found at another resolution, or found by drawing."""
    from matplotlib.figure import Figure

    def made() -> Figure:
        figure = Figure(figsize=(5, 3), layout="constrained")
        for axes in figure.subplots(1, 2, sharey=True):
            axes.plot([1, 2, 3], [1e-3, 2.0, 7e2], label="a line")
            axes.set(yscale="log", xlabel="step", title="a panel")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
        figure.suptitle("two panels\nin two lines")
        return figure

    with style.style():
        plain = made()
        plain.savefig(tmp_path / "plain.svg", metadata={"Date": None})
        plain.set_layout_engine(None)
        plain.savefig(tmp_path / "plain.png", dpi=200)
        drawn: list[Figure] = []
        draw = Figure.draw
        monkeypatch.setattr(Figure, "draw", lambda figure, renderer: drawn.append(figure) or draw(figure, renderer))
        style.save(made(), tmp_path / "ours")
    assert len(drawn) == 2
    for kind in ("svg", "png"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"plain.{kind}").read_bytes()
