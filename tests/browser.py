"""A headless Chromium, told what to do by the DevTools protocol over two pipes, which needs no library."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a browser. What it complains of is in ``errors``."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        read, self.out = os.pipe()
        self.into, write = os.pipe()
        for end in (read, write):
            os.set_inheritable(end, True)
        flags = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}".split()
        # The protocol is spoken on descriptors 3 and 4; a shell puts our ends there.
        shell = ["bash", "-c", f'exec 3<&{read} 4>&{write}; exec "$@"', "bash"]
        self.process = subprocess.Popen(
            [*shell, CHROMIUM, *flags], pass_fds=(read, write), stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(read)
        os.close(write)
        self.received = b""
        self.numbers = itertools.count(1)
        self.errors: list[str] = []
        self.events: list[str] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": arguments}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self._take(answer)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, address: str) -> None:
        """Goes to a page and waits until all of it is there."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        while "Page.loadEventFired" not in self.events:
            self._take(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.into)
        os.close(self.out)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            more = os.read(self.into, 1 << 20)
            assert more, "the browser has gone"
            self.received += more
        message, _, self.received = self.received.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def _take(self, event: dict[str, Any]) -> None:
        method, told = event.get("method", ""), event.get("params", {})
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"].get("exception", told["exceptionDetails"])))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.errors.append(str([each.get("value") for each in told["args"]]))
