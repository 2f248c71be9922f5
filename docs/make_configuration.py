"""Writes docs/configuration.md from the dataclasses: every key with its default, its range and its meaning.

python docs/make_configuration.py [--check]
"""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.config import CampaignConfig  # noqa: E402

TARGET = ROOT / "docs" / "configuration.md"


def meanings(cls: type) -> dict[str, str]:
    """Field -> the string below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        item.target.id: " ".join(after.value.value.split())  # type: ignore[union-attr, attr-defined]
        for item, after in itertools.pairwise(body)
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


def type_name(hint: Any) -> str:
    """The name of a type in YAML's terms."""
    if get_origin(hint) is None:
        return getattr(hint, "__name__", str(hint))
    arguments = get_args(hint)
    if str(get_origin(hint)).endswith("Literal"):
        return " or ".join(f"`{a}`" for a in arguments)
    if get_origin(hint) in (list, dict):
        return f"{get_origin(hint).__name__} of {type_name(arguments[-1])}"
    return " or ".join("null" if a is type(None) else type_name(a) for a in arguments)


def section(cls: type, prefix: str) -> list[str]:
    """The tables of a dataclass and of the dataclasses nested in it."""
    hints, texts = get_type_hints(cls), meanings(cls)
    rows, nested = [], []
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        inner = [a for a in (hint, *get_args(hint)) if dataclasses.is_dataclass(a)]
        key = f"{prefix}{item.name}"
        if inner:
            many = get_origin(hint) is dict
            nested.append((inner[0], f"{key}.<name>." if many else f"{key}."))
            if item.name not in texts:
                continue
        default = item.default if item.default is not dataclasses.MISSING else None
        if item.default_factory is not dataclasses.MISSING:
            default = "" if inner else item.default_factory()
        limits = [
            f"{sign} {item.metadata[name]:g}"
            for name, sign in (("minimum", "≥"), ("above", ">"), ("maximum", "≤"))
            if item.metadata.get(name) is not None
        ]
        shown = (
            "**required**"
            if default == "???"
            else ""
            if default == ""
            else f"`{'null' if default is None else default}`"
        )
        rows.append(f"| `{key}` | {' '.join([type_name(hint), *limits])} | {shown} | {texts.get(item.name, '')} |")
    title = prefix.rstrip(".") or "The campaign"
    lines = [f"## {title}", "", inspect.getdoc(cls) or "", ""]
    if rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    for inner_class, inner_prefix in nested:
        lines += section(inner_class, inner_prefix)
    return lines


def main() -> int:
    """Writes the page, or with --check compares it with the dataclasses."""
    text = "\n".join(
        [
            "# Configuration",
            "",
            "Generated from the dataclasses by `python docs/make_configuration.py`; do not edit. Set a key in YAML, or as",
            "`key=value` on the command line.",
            "",
            *section(CampaignConfig, ""),
        ]
    )
    if "--check" in sys.argv:
        return 0 if TARGET.read_text("utf-8") == text else 1
    TARGET.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
