"""Pictures of pages for the README, made by the browser that the tests use.

    python -m scripts.screenshots runs/quickstart/report.html
    python -m scripts.screenshots scripts/results/compare_quickstart.json

The page of a comparison is made anew from its JSON; nothing is measured. Needs Debian's chromium, and imagemagick to
bring each picture down to 64 colours.
"""

import base64
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.stages.compare import read, write_pages
from tests.browser import Browser, find_browser, started

FOLDER = Path(__file__).resolve().parent / "results" / "screenshots"


@dataclass(frozen=True)
class Picture:
    """A part of a page.

    Attributes:
        name: of the file.
        start: selects the element that it begins at.
        height: of the picture, in pixels.
        width: of the window.
        is_dark: whether the reader prefers dark pages.
    """

    name: str
    start: str
    height: int
    width: int = 1280
    is_dark: bool = False


OF_REPORT = (
    Picture("answer", "main", 1000),
    Picture("dark", "main", 1000, is_dark=True),
    Picture("exports", "#exports", 560),
    Picture("samples", "#samples .prompt:nth-of-type(3)", 420),
    Picture("training", "#training", 800),
    Picture("quantized", "#quantized", 520),
    Picture("narrow", "main", 900, width=420),
)
OF_COMPARISON = (Picture("compare", "main", 1290),)


def main() -> None:
    source, program = Path(sys.argv[1]), find_browser()
    if program is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page, pictures = page_of(source, Path(folder))
        with started(program, Path(folder) / "profile") as browser:
            for picture in pictures:
                save(take(browser, page, picture), FOLDER / f"{picture.name}.png")


def page_of(source: Path, folder: Path) -> tuple[Path, tuple[Picture, ...]]:
    """The page to open and what to take of it; that of a comparison is written into ``folder``."""
    if source.suffix != ".json":
        return source, OF_REPORT
    write_pages(read(source), folder)
    return folder / "compare.html", OF_COMPARISON


def take(browser: Browser, page: Path, picture: Picture) -> bytes:
    """A PNG of a part of a page."""
    browser.open(page, width=picture.width, dark=picture.is_dark)
    top = browser.value(f"document.querySelector('{picture.start}').getBoundingClientRect().top + scrollY")
    clip = {"x": 0, "y": max(0, top - 10), "width": picture.width, "height": picture.height, "scale": 1}
    answer = browser.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    return base64.b64decode(answer["data"])


def save(png: bytes, target: Path) -> None:
    """Writes a picture of 64 colours."""
    target.write_bytes(png)
    subprocess.run(["convert", target, "+dither", "-colors", "64", "-strip", target], check=True)
    print(f"{target.name}: {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
