"""Takes the steps of docs/walk.md and makes its pictures: python docs/make_walk.py (some minutes; needs Chromium)."""

import asyncio
import io
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.terminal_theme import MONOKAI  # noqa: E402
from rich.text import Text  # noqa: E402

from tests.browser import browser  # noqa: E402
from tests.walk import Walk  # noqa: E402

PICTURES = ROOT / "docs" / "walk"
COLUMNS = 118
COLOUR = {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}


def terminal(name: str, shown: list[tuple[str, str]]) -> None:
    """Draws commands and their output like a terminal."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for command, output in shown:
        console.print(Text(f"$ {command}", "bold"))
        console.print(Text.from_ansi(output.rstrip()))
    svg = console.export_svg(title="understudy", theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)  # nothing is loaded from elsewhere
    (PICTURES / f"{name}.svg").write_text(re.sub(r"[ \t]+\n", "\n", svg), "utf-8")


async def photograph(page: Path) -> None:
    """Screenshots of the report's curves and timeline."""
    async with browser() as tab:
        await tab.open(page, 1180, "light")
        await tab.value("document.querySelectorAll('details').forEach(details => details.open = false)")
        await tab.value("""document.querySelectorAll('section').forEach(s => s.id = s.querySelector('h2').textContent
            .toLowerCase().replaceAll(' ', '-'))""")
        await tab.picture("#what-was-learnt", PICTURES / "report-curves.png")
        await tab.picture("#what-happened", PICTURES / "report-timeline.png")


def walk_and_draw(walk: Walk) -> None:
    """Takes every step and draws it."""

    def shown(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
        """Command and output, with the addresses and paths of the page."""
        words = " ".join(shlex.quote(word) for word in done.args[3:])
        told = [words, done.stdout]
        for ours, theirs in ((walk.cluster.address, "http://127.0.0.1:8265"), (str(walk.folder), "/tmp/walk")):
            told = [text.replace(ours, theirs) for text in told]
        return f"understudy {told[0]}", told[1]

    def status() -> tuple[str, str]:
        return shown(walk.cluster.understudy("status", walk.run))

    terminal("submit", [shown(walk.submit())])
    walk.until("the first updates", lambda: walk.update() >= 10)
    terminal("status", [status()])
    scaled = shown(walk.scale())
    walk.wait_for_actor("rollout-1")
    walk.wait_for_updates(5)
    terminal("scale", [scaled, status()])
    walk.kill_a_node()
    walk.until("the loss", lambda: walk.events("actor_died"))
    walk.wait_for_updates(2)
    terminal("lost", [status()])
    walk.wait_for_the_replacement()
    walk.wait_for_updates(6)
    terminal("replaced", [status()])
    walk.wait_for_the_end()
    terminal("report", [shown(walk.cluster.understudy("report", walk.run))])
    asyncio.run(photograph(walk.run / "report.html"))


def main() -> None:
    """Makes every picture."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="understudy-walk-") as folder:
        walk = Walk(Path(folder))
        walk.cluster.environment |= COLOUR
        try:
            walk_and_draw(walk)
        finally:
            walk.close()


if __name__ == "__main__":
    main()
