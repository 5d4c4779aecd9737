"""Opens pages in headless Chromium, driven over its debugging pipe: no driver, no network. Needs a `chromium` on the path."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._number, self._left = write, os.fdopen(read, "rb", buffering=0), 0, b""
        self._session: str | None = None
        self.errors: list[str] = []  # exceptions that the page's scripts threw
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Page", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            data = self._read.read(1 << 20)
            assert data, "the browser closed"
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)["result"].get("value")

    def open(self, url: str, ready: str, seconds: float = 60.0) -> None:
        """Load the page and wait until the expression `ready` is true."""
        self.call("Page.navigate", url=url)
        until = time.monotonic() + seconds
        while not self.value(ready):
            assert time.monotonic() < until, f"{url}: {ready} is not true after {seconds:.0f} s; {self.errors}"
            time.sleep(0.02)

    def move(self, x: float, y: float, kind: str = "mouseMoved", **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def picture(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path


@contextmanager
def browser(width: int = 1280, height: int = 1900) -> Iterator[Page]:
    assert CHROMIUM
    to_browser, from_browser = os.pipe(), os.pipe()
    flags = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe --disable-dev-shm-usage"
    flags += " --disable-background-networking --disable-component-update --disable-sync"

    def connect_pipe() -> None:  # Chromium reads from descriptor 3 and writes to 4
        reading, writing = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *flags.split(), f"--window-size={width},{height}", f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect_pipe,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Page(to_browser[1], from_browser[0])
        finally:
            process.kill()
            process.wait()
            os.close(to_browser[1])
