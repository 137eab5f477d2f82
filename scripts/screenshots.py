"""Pictures of a report for the README, made by the browser that the tests use.

    python -m scripts.screenshots runs/quickstart/report.html

Needs Debian's chromium, and imagemagick to bring each picture down to 64 colours.
"""

import base64
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.browser import Browser, find_browser, started

FOLDER = Path(__file__).resolve().parent / "results" / "screenshots"
# Name, width of the window, whether it is dark, the element to begin at, and the height of the picture.
PICTURES = (
    ("answer", 1280, False, "main", 1000),
    ("dark", 1280, True, "main", 1000),
    ("exports", 1280, False, "#exports", 560),
    ("samples", 1280, False, "#samples .prompt:nth-of-type(3)", 420),
    ("training", 1280, False, "#training", 800),
    ("quantized", 1280, False, "#quantized", 520),
    ("narrow", 420, False, "main", 900),
)


def take(browser: Browser, start: str, *, width: int, height: int) -> bytes:
    """A PNG of this part of the page that is open."""
    top = browser.value(f"document.querySelector('{start}').getBoundingClientRect().top + scrollY")
    clip = {"x": 0, "y": max(0, top - 10), "width": width, "height": height, "scale": 1}
    answer = browser.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    return base64.b64decode(answer["data"])


def main() -> None:
    page, program = Path(sys.argv[1]), find_browser()
    if program is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, started(program, Path(profile)) as browser:
        for name, width, is_dark, start, height in PICTURES:
            browser.open(page, width=width, dark=is_dark)
            target = FOLDER / f"{name}.png"
            target.write_bytes(take(browser, start, width=width, height=height))
            subprocess.run(["convert", target, "+dither", "-colors", "64", "-strip", target], check=True)
            print(f"{target.name}: {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
