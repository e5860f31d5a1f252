"""A headless Chromium, told what to do through its DevTools protocol, over pipes: no package is needed for it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# The protocol's file descriptors in the browser, and where they wait while these two may still be others.
READS, WRITES, ASIDE = 3, 4, 10


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """A page in the browser, and what went wrong in it.

    Attributes:
        problems: errors of scripts, and what the page's policy or the network refused.
    """

    def __init__(self, to_browser: Any, from_browser: Any) -> None:
        self._to, self._from, self._number, self._session = to_browser, from_browser, 0, None
        self._left = b""
        self.problems: list[str] = []
        self._loads = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._from.fileno(), 1 << 16)
            assert part, "the browser has ended"
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Page.loadEventFired":
            self._loads += 1
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(event["params"]["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.problems.append(event["params"]["entry"]["text"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str) -> Any:
        """The value of an expression in the page once it is true; asked anew every few milliseconds, for a minute."""
        return self.run(
            "new Promise((resolve, reject) => { const end = Date.now() + 60000; const look = () => { "
            f"const value = ({condition}); if (value) resolve(value); "
            f"else if (Date.now() > end) reject(new Error({json.dumps('never: ' + condition)})); "
            "else setTimeout(look, 20); }; look(); })"
        )

    def open(self, url: str) -> None:
        before = self._loads
        self.call("Page.navigate", url=url)
        while self._loads == before:
            self._note(self._read())

    def put_into(self, selector: str, *files: Path) -> None:
        """Choose files in an <input type=file>, as a person would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def move_to(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def resize(self, width: int, height: int, *, phone: bool) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """ "dark" or "light"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


@contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A browser with its profile in `folder`."""
    program = find()
    assert program is not None
    command = [
        *(program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}"),
        *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server"),
        *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "about:blank"),
    ]
    browser_reads, we_write = os.pipe()
    we_read, browser_writes = os.pipe()
    aside = [fcntl.fcntl(end, fcntl.F_DUPFD, ASIDE) for end in (browser_reads, browser_writes)]

    def lay_pipes() -> None:
        for end, place in zip(aside, (READS, WRITES), strict=True):
            os.dup2(end, place)

    child = subprocess.Popen(
        command, preexec_fn=lay_pipes, pass_fds=(READS, WRITES), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for end in (browser_reads, browser_writes, *aside):
        os.close(end)
    try:
        with os.fdopen(we_write, "wb") as to_browser, os.fdopen(we_read, "rb") as from_browser:
            tab = Tab(to_browser, from_browser)
            yield tab
            tab.call("Browser.getVersion")  # so that what went wrong until now has been noted
    finally:
        child.kill()
        child.wait()
