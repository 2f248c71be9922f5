"""Checks options of vLLM's engine by its source: without importing vLLM, which takes ten seconds. Standard library only."""

import ast
import difflib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from actors.errors import UserError

PLAIN: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}
"""Types of options that are checked here. vLLM checks the others when the engine is built."""


def check_options(options: Mapping[str, Any], key: str) -> None:
    """UserError for the first option that vLLM does not have, or whose value has another type than vLLM says.

    key: of the options, for example "rollout.engine". Does nothing where vLLM is not installed.
    """
    known = _known_options() if options else {}
    for name, value in options.items() if known else ():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            expected = f"an option of vLLM's engine{f', {near[0]!r} perhaps' if near else ''}"
            raise UserError(f"{key}.{name}", "an option that does not exist", expected)
        kinds = known[name].split(" | ")
        # True is an int for Python, and no number of anything.
        fits = any(
            isinstance(value, PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool))
            for kind in kinds
            if kind in PLAIN
        )
        if set(kinds) <= PLAIN.keys() and not fits:
            raise UserError(f"{key}.{name}", repr(value), f"a value of the type {known[name]}")


@cache
def _known_options() -> dict[str, str]:
    """Name -> type, as text, of the fields of EngineArgs and the arguments of LLM; {} where they cannot be read."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return {}
    root = Path(next(iter(found.submodule_search_locations)))
    try:
        engine = _class(root / "engine" / "arg_utils.py", "EngineArgs")
        llm = _class(root / "entrypoints" / "llm.py", "LLM")
    except (OSError, SyntaxError, StopIteration):  # another release has them elsewhere
        return {}
    known: dict[str, str] = {}
    for node in llm.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.args[1:], *node.args.kwonlyargs]
            known |= {one.arg: ast.unparse(one.annotation) if one.annotation else "Any" for one in arguments}
    return known | {
        node.target.id: ast.unparse(node.annotation)
        for node in engine.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _class(path: Path, name: str) -> ast.ClassDef:
    body = ast.parse(path.read_text("utf-8")).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
