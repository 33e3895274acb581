"""Every page of the site in a browser at 390 and 1440 px: `make docs-look`. Fails where a page scrolls sideways, logs an error, or asks for
anything but its own files; screenshots go to `test-output/site`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main(site: str) -> int:
    out = Path("test-output/site")
    out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--allow-file-access-from-files"]
        )
        for width in (390, 1440):
            for path in sorted(Path(site).glob("[!4]*.html")):
                page = browser.new_page(viewport={"width": width, "height": 1000})
                name = f"{path.name} at {width} px"
                page.on(
                    "console", lambda m, name=name: faults.append(f"{name}: {m.text}") if m.type == "error" else None
                )
                page.on(
                    "request",
                    lambda r, name=name: (
                        None
                        if r.url.startswith(("file:", "data:", "blob:"))
                        else faults.append(f"{name}: asks for {r.url}")
                    ),
                )
                page.goto(path.resolve().as_uri())
                wide = page.evaluate("document.documentElement.scrollWidth")
                if wide > width:
                    faults.append(f"{name}: scrolls sideways, {wide} px")
                page.screenshot(path=out / f"{path.stem}-{width}.png", full_page=True)
                page.close()
        browser.close()
    print("\n".join(faults) or f"every page at two widths: no fault; screenshots in {out}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
