"""Prints the sizes that we keep in view: a file that has grown well past them is a question to ask, not a failure."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Lines by floor, the largest files and functions, exception handlers, annotated arguments, configuration keys."""
    files = {
        path: path.read_text("utf-8")
        for floor in ("actors", "learner", "cluster")
        for path in (ROOT / floor).rglob("*.py")
    }
    functions, handlers, arguments, annotated, fields = [], 0, 0, 0, 0
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(((node.end_lineno or 0) - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.name}"))
                given = [a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
                arguments += len(given)
                annotated += sum(a.annotation is not None for a in given)
            handlers += isinstance(node, ast.ExceptHandler)
            if isinstance(node, ast.ClassDef) and path.name == "config.py":
                fields += sum(isinstance(item, ast.AnnAssign) for item in node.body)
    lines = {path: text.count("\n") for path, text in files.items()}
    total = sum(lines.values())
    by_floor = {
        f: sum(n for p, n in lines.items() if p.relative_to(ROOT).parts[0] == f)
        for f in ("actors", "learner", "cluster")
    }
    print(f"lines {total}: " + ", ".join(f"{floor} {count}" for floor, count in by_floor.items()))
    print(
        "largest files: "
        + ", ".join(f"{p.relative_to(ROOT)} {n}" for p, n in sorted(lines.items(), key=lambda x: -x[1])[:5])
    )
    print("largest functions: " + ", ".join(f"{name} {n}" for n, name in sorted(functions, reverse=True)[:5]))
    print(f"functions above 50 lines: {sum(n > 50 for n, _ in functions) / len(functions):.1%}")
    print(
        f"except per 1,000 lines: {1000 * handlers / total:.1f}; arguments annotated: {annotated / arguments:.1%}; configuration keys: {fields}"
    )


if __name__ == "__main__":
    main()
