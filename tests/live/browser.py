"""Chromium (apt: chromium) without a window, driven over its debugging pipe: open, evaluate, take a picture.

The Chrome DevTools Protocol in the few messages the tests need: JSON, each ended by a zero byte, on descriptors 3 (to
the browser) and 4 (from it). No port is opened, no driver is downloaded.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-background-networking", "--no-first-run", "--window-size=1280,900",
)  # fmt: skip
# Descriptors 3 and 4 must be these two; Popen can pass descriptors on, but not give them numbers.
_AS_3_AND_4 = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


class BrowserError(Exception):
    """The page threw, or the browser did not answer."""


class Browser:
    """One tab. `complaints`: what its console said that is not right."""

    def __init__(self, folder: Path, options: tuple[str, ...] = ()) -> None:
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()
        self.complaints: list[str] = []
        self._number, self._pending, self._session = 0, b"", ""
        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _AS_3_AND_4, str(to_read), str(from_write), "chromium", *OPTIONS, *options,
                 f"--user-data-dir={folder / 'profile'}", "about:blank"],
                pass_fds=(to_read, from_write), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """A JavaScript expression (or promise) as plain data."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def wait(self, expression: str, within_s: float = 30.0) -> None:
        """Until the expression is true; a page on its way to another one is not an error."""
        deadline = time.monotonic() + within_s
        while True:
            with contextlib.suppress(BrowserError):
                if self.value(f"Boolean({expression})"):
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} is not true after {within_s:.0f} s: {self.text()[:2_000]}")
            time.sleep(0.1)

    def text(self) -> str:
        """What can be read on the page."""
        return str(self.value("document.body.innerText"))

    def picture(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))
        return path

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != self._number:
                self._note(answer)
            elif "error" in answer:
                raise BrowserError(f"{method}: {answer['error']}")
            else:
                return dict(answer["result"])

    def _receive(self, within_s: float = 60.0) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._from], [], [], within_s)
            received = os.read(self._from, 1 << 16) if ready else b""
            if not received:
                raise BrowserError("the browser does not answer")
            self._pending += received
        message, _, self._pending = self._pending.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(event["params"]["exceptionDetails"])[:500])
            case "Log.entryAdded" if event["params"]["entry"]["level"] == "error":
                entry = event["params"]["entry"]
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)


@contextlib.contextmanager
def browser(folder: Path, *options: str) -> Iterator[Browser]:
    """`options`: more of Chromium's, e.g. a file for its microphone."""
    running = Browser(folder, options)
    try:
        yield running
    finally:
        running.close()
