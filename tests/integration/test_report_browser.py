"""The report in a real browser: it opens without an error, asks nothing of any network, and fits narrow and wide screens.

Skipped where there is no Chromium.
"""

import asyncio
import itertools
import json
from pathlib import Path

import pytest

from cluster.report.page import write_report
from tests.browser import BROWSER, browser
from tests.fake_run import make_fake_run, make_full_run

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


TURNS = """(() => {
  const line = document.querySelector("article:not([hidden]) .tokens"), blocks = [...line.children];
  const clear = (e) => ["transparent", "rgba(0, 0, 0, 0)"].includes(getComputedStyle(e).backgroundColor);
  const last = [...line.querySelectorAll("i")].at(-1), box = last.getBoundingClientRect();
  last.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, clientX: box.x, clientY: box.y }));
  return { by: blocks.map((block) => [block.dataset.by, getComputedStyle(block, "::before").content]),
           below: blocks.slice(1).every((b, i) => b.getBoundingClientRect().top >= blocks[i].getBoundingClientRect().bottom),
           colours: blocks.map((block) => [...block.children].map((token) => !clear(token))),
           tip: document.getElementById("tip").textContent };
})()"""


def test_turns_are_told_apart_and_what_others_wrote_has_no_colour(tmp_path: Path) -> None:
    run = make_fake_run(tmp_path / "run", updates=1, rows=1)
    for file in (run / "trajectories").iterdir():
        row = json.loads(file.read_text().splitlines()[0]) | {
            "tokens": [*"1+2", "error", *"34"],
            "trained": [1, 1, 1, 0, 1, 1],
        }
        row["trained"] = [bool(one) for one in row["trained"]]
        row |= {
            "student_logprobs": [-0.1, -0.1, -0.1, None, -0.1, -0.5],
            "teacher_logprobs": [-3, -0.1, -0.1, None, -3, -4],
        }
        file.write_text(json.dumps({**row, "policy_versions": [0, 0, 0, -1, 0, 0]}) + "\n")

    async def look_at_turns() -> dict:
        async with browser() as page:
            await page.open(write_report([run], tmp_path / "report.html").resolve(), 1280, "light")
            return await page.value(TURNS)

    found = asyncio.run(look_at_turns())
    assert found["by"] == [[who, json.dumps(who)] for who in ("turn 1", "others", "turn 2")] and found["below"]
    assert found["colours"] == [[True, False, False], [False], [True, True]]
    assert "-0.500" in found["tip"] and "-4.000" in found["tip"], "the log-probs of that token, across blocks"


OVERLAPS = """(() => {
  const shown = [], clips = new Map();
  const clip = (e) => {  // what of an element can be seen, as its ancestors cut it
    if (!e || e === document.body) return [-1e9, -1e9, 1e9, 1e9];
    if (!clips.has(e)) {
      let [x0, y0, x1, y1] = clip(e.parentElement);
      if (!e.namespaceURI.endsWith("svg") && getComputedStyle(e).overflowX !== "visible") {
        const box = e.getBoundingClientRect();
        [x0, y0, x1, y1] = [Math.max(x0, box.left), Math.max(y0, box.top), Math.min(x1, box.right), Math.min(y1, box.bottom)];
      }
      clips.set(e, [x0, y0, x1, y1]);
    }
    return clips.get(e);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, title, pre, .tokens, .prompt")) continue;
    const style = getComputedStyle(parent);
    if (style.visibility === "hidden" || !parent.getClientRects().length) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      let [x0, y0, x1, y1] = clip(parent);
      [x0, y0] = [Math.max(x0, rect.left), Math.max(y0, rect.top)];
      [x1, y1] = [Math.min(x1, rect.right), Math.min(y1, rect.bottom)];
      const slack = (y1 - y0) * 0.15;
      if (x1 - x0 > 1 && y1 - y0 > 1) shown.push({x0, y0: y0 + slack, x1, y1: y1 - slack, node, text: node.data.trim()});
    }
  }
  shown.sort((a, b) => a.y0 - b.y0);
  const found = [];
  for (let i = 0; i < shown.length; i++) for (let j = i + 1; j < shown.length && shown[j].y0 < shown[i].y1; j++) {
    const a = shown[i], b = shown[j];
    if (a.node !== b.node && Math.min(a.x1, b.x1) - Math.max(a.x0, b.x0) > 1 && Math.min(a.y1, b.y1) - b.y0 > 1) found.push(a.text + " | " + b.text);
  }
  return found;
})()"""
"""Pairs of texts that are drawn over each other, as far as both can be seen. Tokens and YAML may scroll; they are left out."""
LONG = "qwen3-0.6b-from-4b-mathematics-and-code-two-domains-eight-teachers-seed-17"
SEEN = ((390, "screen"), (1280, "screen"), (1920, "screen"), (794, "print"))


async def overlaps(paths: list[Path]) -> list[str]:
    found = []
    async with browser() as page:
        for path, (width, media) in itertools.product(paths, SEEN):
            await page.open(path, width, "light")
            await page.ask("Emulation.setEmulatedMedia", media=media)
            await page.value("document.querySelectorAll('details').forEach(details => details.open = true)")
            pairs = await page.value(OVERLAPS)
            found += [f"{path.name}, {width} pixels, {media}: {pair}" for pair in pairs]
            wide = await page.value("document.documentElement.scrollWidth")
            found += [f"{path.name}, {media}: {wide} pixels wide, in {width}"] * (wide > width)
    return found


def test_no_texts_of_the_report_overlap_with_long_names_many_teachers_and_many_marks(tmp_path: Path) -> None:
    one = write_report([make_full_run(tmp_path / LONG)], tmp_path / "one.html")
    runs = [make_full_run(tmp_path / f"{LONG}-{seed}", updates=40, teachers=1, seed=seed) for seed in range(4)]
    several = write_report(runs, tmp_path / "several.html")
    assert asyncio.run(overlaps([one.resolve(), several.resolve()])) == []
