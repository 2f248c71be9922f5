"""Seeded mutations of texts, values and files, for tests that ask only that nothing breaks."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXTS = (
    *(
        "",
        " ",
        "null",
        "~",
        "yes",
        "on",
        "-0",
        "0x10",
        "1_000",
        "1e400",
        "1:30",
        "2026-01-01",
        ".inf",
        "=",
        "<<",
        "???",
    ),
    *(
        "../../up",
        "/",
        "/etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        ".",
        "a" * 5000,
        "a/" * 60,
        "~root/x",
        "C:\\x",
        "a\\\nb",
    ),
    *(
        "${seed}",
        "${oc.env:HOME}",
        "${",
        "${a.b}",
        "${..}",
        "${oc.decode:1}",
        "${name}",
        "$" * 9,
        "!!python/object:os.x",
    ),
    *(
        "é\u2028\x85",
        "\x00",
        "\x1b[2J\x07",
        "日本語",
        "\ud800",
        "\u202e",
        "%s",
        "{0}",
        "{prompt",
        "<script>",
        "'\"`",
        "\r\n\t",
    ),
)
NUMBERS = (0, -1, 1, 2, 10**6, 10**18, 2**63, 10**400, -(10**400), 0.1, 1e-320, 1e308, float("nan"), float("inf"), -0.0)


def value(draw: random.Random, depth: int = 2) -> Any:
    """A value of any type."""
    match draw.randrange(8 if depth else 5):
        case 0 | 1:
            return draw.choice(TEXTS)
        case 2 | 3:
            return draw.choice(NUMBERS)
        case 4:
            return draw.choice([None, True, False])
        case 5:
            return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
        case 6:
            return {
                draw.choice([*TEXTS[:20], "model", 1, None]): value(draw, depth - 1) for _ in range(draw.randrange(4))
            }
        case _:
            deep: Any = 1
            for _ in range(draw.choice([3, 30, 90])):
                deep = [deep] if draw.random() < 0.5 else {"a": deep}
            return deep


def paths(node: Any, above: tuple = ()) -> Iterator[tuple]:
    """The path of every node below this one."""
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*above, key)
        yield from paths(inner, (*above, key))


def changed(draw: random.Random, content: Any, places: list[tuple]) -> Any:
    """A copy in which one of the places has another value, another name, or is gone."""
    content = copy.deepcopy(content)
    *above, last = draw.choice(places)
    node = content
    for key in above:
        if isinstance(node, dict):
            node = node.setdefault(key, {})
    if not isinstance(node, dict):
        return content
    match draw.randrange(5):
        case 0:
            node.pop(last, None)
        case 1:
            node[draw.choice([*TEXTS, 0, None, f"{last}s"])] = node.pop(last, 1)
        case _:
            node[last] = value(draw)
    return content


def broken_text(draw: random.Random, text: str) -> str:
    """A text with a few characters more, fewer, or elsewhere."""
    at, more = draw.randrange(len(text) + 1), draw.randrange(12)
    lines = text.splitlines(keepends=True) or [""]
    row = draw.randrange(len(lines))
    match draw.randrange(7):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + text[at + more :]
        case 2:
            return "".join([*lines[:row], lines[row], *lines[row:]])
        case 3:
            return "".join(
                [*lines[:row], draw.choice(["\t", "  ", "- ", "&a ", "*a ", "? ", "<<: *a\n"]), *lines[row:]]
            )
        case 4:
            return (
                draw.choice(["\ufeff", "---\n", "%YAML 9\n", "&a {b: *a}\n", "[" * 3000, "{a: " * 300, "- " * 300])
                + text
            )
        case 5:
            return text.replace("\n", draw.choice(["\r\n", "\r", "\x85", " "]))
        case _:
            return text[:at] + draw.choice(TEXTS) + text[at:]


def broken_bytes(draw: random.Random, content: bytes) -> bytes:
    """The content with some bytes changed, removed or added."""
    at = draw.randrange(len(content) + 1)
    match draw.randrange(6):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at + draw.randrange(9) :]
        case 2:
            return content[:at] + bytes(draw.randrange(1, 400)) + content[at:]
        case 3:
            return b""
        case 4:
            return content + content
        case _:
            flipped = bytearray(content or b"x")
            for _ in range(draw.randrange(1, 5)):
                flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
            return bytes(flipped)


def damage(draw: random.Random, folder: Path) -> str:
    """Does to one file or directory below a folder what a full disk, an editor or a lost node may do. Returns what."""
    path = draw.choice(sorted(folder.rglob("*")))
    kind = draw.randrange(7)
    if path.is_dir() and not path.is_symlink():
        if kind < 4:
            shutil.rmtree(path)
            if kind == 0:
                path.write_text("a file")
            elif kind == 1:
                path.symlink_to(path)
        else:
            (path / "step_abc").mkdir(exist_ok=True)
            (path / "step_00000009").mkdir(exist_ok=True)
    elif kind == 0 or not path.is_file():
        path.unlink()
    elif kind == 1:
        path.unlink()
        path.mkdir()
    elif kind < 4 and path.suffix in (".json", ".jsonl", ".yaml"):
        path.write_text(_other_json(draw, path.read_text("utf-8", "replace")), "utf-8", "surrogatepass")
    else:
        path.write_bytes(broken_bytes(draw, path.read_bytes()))
    return f"{path.relative_to(folder)}, {kind}"


def _other_json(draw: random.Random, text: str) -> str:
    """Lines of JSON of which one has another value somewhere; or broken text."""
    lines = text.splitlines()
    whole = len(lines) < 2 or not lines[0].startswith("{") or not lines[0].endswith("}")
    row = draw.randrange(max(len(lines), 1))
    try:
        content = json.loads(text if whole else lines[row])
    except (ValueError, IndexError):
        return broken_text(draw, text)
    content = changed(draw, content, list(paths(content)) or [("a",)])
    made = json.dumps(content)
    return made if whole else "\n".join([*lines[:row], made, *lines[row + 1 :], ""])
