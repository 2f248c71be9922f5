"""The report in a real browser: it opens without an error, asks nothing of any network, and fits narrow and wide screens.

Skipped where there is no Chromium.
"""

import asyncio
import itertools
from pathlib import Path

import pytest

from cluster.report.page import write_report
from tests.browser import BROWSER, browser
from tests.fake_run import make_fake_run

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine"),
]


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
