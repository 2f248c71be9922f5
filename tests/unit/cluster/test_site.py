"""The documentation as a site: five menus, every link and anchor leads somewhere, and nothing is swallowed as a tag."""

import importlib.util
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documented import ROOT, python_examples

MENUS = ["Start", "Guides", "Concepts", "Reference", "Project"]
TAGS = {
    *("html", "head", "meta", "title", "link", "script", "style", "body", "noscript", "dialog"),
    *("header", "nav", "main", "article", "aside", "section", "footer", "div", "span", "p", "a", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "img", "kbd"),
    *("em", "strong", "b", "i", "small", "blockquote", "hr", "br", "button", "form", "input", "label", "svg", "path"),
    *("details", "summary", "dl", "dt", "dd"),
}
OURS = ("actors", "learner", "cluster")


def settings() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


def pages_of(entries: list[Any]) -> list[str]:
    """All pages below entries of the navigation."""
    values = [value for entry in entries for value in (entry.values() if isinstance(entry, dict) else [entry])]
    return [page for value in values for page in (pages_of(value) if isinstance(value, list) else [value])]


def without_theme(place: Path) -> Path:
    """The site's settings for mkdocs alone: requirements/docs.txt has the theme, and what reads docstrings."""
    plain = settings() | {"theme": {"name": "mkdocs"}, "plugins": ["search"], "docs_dir": str(ROOT / "docs")}
    plain["markdown_extensions"] = ["toc", "tables", "fenced_code"]
    place.write_text(yaml.safe_dump(plain))
    return place


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, with its theme where that is installed."""
    folder = tmp_path_factory.mktemp("site")
    whole = all(map(importlib.util.find_spec, ("material", "mkdocstrings", "mkdocstrings_handlers")))
    file = ROOT / "mkdocs.yml" if whole else without_theme(folder / "mkdocs.yml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(file), "--site-dir", str(folder / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_every_page_is_in_exactly_one_of_five_menus() -> None:
    menus = settings()["nav"]
    assert [name for menu in menus for name in menu] == MENUS
    there = sorted(str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md"))
    assert sorted(pages_of(menus)) == there


def test_the_site_builds_and_nothing_on_its_pages_is_swallowed_as_a_tag(site: Path) -> None:
    pages = list(site.glob("**/index.html"))
    assert len(pages) == len(pages_of(settings()["nav"]))
    for page in pages:
        tags: set[str] = set()
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes, seen=tags: seen.add(tag)  # type: ignore[method-assign]
        parser.feed(page.read_text("utf-8"))
        assert tags <= TAGS, f"{page.parent.name}: {tags - TAGS}"
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", (site / "configuration/index.html").read_text("utf-8"))
    assert [heading for heading in headings if heading.startswith("<code>teachers.&lt;name&gt;</code>")]


def api() -> list[str]:
    """What the page about the API shows."""
    return re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M)


def test_the_api_has_what_the_examples_of_own_parts_import() -> None:
    used = set()
    for example in python_examples("docs/extending.md"):
        for module, names in re.findall(r"^from (\S+) import (.+)$", example, re.M):
            used |= {f"{module}.{name.strip()}" for name in names.split(",") if module.split(".")[0] in OURS}
    assert len(used) >= 6
    assert used <= set(api())


@pytest.mark.parametrize("name", api())
def test_what_the_api_shows_is_there_and_has_a_docstring(name: str) -> None:
    assert pkgutil.resolve_name(name).__doc__
