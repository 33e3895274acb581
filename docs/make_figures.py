"""Screenshots of the demo's page for README and docs/report.md: `make docs-figures`. Needs Chromium and playwright."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).resolve().parent
SHOTS = {  # file -> (selector of the part, width, colour scheme)
    "report-verdict": ("#verdict", 1180, "light"),
    "report-layers": ("#layers", 1180, "light"),
    "report-decoding": ("#decoding", 1180, "light"),
    "report-worst": ("[data-worst=generate]", 1180, "light"),
    "report-options": ("#options", 1180, "light"),
    "report-targets": ("#targets", 1180, "light"),
    "report-dark": ("[data-chart=heat]", 1180, "dark"),
    "report-phone": ("#verdict", 390, "light"),
}


LARGEST = 6e6  # bytes


def open_page(page: Page, report: Path) -> None:
    page.goto(report.resolve().as_uri())
    page.wait_for_selector("html[data-ready]")
    counts, before = "JSON.stringify([...document.querySelectorAll('figure')].map(f => f.dataset.drawn))", None
    while before != (before := page.evaluate(counts)):
        page.wait_for_timeout(300)


def main(demo: str) -> None:
    size = (Path(demo) / "report.html").stat().st_size
    if size > LARGEST:
        sys.exit(f"the demo's page has {size / 1e6:.2f} MB; it must stay below {LARGEST / 1e6:g} MB")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (selector, width, scheme) in SHOTS.items():
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            open_page(page, Path(demo) / "report.html")
            if selector == "#options":  # of the run in which answers change
                page.select_option("#options [data-run]", label="drop-mlp")
            if selector == "#decoding":
                page.hover("[data-tokens] li >> nth=1")
            if selector == "[data-worst=generate]":
                page.select_option("[data-worst=generate] [data-only]", "fork")
                page.hover("[data-worst=generate] li >> nth=2")
            part = page.locator(selector)
            part.scroll_into_view_if_needed()
            page.evaluate("document.querySelector('nav').style.position = 'static'")
            page.wait_for_timeout(300)
            part.screenshot(path=HERE / f"{name}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
