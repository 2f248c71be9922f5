"""A headless Chromium, driven through the DevTools protocol: nothing but the browser has to be installed."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
"""Path of the browser; "" without one."""


class Page:
    """One tab: what it says, and what it has said so far."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._numbers = socket, itertools.count(1)
        self.events: list[dict[str, Any]] = []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = json.loads((await self._socket.receive(timeout=600)).data)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    async def value(self, expression: str) -> Any:
        answer = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def open(self, path: Path, width: int, scheme: str) -> None:
        self.events.clear()
        await self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        await self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self.ask("Page.navigate", url=path.as_uri())
        while await self.value("document.readyState") != "complete":
            await asyncio.sleep(0.05)
        await self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    async def picture(self, selector: str, output: Path, *, margin: float = 24) -> None:
        """Writes what is within the first element of this selector, and a margin around it, as PNG."""
        box = await self.value(f"""(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();
          return [box.x + scrollX, box.y + scrollY, box.width, box.height] }})()""")
        x, y, width, height = box[0] - margin, box[1] - margin, box[2] + 2 * margin, box[3] + 2 * margin
        clip = {"x": max(x, 0), "y": max(y, 0), "width": width, "height": height, "scale": 1}
        shot = await self.ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        output.write_bytes(base64.b64decode(shot["data"]))

    def of_kind(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"),
            *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            said = Path(profile, "DevToolsActivePort")
            while not (said.exists() and said.read_text().count("\n")):
                assert process.poll() is None, "the browser did not start"
                await asyncio.sleep(0.1)
            port = said.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    [tab] = [tab for tab in await answer.json() if tab["type"] == "page"]
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Network", "Log"):
                        await page.ask(f"{domain}.enable")
                    yield page
        finally:
            process.kill()
            process.wait()
