"""`prunescope report`: one page, and publication figures, of finished folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunescope.errors import UserError
from prunescope.jobs.options import Options, OutputOptions
from prunescope.progress import console
from prunescope.report.page.html import expand, open_folder, write_report
from prunescope.runs.folder import Run

__all__ = ["ReportOptions", "run"]


@dataclass(frozen=True)
class ReportOptions(Options):
    """See `prunescope.report`."""

    runs: list[str]
    figures: str | None
    output: OutputOptions

    def check(self) -> None:
        """The page is one file, and figures may stand in a folder of others: `OutputOptions.check` knows neither."""
        page = self.page
        if page.is_dir() or (page.exists() and not self.output.overwrite):
            raise UserError(
                f"{self.output.out} exists; choose another --out" + ("" if page.is_dir() else " or give --overwrite")
            )
        folder = self.figures_folder
        if folder is not None and folder.exists() and not (self.output.overwrite and folder.is_dir()):
            raise UserError(f"{self.figures} exists; choose another --figures or give --overwrite")

    @property
    def page(self) -> Path:
        return Path(str(self.output.out)).expanduser()

    @property
    def figures_folder(self) -> Path | None:
        return None if self.figures is None else Path(self.figures).expanduser()


def run(options: ReportOptions) -> Path:
    options.check()
    opened = [open_folder(folder) for folder in expand(options.runs)]
    write_report(opened, options.page)
    options.output.say_written(f" ({options.page.stat().st_size / 1e6:.1f} MB)")
    if options.figures_folder is not None:
        from prunescope.report.figures.publication import draw_publication  # loads matplotlib

        runs = [one for one in opened if isinstance(one, Run)]
        checkpoints = [(one.folder, one.record) for one in opened if not isinstance(one, Run)]
        written = draw_publication(runs, checkpoints, options.figures_folder)
        console.print(f"written: {options.figures} ({len(written)} files)", markup=False)
    return options.page
