"""Finds and parses the commands and code blocks of README, documentation and examples."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = (
    *("understudy", "python", "pytest", "make", "ray", "pip", "mkdocs", "docker", "kubectl", "sbatch", "git"),
    *("vllm", "hf", "nvidia-smi", "df", "prometheus"),
)
"""Text in backticks, or an indented line, is a command if it begins with one of these and has more words. Variables for one
command (`NAME=value`) may stand before it."""
VARIABLES = r"^(?:[A-Z_]+=\S+ )+"
PLACES = {
    "CONFIG": "configs/quickstart.yaml",
    "RUN_DIR": "RUN",
    "~/understudy-runs/quickstart": "RUN",
    "/tmp/walk/walk": "RUN",
    "runs/mine": "RUN",
    "mine.yaml": "MINE",
    "sft.yaml": "configs/quickstart.yaml",
    "opd.yaml": "configs/quickstart.yaml",
    "quickstart": "RUN",
    "URL": "http://127.0.0.1:8265",
    "…": "http://127.0.0.1:8265",
    "N": "8",
}
"""Words that stand for something of the reader's. `RUN` stands for a run directory, `MINE` for the YAML of the README."""


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Split as a shell does, without comments. The program is named as PATH would find it."""
        text = re.sub(r"\s*\[[A-Z_a-z=]+ …\]", "", re.sub(VARIABLES, "", self.text))  # what may be repeated
        words = [PLACES.get(word, word) for word in shlex.split(text, comments=True)]
        words = [re.sub(r"=[KN]$", "=1", word) for word in words]
        if words[:3] == ["python", "-m", "cluster"]:
            words[:3] = ["understudy"]
        return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def pages() -> list[Path]:
    """All pages of the documentation."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")]
    return sorted(found)


def commands() -> list[Command]:
    """Every command of every page, each once."""
    found = [
        Command(str(page.relative_to(ROOT)), text) for page in pages() for text in commands_of(page.read_text("utf-8"))
    ]
    return list(dict.fromkeys(found))


def commands_of(markdown: str) -> list[str]:
    """All lines of shell blocks; in other blocks, indented lines and backticks, the text that looks like a command."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", markdown, re.S | re.M):
        lines = block.replace("\\\n", " ").splitlines()
        if language in ("sh", "bash", "console", "shell"):
            found += [line.removeprefix("$ ") for line in lines if line.strip() and not line.startswith("#")]
        else:
            found += [line.strip().removeprefix("$ ") for line in lines if _looks_like_one(line.strip())]
    rest = re.sub(r"^```.*?^```", "", markdown, flags=re.S | re.M)
    found += [line.strip() for line in re.findall(r"^ {4}(.+)$", rest, re.M) if _looks_like_one(line.strip())]
    found += [span for span in re.findall(r"`([^`\n]+)`", rest) if _looks_like_one(span)]
    return found


def _looks_like_one(text: str) -> bool:
    program, _, others = re.sub(VARIABLES, "", text.removeprefix("$ ")).removeprefix(".venv/bin/").partition(" ")
    return program in PROGRAMS and bool(others)


def python_examples(page: str, section: str | None = None) -> list[str]:
    """`examples_in("python", page, section)`."""
    return examples_in("python", page, section)


def examples_in(language: str, page: str, section: str | None = None) -> list[str]:
    """The blocks in this language of a page (a path below the root), in order; of one section (`## ...`) if given."""
    text = (ROOT / page).read_text("utf-8")
    if section is not None:
        found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
        assert found, f"{page} has no section {section!r}"
        text = found[1]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)
