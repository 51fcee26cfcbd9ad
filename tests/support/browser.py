"""A real browser, driven over a pipe: Chromium's own protocol, and nothing to install beside it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
# A browser asks its makers for updates and lists; a page is judged by what it asks itself.
_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"]
# The protocol is spoken on file descriptors 3 and 4.
_ENDS = """
import fcntl, os, sys
for at, given in enumerate([fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]], 3):
    os.dup2(given, at)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A tab.

    Attributes:
        requests: addresses that were asked for.
        said: what the console and the log said, a line each.
    """

    def __init__(self, to: int, answers: int):
        self._to, self._from, self._rest, self._number, self._session = to, answers, b"", 0, ""
        self.requests: list[str] = []
        self.said: list[str] = []
        tab = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Performance.enable", timeDomain="threadTicks")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(
            self._to, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from, 2**20)
            assert more, "the browser has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        answer = json.loads(line)
        params = answer.get("params", {})
        if answer.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if answer.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(params))
        return answer

    def look(self, width: int, height: int = 900, *, dark: bool = False, media: str = "") -> None:
        """Sets the size of the window, the colours it asks for, and ``print`` or nothing."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", media=media, features=features)

    def open(self, file: Path, state: str = "") -> None:
        """Opens a page, and waits until it is drawn."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=f"{file.as_uri()}{state}")
        self.wait("document.documentElement?.dataset.drawn !== undefined")

    def busy(self) -> float:
        """Seconds of the processor that the page's thread has taken so far."""
        found = self._call("Performance.getMetrics")["metrics"]
        return next(one["value"] for one in found if one["name"] == "TaskDuration")

    def run(self, code: str) -> Any:
        """The value of an expression; a promise is waited for."""
        found = self._call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, (condition, self.said)
            time.sleep(0.02)

    def press(self, key: str, times: int = 1, *, text: str = "") -> None:
        """Presses a key, such as Tab, ArrowRight or a space."""
        codes = {"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, " ": 32, "Enter": 13}
        about = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
        for _ in range(times):
            self._call("Input.dispatchKeyEvent", type="keyDown", **about, text=text or (key if key == " " else ""))
            self._call("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, x: float, y: float) -> None:
        """Clicks at a place of the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, x: float, y: float) -> None:
        """Moves the mouse to a place of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, *, whole: bool = True) -> bytes:
        """The page as PNG."""
        taken = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(taken["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self._call("Page.printToPDF", printBackground=False)["data"])


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A browser with one tab, gone when the block ends."""
    assert CHROMIUM, "no Chromium"
    (theirs_in, to), (answers, theirs_out) = os.pipe(), os.pipe()
    command = [sys.executable, "-SEc", _ENDS, str(theirs_in), str(theirs_out), CHROMIUM, *_FLAGS]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        running = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(to, answers)
        finally:
            running.terminate()
            running.wait(20)
            os.close(to)
            os.close(answers)
