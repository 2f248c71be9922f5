"""What a part has found, written line by line as it is found: what a part knew when it was killed is not lost.

Lines of JSON, one of: {"figure": name, "value": v, "unit": u, "target": ">= 0.35"}, {"check": name, "error": e, "limit": l},
{"note": text}, {"machine": {...}}, {"verdict": v, "reason": text}. A missed target is reported and is no error; a check beyond
its limit makes the part wrong.
"""

import json
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERDICTS = ("ok", "wrong", "failed", "out of memory", "too late", "not run")


class Report:
    """Writes the lines of one part."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._wrong: list[str] = []

    def figure(self, name: str, value: float | str | None, unit: str = "", *, target: str = "") -> None:
        """A measured value. target: what it should be, ">= 0.35" or "<= 1.5"; None: unknown here."""
        self._write(figure=name, value=value, unit=unit, target=target)

    def check(self, name: str, error: float, limit: float) -> None:
        """A deviation from what is known to be right, without unit. Beyond the limit, or NaN, the part is wrong."""
        self._write(check=name, error=error, limit=limit)
        if not error <= limit:  # NaN is not
            self._wrong.append(f"{name}: {error:.3g}, limit {limit:.3g}")

    def holds(self, name: str, value: bool, otherwise: str = "") -> None:
        """A condition; `check` with an error of 0 or 1. otherwise: what the matter is where it does not hold."""
        self._write(check=name, error=0.0 if value else 1.0, limit=0.0)
        if not value:
            self._wrong.append(f"{name}{': ' * bool(otherwise)}{otherwise}")

    def note(self, text: str) -> None:
        """A line for the reader."""
        self._write(note=text)

    def machine(self, facts: dict[str, Any]) -> None:
        """What the part ran on."""
        self._write(machine=facts)

    def run(self, part: Callable[["Report"], None]) -> None:
        """Runs the part and writes its verdict, whatever happens."""
        try:
            part(self)
        except Exception as error:
            traceback.print_exc()
            full = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
            text = " ".join(str(error).split())[:300]
            before = "".join(f"; before that {wrong}" for wrong in self._wrong)
            self._write(verdict="out of memory" if full else "failed", reason=f"{type(error).__name__}: {text}{before}")
        else:
            self._write(verdict="wrong" if self._wrong else "ok", reason="; ".join(self._wrong))

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


@dataclass
class Found:
    """One part as the report shows it."""

    part: str
    verdict: str = "not run"
    reason: str = ""
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, part: str, path: Path, seconds: float, otherwise: tuple[str, str]) -> "Found":
        """What the part has written. otherwise: (verdict, reason) where it has written none."""
        found = cls(part, *otherwise, seconds=round(seconds, 1))
        for text in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:  # the part was killed while it wrote
                continue
            if "figure" in line:
                found.figures.append(line)
            elif "check" in line:
                found.checks.append(line)
            elif "note" in line:
                found.notes.append(line["note"])
            elif "machine" in line:
                found.machine = line["machine"]
            else:
                found.verdict, found.reason = line["verdict"], line["reason"]
        return found


def missed(figure: dict[str, Any]) -> bool:
    """Whether a figure has a target and is beyond it."""
    if not figure["target"] or not isinstance(figure["value"], int | float):
        return False
    sign, _, bound = figure["target"].partition(" ")
    return figure["value"] < float(bound) if sign == ">=" else figure["value"] > float(bound)


def shown(value: Any) -> str:
    """A value with four digits."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict_table(parts: list[Found]) -> str:
    """Markdown: one row for each part."""
    rows = [f"| {p.part} | {p.verdict} | {shown(p.seconds)} | {p.reason.replace('|', '/')} |" for p in parts]
    return "\n".join(["| part | verdict | seconds | why |", "|---|---|---|---|", *rows])


def figure_table(parts: list[Found]) -> str:
    """Markdown: one row for each figure."""
    rows = [
        f"| {p.part} | {f['figure']} | {shown(f['value'])} {f['unit']} |"
        f" {f['target']}{' (missed)' if missed(f) else ''} |"
        for p in parts
        for f in p.figures
    ]
    return "\n".join(["| part | what | found | target |", "|---|---|---|---|", *rows])


def check_table(parts: list[Found]) -> str:
    """Markdown: one row for each comparison."""
    rows = [
        f"| {p.part} | {c['check']} | {shown(c['error'])} | {shown(c['limit'])} |{'' if c['error'] <= c['limit'] else ' **wrong**'}"
        for p in parts
        for c in p.checks
    ]
    return "\n".join(["| part | compared | error | limit |", "|---|---|---|---|", *rows])


def page(parts: list[Found], date: str) -> str:
    """Markdown for docs/benchmarks.md: machine, verdicts, figures, comparisons, notes."""
    machine = next((p.machine for p in parts if p.machine), {})
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    notes = "\n".join(f"- {p.part}: {note}" for p in parts for note in p.notes)
    tables = (verdict_table(parts), figure_table(parts), check_table(parts), notes)
    return f"`python -m benchmarks.gpu smoke`, {date}, {facts}.\n\n" + "\n\n".join(tables) + "\n"
