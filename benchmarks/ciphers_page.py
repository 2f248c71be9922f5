"""The figures and tables of the ciphers, from what `python -m benchmarks.ciphers` has measured (docs/ciphers.json).

    python -m benchmarks.ciphers_page

writes docs/ciphers.svg and docs/ciphers-estimators.svg, and prints the tables of docs/compare.md and docs/objective.md.
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.ciphers import OUTPUT
from cluster.commands.courses import COSTS, Interval, equal_cost_table, interval
from cluster.records.writer import write_atomically

PALETTE = ("#0b6e4f", "#c1292e", "#e08e0b", "#3d5a98", "#8e4585", "#4a4a4a", "#159fb5", "#7a5c2e")
SAMPLED, TRAINED = "eval/accuracy_sampled", "tokens_trained_before"
CURVES = {"estimators": "Estimators", "trust_regions": "Trust regions"}
"""Part of the measurements -> title. A part that was not measured is left out."""
COVERED = {
    "right": ("right", "{:.1%}"),
    "ciphers": ("ciphers in use", "{:.2f}"),
    "best": ("right in the most likely one", "{:.1%}"),
    "mean": ("right in each of the eight", "{:.1%}"),
    "forward_kl": ("forward KL, nats an answer", "{:.2f}"),
}


class Panel(NamedTuple):
    """A place for curves: its box in pixels, and what the axes span (y from 0 to 1)."""

    left: float
    top: float
    width: float
    height: float
    longest: float

    def at(self, x: float, y: float) -> str:
        """Pixels of a point."""
        return f"{self.left + self.width * x / self.longest:.1f},{self.top + self.height * (1 - y):.1f}"


def text(x: float, y: float, words: str, size: int = 20, **look: str) -> str:
    """Words at a place; `look` are attributes of SVG."""
    attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in look.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{attributes}>{escape(words)}</text>'


def frame(panel: Panel, title: str, axis: str) -> str:
    """Title, grid, and the axes' numbers."""
    parts = [text(panel.left, panel.top - 22, title, 24, font_weight="600")]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        (x, y), end = (map(float, panel.at(0, tick).split(","))), panel.left + panel.width
        parts.append(f'<line x1="{x}" x2="{end}" y1="{y}" y2="{y}" stroke="#dddddd"/>')
        parts.append(text(x - 10, y + 7, f"{tick:.0%}", 18, text_anchor="end", fill="#555555"))
    step = 10 ** math.floor(math.log10(panel.longest))
    step = step / 2 if panel.longest / step < 2.5 else step
    for number in range(int(panel.longest / step + 1e-9) + 1):
        x = float(panel.at(number * step, 0).split(",")[0])
        words = f"{number * step / 1000:g}k" if number else "0"
        parts.append(text(x, panel.top + panel.height + 28, words, 18, text_anchor="middle", fill="#555555"))
    middle = panel.left + panel.width / 2
    parts.append(text(middle, panel.top + panel.height + 58, axis, 20, text_anchor="middle", fill="#333333"))
    return "".join(parts)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lower and upper end: of the 95% interval, or with fewer than three values their range."""
    mean, half = interval(values)
    return (mean, min(values), max(values)) if half is None or len(values) < 3 else (mean, mean - half, mean + half)


def curve(panel: Panel, courses: Sequence[Sequence[Mapping[str, Any]]], colour: str) -> tuple[str, float]:
    """Mean and band (see `spread`) over the seeds, and the last mean. courses: evaluations of each seed, at the same updates."""
    upper, lower, line, last = [], [], [], 0.0
    for rows in zip(*courses, strict=True):
        x = sum(row[TRAINED] for row in rows) / len(rows)
        last, low, high = spread([row[SAMPLED] for row in rows])
        line.append(panel.at(x, last))
        upper.append(panel.at(x, min(high, 1.0)))
        lower.append(panel.at(x, max(low, 0.0)))
    band = f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" opacity="0.18"/>'
    path = f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="3.5"/>'
    return band + path, last


def curves(panel: Panel, found: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> str:
    """A panel with one curve for each name, its name and last value beside its end."""
    parts, ends = [frame(panel, title, "trained tokens")], []
    for (name, courses), colour in zip(found.items(), itertools.cycle(PALETTE), strict=False):
        drawn, last = curve(panel, [one["rows"] for one in courses], colour)
        parts.append(drawn)
        ends.append((panel.top + panel.height * (1 - last), f"{name} {last:.0%}", colour))
    ends.sort()
    gap, above = 25.0, -math.inf
    for number, (at, words, colour) in enumerate(ends):
        above = max(above + gap, min(at, panel.top + panel.height - gap * (len(ends) - 1 - number)))
        parts.append(text(panel.left + panel.width + 12, above + 7, words, 20, fill=colour, font_weight="600"))
    return "".join(parts)


def used(left: float, top: float, width: float, row: float, found: Mapping[str, Any], teacher: float) -> str:
    """Bars: the ciphers that each method's student still writes."""
    parts = [text(left, top - 22, "Ciphers still in use", 24, font_weight="600")]
    for number, (name, colour) in enumerate([("teacher", "#999999"), *zip(found, PALETTE, strict=False)]):
        value = Interval(teacher, None) if name == "teacher" else over_seeds(found[name], "ciphers")
        y, scale = top + 20 + row * number, width / 8
        parts.append(text(left, y, name, 20, fill=colour, font_weight="600"))
        parts.append(
            f'<rect x="{left}" y="{y + 9:.1f}" width="{scale * value.mean:.1f}" height="20" fill="{colour}" opacity="0.8"/>'
        )
        parts.append(text(left + scale * value.mean + 10, y + 26, shown(value, "{:.1f}"), 19, fill="#333333"))
    return "".join(parts)


def over_seeds(courses: Sequence[Mapping[str, Any]], key: str) -> Interval:
    """A figure of the last students."""
    return interval([one["coverage"][key] for one in courses])


def shown(value: Interval, form: str) -> str:
    """97.7% ± 0.9%, or the value alone."""
    return form.format(value.mean) + ("" if value.half is None else f" ± {form.format(value.half)}")


def picture(width: int, height: int, parts: Sequence[str]) -> str:
    """An SVG file with its own background."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>\n"])


def longest(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """The trained tokens of the longest course."""
    return max(one["rows"][-1][TRAINED] for courses in found.values() for one in courses)


def talk(found: Mapping[str, Any]) -> str:
    """The figure for a talk: right answers against tokens, and the ciphers that are left."""
    methods = found["methods"]
    panel = Panel(90, 80, 640, 420, longest(methods))
    return picture(
        1330,
        600,
        [
            curves(panel, methods, "Sampled answers that are right"),
            used(980, 80, 210, 72, methods, found["models"]["teacher"]["ciphers"]),
        ],
    )


def theory(found: Mapping[str, Any]) -> str:
    """Every estimator, and every trust region."""
    parts = []
    there = [(key, title) for key, title in CURVES.items() if key in found]
    for number, (key, title) in enumerate(there):
        parts.append(curves(Panel(90 + 920 * number, 80, 430, 420, longest(found[key])), found[key], title))
    return picture(920 * len(there), 600, parts)


def cost_tables(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The tables of `understudy compare` at equal cost."""
    runs: Any = {
        name: [SimpleNamespace(name=name, metrics=one["rows"]) for one in courses] for name, courses in methods.items()
    }
    return [table for cost in COSTS if (table := equal_cost_table(runs, cost))]


def coverage_table(found: Mapping[str, Any]) -> str:
    """What the last students cover."""
    lines = ["| | " + " | ".join(name for name, _ in COVERED.values()) + " |", "|---" * (1 + len(COVERED)) + "|"]
    for name, model in found["models"].items():
        title = {"teacher": "the teacher", "student": "the student at the start"}[name]
        lines.append(f"| {title} | " + " | ".join(form.format(model[key]) for key, (_, form) in COVERED.items()) + " |")
    for name, courses in found["methods"].items():
        cells = [shown(over_seeds(courses, key), form) for key, (_, form) in COVERED.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def course_table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Right answers, sampled, at a quarter, at half and at the end of the courses, and the last reverse KL."""
    lines = ["| | at a quarter | at half | at the end | reverse KL at the end |", "|---" * 5 + "|"]
    for name, courses in found.items():
        count = len(courses[0]["rows"]) - 1
        values = [[one["rows"][row][SAMPLED] for one in courses] for row in (count // 4, count // 2, count)]
        cells = ["{:.1%} ({:.1%} to {:.1%})".format(*spread(own)) for own in values]
        last = [one["rows"][-1]["eval/reverse_kl"] for one in courses]
        cells.append("{:.3f} ({:.3f} to {:.3f})".format(*spread(last)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(found: Mapping[str, Any]) -> list[str]:
    """All tables, in the order of the pages."""
    return [
        *cost_tables(found["methods"]),
        coverage_table(found),
        *(course_table(found[key]) for key in CURVES if key in found),
    ]


def main() -> None:
    """Writes the figures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=OUTPUT)
    options = parser.parse_args()
    found = json.loads(options.input.read_text("utf-8"))
    write_atomically(options.input.with_suffix(".svg"), talk(found))
    if found.keys() & CURVES.keys():
        write_atomically(options.input.with_name("ciphers-estimators.svg"), theory(found))
    print("\n\n".join(tables(found)))


if __name__ == "__main__":
    main()
