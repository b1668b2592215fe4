"""Takes the screenshots of a report page that the documentation shows.

    make demo
    python tools/screenshots.py demo/SmolLM2-135M-Instruct-Q4_0.gguf.record/report.html docs/images

Needs the extra `browser`, and Chromium: on PATH, or installed by `playwright install chromium`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

COLORS = 32
"""Number of colours of a PNG. A page of text and plots needs no more, and the PNG is a third of the size."""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Yields a headless Chromium. Raises playwright's Error if none is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright, playwright.chromium.launch(
        executable_path=executable, args=["--no-sandbox"]
    ) as browser:  # fmt: skip
        yield browser


def save(picture: bytes, path: Path) -> None:
    """Writes a picture as a PNG with COLORS colours."""
    reduced = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


def take(page: Page, folder: Path) -> None:
    """Writes screenshots of the top of the page and of two plots into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save(page.screenshot(), folder / "report.png")
    for title, name in {"Output error by block": "report-errors", "Weights of": "report-grid"}.items():
        save(page.locator(".plot", has_text=title).first.screenshot(), folder / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 640})
        page.goto(arguments.report.absolute().as_uri())
        take(page, arguments.folder)


if __name__ == "__main__":
    main()
