"""Prints the sizes that we keep in view. A large number is a question to ask in review, not a failure.

python benchmarks/sizes.py
"""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("actors", "learner", "cluster")
READING_ORDER = ("docs/architecture.md", "From a prompt to a gradient")
"""The page and the section whose numbered list names the modules on the way."""


@dataclass
class Sizes:
    """What is counted of a set of source files."""

    lines: dict[str, int] = field(default_factory=dict)
    """Path -> lines."""
    functions: dict[str, int] = field(default_factory=dict)
    """`path:name` -> lines, from `def` to the last statement."""
    comments: int = 0
    """Lines with a comment, by itself or behind code. Docstrings are not counted."""
    handlers: int = 0
    arguments: int = 0
    annotated: int = 0
    keys: int = 0
    """Fields of the dataclasses in files named config.py."""

    @property
    def total(self) -> int:
        """Lines of all files."""
        return sum(self.lines.values())

    def above(self, limit: int) -> float:
        """Share of the functions with more lines than this."""
        return sum(n > limit for n in self.functions.values()) / len(self.functions)


def measure(sources: Mapping[str, str]) -> Sizes:
    """Path -> text, counted."""
    sizes = Sizes()
    for path, text in sources.items():
        sizes.lines[path] = text.count("\n")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        sizes.comments += len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # Two functions of one name (methods of two classes) keep their line number apart.
                name = (
                    f"{path}:{node.name}" if f"{path}:{node.name}" not in sizes.functions else f"{path}:{node.lineno}"
                )
                sizes.functions[name] = (node.end_lineno or 0) - node.lineno + 1
                given = [a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
                sizes.arguments += len(given)
                sizes.annotated += sum(a.annotation is not None for a in given)
            sizes.handlers += isinstance(node, ast.ExceptHandler)
            if isinstance(node, ast.ClassDef) and path.endswith("/config.py"):
                sizes.keys += sum(isinstance(item, ast.AnnAssign) for item in node.body)
    return sizes


def reading_order() -> list[str]:
    """The modules from a prompt to a gradient, as docs/architecture.md lists them."""
    page, section = READING_ORDER
    text = (ROOT / page).read_text("utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", text, re.M)


def largest(counts: Mapping[str, int], shown: int = 5) -> str:
    """The largest of these, with their sizes."""
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items(), key=lambda item: -item[1])[:shown])


def report(sizes: Sizes, order: Sequence[str]) -> list[str]:
    """The lines that are printed."""
    by_floor: Counter[str] = Counter()
    for path, n in sizes.lines.items():
        by_floor[path.partition("/")[0]] += n
    modules = Counter(path.rpartition("/")[0] for path in sizes.lines if not path.endswith("/__init__.py"))
    return [
        f"lines {sizes.total}: {largest(by_floor)}",
        f"modules {modules.total()} in {len(modules)} folders: {largest(modules, len(modules))}",
        f"longest files: {largest(sizes.lines)}",
        f"longest functions: {largest(sizes.functions)}",
        f"functions above 50 lines: {sizes.above(50):.1%}; above 60: {sizes.above(60):.1%}",
        f"lines with a comment: {sizes.comments / sizes.total:.1%}; "
        f"except per 1,000 lines: {1000 * sizes.handlers / sizes.total:.1f}; "
        f"arguments annotated: {sizes.annotated / sizes.arguments:.1%}; configuration keys: {sizes.keys}",
        f"from a prompt to a gradient: {len(order)} modules, {sum(sizes.lines.get(path, 0) for path in order):,} lines",
    ]


def main() -> None:
    """Measures the package."""
    files = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    sources = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in files}
    print("\n".join(report(measure(sources), reading_order())))


if __name__ == "__main__":
    main()
