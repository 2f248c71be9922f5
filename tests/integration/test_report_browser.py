"""The report in a real browser: it opens without an error, asks nothing of any network, and fits narrow and wide screens.

Driven through the DevTools protocol, so that nothing but a Chromium has to be installed; skipped where there is none.
"""

import asyncio
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
import pytest

from cluster.report import write_report
from tests.fake_run import make_fake_run

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine"),
]


class Page:
    """One tab: what it says, and what it has said so far."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._numbers = socket, itertools.count(1)
        self.events: list[dict[str, Any]] = []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = json.loads((await self._socket.receive(timeout=30)).data)
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


PAGE = """[document.body, document.documentElement].map(e => getComputedStyle(e).backgroundColor)
  .find(c => !c.endsWith(", 0)"))"""
CONTRAST = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 }); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const a = light(getComputedStyle(document.body).color), b = light(PAGE);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) })()""".replace("PAGE", PAGE)
"""Of the text against the page, as WCAG 2.2 defines it; 4.5 is what it asks for."""


async def look(path: Path) -> None:
    backgrounds = set()
    async with browser() as page:
        for width, scheme in itertools.product((1280, 390), ("light", "dark")):
            await page.open(path, width, scheme)
            where = f"{path.parent.name}, {width} pixels, {scheme}"
            assert not page.of_kind("Runtime.exceptionThrown"), where
            assert not [e for e in page.of_kind("Log.entryAdded") if e["entry"]["level"] == "error"], where
            asked = [event["request"]["url"] for event in page.of_kind("Network.requestWillBeSent")]
            assert all(url == path.as_uri() or url.startswith(("data:", "blob:")) for url in asked), (where, asked)
            wide = await page.value("document.documentElement.scrollWidth")
            assert wide <= width, f"{where}: the page is {wide} pixels wide"
            assert await page.value("document.querySelectorAll('svg').length") >= 3, where
            assert await page.value(CONTRAST) >= 4.5, where
            backgrounds.add((scheme, await page.value(PAGE)))
        buttons = await page.value("document.querySelectorAll('button').length")
        for number in range(min(buttons, 12)):  # filters and steps answer without an error
            await page.value(f"document.querySelectorAll('button')[{number}].click()")
        assert not page.of_kind("Runtime.exceptionThrown")
    assert len(backgrounds) == 2, "light and dark look alike"


@pytest.mark.parametrize("runs", [1, 3])
def test_the_report_opens_in_a_browser(tmp_path: Path, runs: int) -> None:
    names = [make_fake_run(tmp_path / f"run{seed}", seed=seed) for seed in range(runs)]
    asyncio.run(look(write_report(names, tmp_path / "report.html").resolve()))
