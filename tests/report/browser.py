"""A real browser, driven over a pipe by the DevTools protocol: no further package is needed."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where nothing here is used
    fcntl = None

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
          "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe")  # fmt: skip
_PATIENCE = 120.0  # seconds; on a busy machine it takes long to start


def chromium():
    """Where it is, or None."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One page. Everything that it logs, asks for or throws is in `events`."""

    def __init__(self, folder: Path):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser reads from its descriptor 3 and writes to 4, which must not be those of another pipe.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, from_browser)]
        wiring = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        wiring += [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4), strict=True)]
        command = [chromium(), *_QUIET, f"--user-data-dir={folder}", "about:blank"]
        self._process = os.posix_spawn(command[0], command, os.environ, file_actions=wiring)
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self.events, self._unread, self._number, self._session = [], b"", 0, None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        """What the browser answers to a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(
            self._out, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, width=1280, height=900, dark=False):
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + _PATIENCE
        while self.value("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < until, "the page does not load"
            time.sleep(0.05)

    def value(self, expression):
        """What a JavaScript expression comes to."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def drag(self, start, end):
        """The mouse, pressed from one place to another."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def move(self, x, y):
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def close(self):
        for end in (self._out, self._in):
            os.close(end)
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)

    def _read(self):
        while b"\0" not in self._unread:
            part = os.read(self._in, 1 << 16)
            assert part, "the browser has gone"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)
