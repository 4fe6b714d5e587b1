"""A headless Chromium, spoken to by its DevTools protocol through a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-3d-apis",  # curves as SVG, which can be found on the page
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
LAUNCH = """
import fcntl, os, sys
asked, answered = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(asked, 3)  # the two numbers that Chromium expects
os.dup2(answered, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
ROOTS = """
(() => {
  const roots = [document];
  for (const root of roots)  // grows on the way: TensorBoard's components hide theirs in shadow roots
    for (const element of root.querySelectorAll("*")) if (element.shadowRoot) roots.push(element.shadowRoot);
  return (%s)(roots);
})()
"""
TEXT = """roots.map(root => [...root.children].filter(child => !["STYLE", "SCRIPT", "TEMPLATE"].includes(child.tagName))
  .map(child => child.innerText || "").join(" ")).join(" ")"""


class Browser:
    """One page.

    Args:
        profile: An empty folder for what the browser keeps.
        size: Width and height of its window.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1500, 1600)) -> None:
        (asked, self.ask), (self.answer, answered) = os.pipe(), os.pipe()
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        command = [sys.executable, "-c", LAUNCH, str(asked), str(answered), str(CHROMIUM), *flags, "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(asked, answered), stderr=subprocess.DEVNULL)
        os.close(asked)
        os.close(answered)
        self.number, self.rest, self.session = 0, b"", None
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask, and wait for the answer; events in between are passed over."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.ask, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            piece = os.read(self.answer, 2**16)
            assert piece, "the browser has gone"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url="about:blank")  # another fragment of the same page would not load it
        self.call("Page.navigate", url=address)

    def evaluate(self, function: str) -> Any:
        """What a JavaScript function of the page's document and all shadow roots returns."""
        result = self.call("Runtime.evaluate", expression=ROOTS % function, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, function: str, seconds: float = 60) -> Any:
        """The first value of a function that is not empty.

        Raises:
            TimeoutError: There is none in time.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.evaluate(function):
                return value
            time.sleep(0.2)
        raise TimeoutError(f"not on the page: {function}; it says {self.text()[:2000]}")

    def text(self) -> str:
        """All that is written on the page."""
        return self.evaluate(f"roots => {TEXT}")

    def wait_for(self, *words: str) -> str:
        """The page's text without white space, which words are looked up in, once it has them all."""
        wanted = json.dumps(["".join(word.split()) for word in words])
        found = f"const all = {TEXT}.replace(/\\s+/g, ''); return {wanted}.every(word => all.includes(word)) && all"
        return self.wait(f"roots => {{{found}}}")

    def picture(self, file: Path) -> None:
        """What the window shows."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        os.close(self.ask)
        os.close(self.answer)
