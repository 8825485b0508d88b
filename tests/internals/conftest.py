"""A browser for the tests of pages."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
BECOME = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A headless Chromium with one page, spoken to in the DevTools protocol through pipes, which it has as 3 and 4."""

    def __init__(self, program: str, profile: str) -> None:
        pipes = [*os.pipe(), *os.pipe()]
        theirs_in, our_out, our_in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in pipes)
        command = [sys.executable, "-c", BECOME, str(theirs_in), str(theirs_out), program, *QUIET]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        for end in (*pipes, theirs_in, theirs_out):
            os.close(end)
        self._to, self._from = os.fdopen(our_out, "wb", 0), os.fdopen(our_in, "rb")
        self.events: list[dict] = []
        self._session: dict[str, str] = {}
        self._count = 0
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility", "DOM"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: object) -> dict:
        """Send a command and return its result; events that come meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self) -> dict:
        read = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser is gone"
            read += byte
        return json.loads(read)

    def open(self, path: os.PathLike[str], scheme: str = "light", width: int = 1280) -> None:
        self.events.clear()
        self("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self("Page.navigate", url=f"file://{path}")
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, expression: str) -> object:
        """Return the value of a JavaScript expression."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((found) => found.textContent)")

    def attributes(self, selector: str, name: str) -> list[str]:
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.run(f"{found}.map((found) => found.getAttribute({json.dumps(name)}))")

    def click(self, selector: str) -> None:
        """Click with the mouse, in the middle of what is there."""
        box = self.run(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            "found.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const {x, y, width, height} = found.getBoundingClientRect(); return [x + width / 2, y + height / 2] })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
            self("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], **button)
        self.run("new Promise((done) => setTimeout(done, 20))")  # some of what follows a click is told later

    def press(self, *keys: str) -> None:
        codes = {
            "Tab": 9,
            "Enter": 13,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "End": 35,
            "Home": 36,
        }
        for key in keys:
            for kind in ("rawKeyDown", *(["char"] if key == "Enter" else []), "keyUp"):
                text = {"text": "\r"} if kind == "char" else {}
                self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)

    def complaints(self) -> list[dict]:
        """Return exceptions, and what was logged as an error or a warning (a breach of the page's policy is)."""
        self.run("new Promise((done) => setTimeout(done, 50))")
        logged = [e["params"] for e in self.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
        return [entry for entry in logged if entry.get("entry", {}).get("level", "error") != "info"]

    def close(self) -> None:
        with suppress(AssertionError, OSError):
            self("Browser.close")
        self.process.wait(timeout=20)
        self._to.close()
        self._from.close()


@pytest.fixture(scope="session")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        reason = f"the page is tested in Chromium, and none of {', '.join(BROWSERS)} is installed"
        (pytest.fail if os.environ.get("MINILM_REQUIRE_CHROMIUM") else pytest.skip)(reason)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        started = Browser(program, profile)
        yield started
        started.close()
