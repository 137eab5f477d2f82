"""A headless Chromium that a test opens a page in and talks to.

It is spoken to over two pipes in its DevTools protocol: one JSON object a message, each ended by a zero byte. That
needs no library and no port. https://chromedevtools.github.io/devtools-protocol/
"""

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
RUN = "document.title='run'"
HOSTILE = f'</script></style><script>{RUN}</script><img src=x onerror="{RUN}">\u202e\x00\x1b[31m'
"""Text that would run, ask for something, and turn what stands beside it, where a page took it for markup."""
# Least contrast of text against its ground, WCAG 2.2 section 1.4.3: at least 4.5.
CONTRAST = """(() => {
  const luminance = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(each => each / 255)
    .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = element => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour;
    }
  };
  const texts = "main p, main dt, main dd, main td, main th, main .note, .status, ins, del, mark";
  return Math.min(...[...document.querySelectorAll(texts)]
    .map(element => [luminance(getComputedStyle(element).color), luminance(ground(element))])
    .map(([first, second]) => (Math.max(first, second) + 0.05) / (Math.min(first, second) + 0.05)));
})()"""
SECONDS = 60.0
"""For one answer; the first takes as long as the browser takes to start."""


def find_browser() -> str | None:
    """The first browser of this kind that is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in one browser.

    Attributes:
        complaints: what the page wrote to the console, what it threw, and what its policy forbade.
        requests: addresses that it asked for, its own file apart.
    """

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back = to, back
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = ""
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: object) -> dict[str, Any]:
        """Carries out one command and gives its result."""
        number = next(self._numbers)
        message: dict[str, object] = {"id": number, "method": method, "params": parameters}
        if session := vars(self).get("_session"):
            message["sessionId"] = session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._note(answer)

    def open(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Shows a page in a window of this size, and waits until it is loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", media="", features=features)
        self._events.clear()
        self.send("Page.navigate", url=file.absolute().as_uri())
        self._wait(lambda: any(event["method"] == "Page.loadEventFired" for event in self._events))

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Types one key into what has the focus."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Moves the mouse from one place to another with its button down."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _wait(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._note(self._receive())

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            assert select.select([self.back], [], [], max(0.0, until - time.monotonic()))[0], "the browser is silent"
            read = os.read(self.back, 1 << 20)
            assert read, "the browser ended"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        method, told = event.get("method", ""), event.get("params", {})
        self._events.append(event)
        if method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{told['type']}: {told['args']}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {told['exceptionDetails']}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"{told['entry']['level']}: {told['entry']['text']}")
        elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith("file:"):
            self.requests.append(told["request"]["url"])


@contextmanager
def started(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile; it ends with the block."""
    its_input, to = (_high(end) for end in os.pipe())
    back, its_output = (_high(end) for end in os.pipe())

    def place() -> None:
        # The protocol has its places: it reads from 3 and writes to 4.
        os.dup2(its_input, 3)
        os.dup2(its_output, 4)

    command = [program, *FLAGS, f"--user-data-dir={profile}"]
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent, preexec_fn=place, pass_fds=(3, 4))
    os.close(its_input)
    os.close(its_output)
    try:
        yield Browser(to, back)
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
        os.close(to)
        os.close(back)


def _high(end: int) -> int:
    """The same pipe at a number above those that the protocol uses."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved


IN_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
    pytest.mark.usefixtures("nothing_to_complain_of"),
]
"""Marks of a module whose tests open pages: no page may complain in the console or ask for anything."""
