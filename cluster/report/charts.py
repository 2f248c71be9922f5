"""Line charts and stacked bars as inline SVG. Pure.

The charts are complete without a script, also in print; the page's script only reads `data-x` and `data-y` for the values
under the pointer. Colours are classes, c0 to c7, so the reader's browser decides between light and dark.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

PALETTE_SIZE = 8
MAX_POINTS = 200
"""A longer series is drawn as this many means, with a band from the lowest to the highest value of each part."""
MARK_ROWS = 3
CHARACTER_WIDTH = 6.4
"""At most, in pixels, of the small text at marks in any font of the style sheet."""


@dataclass(frozen=True)
class Series:
    """One line; None in `ys` is a gap. Example: Series("greedy", [0, 10], [0.1, 0.9], dots=True)."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int = 0
    dashed: bool = False
    faint: bool = False
    dots: bool = False
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()

    @property
    def look(self) -> str:
        """Its classes of the style sheet."""
        return f"c{self.colour}" + " dashed" * self.dashed + " faint" * self.faint

    @property
    def values(self) -> list[float]:
        """All values except gaps."""
        return [y for y in self.ys if y is not None]


class Mark(NamedTuple):
    """An event at `place` on the x axis. Example: Mark(31, "rolled back", "bad", "length is 80, …")."""

    place: float
    name: str
    tone: str
    text: str


@dataclass(frozen=True)
class Axis:
    """One axis of a chart: maps numbers from `low` to `high` to pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.stop - self.start) * ((value - low) / (high - low) if high > low else 0.5)

    def ticks(self, count: int) -> list[float]:
        """About `count` round numbers on the axis."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers][:: max(1, math.ceil(len(powers) / count))]
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def thinned(series: Series, limit: int = MAX_POINTS) -> Series:
    """The series with at most `limit` points: each is the mean of a part, with the part's extremes as `low` and `high`."""
    if len(series.xs) <= limit:
        return series
    bounds = [round(i * len(series.xs) / limit) for i in range(limit + 1)]
    parts = [[y for y in series.ys[a:b] if y is not None] for a, b in itertools.pairwise(bounds)]
    return replace(
        series,
        xs=[series.xs[b - 1] for b in bounds[1:]],
        ys=[sum(part) / len(part) if part else None for part in parts],
        low=[min(part, default=None) for part in parts],
        high=[max(part, default=None) for part in parts],
    )


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    y_format: Callable[[float], str],
    x_name: str = "update",
    x_format: Callable[[float], str] | None = None,
    references: Sequence[tuple[str, float]] = (),
    marks: Sequence[Mark] = (),
    undone: Sequence[Series] = (),
    y_limits: tuple[float | None, float | None] = (None, None),
    size: tuple[int, int] = (400, 190),
    end_labels: bool = False,
) -> str:
    """Lines over a common x axis.

    references: (name, y) of horizontal lines. marks: vertical lines. undone: series that are drawn behind the others and
    not shown under the pointer. y_limits: values that the y axis includes at least. end_labels: names at the lines' ends.
    """
    series = [thinned(one) for one in series if one.values]
    x_format = x_format or compact
    x, y = _axes([*series, *undone], references, y_limits, size, right=104 if end_labels else 10)
    parts = [_grid(x, y, x_format, y_format), _marks(marks, x, y)]
    parts += [_line(one, x, y).replace('class="', 'class="undone ') for one in undone if one.values]
    for name, value in references:
        parts.append(
            f'<line class="reference" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{y.at(value):.1f}" y2="{y.at(value):.1f}"/>'
        )
        if not end_labels:
            parts.append(
                f'<text class="reference" x="{x.stop:.1f}" y="{y.at(value) - 4:.1f}" text-anchor="end">{escape(name)}</text>'
            )
    for one in series:
        parts += [_line(one, x, y), _data(one.label, one.xs, one.ys, y_format, one.look)]
    if end_labels:
        ends = [(y.at(one.values[-1]), f"c{one.colour}", f"{one.label} {y_format(one.values[-1])}") for one in series]
        ends += [(y.at(value), "reference", f"{name} {y_format(value)}") for name, value in references]
        parts.append(_end_labels(ends, x.stop + 9, y))
    parts.append('<line class="cursor"/>')
    data = f'data-name="{x_name}" data-axis="{x.low:g} {x.high:g} {x.start:g} {x.stop:g}"'
    return _svg(size, label, data, parts)


def stacked_bars(
    labels: Sequence[str],
    xs: Sequence[float],
    columns: Sequence[Sequence[float]],
    *,
    label: str,
    y_format: Callable[[float], str],
    x_name: str = "update",
    size: tuple[int, int] = (400, 190),
    limit: int = 60,
) -> str:
    """Bars at `xs`; columns[i][j] is the part of bar i that belongs to labels[j]. More than `limit` bars are averaged."""
    share = max(1, math.ceil(len(xs) / limit))
    groups = [slice(i, i + share) for i in range(0, len(xs), share)]
    means = [[sum(part) / len(part) for part in zip(*columns[group], strict=True)] for group in groups]
    positions = [xs[group][-1] for group in groups]
    top = max((sum(column) for column in means), default=0) or 1
    x, y = _axes([Series("", positions, [top] * len(positions))], (), (0, top), size, right=10)
    pitch = (x.stop - x.start) / max(len(positions), 1)
    parts = [_grid(replace(x, start=x.start + pitch / 2, stop=x.stop - pitch / 2), y, compact, y_format)]
    for i, column in enumerate(means):
        base = y.at(0)
        for role, value in enumerate(column):
            tall = y.at(0) - y.at(value)
            base -= tall
            box = f'x="{x.start + i * pitch + pitch * 0.1:.1f}" y="{base:.1f}" width="{pitch * 0.8:.1f}" height="{tall:.1f}"'
            parts.append(f'<rect class="bar r{role}" {box}/>')
    for role, name in enumerate(labels):
        parts.append(_data(name, positions, [column[role] for column in means], y_format, f"r{role}"))
    parts.append('<line class="cursor"/>')
    axis = f"{x.low:g} {x.high:g} {x.start + pitch / 2:g} {x.stop - pitch / 2:g}"
    return _svg(size, label, f'data-name="{x_name}" data-axis="{axis}"', parts)


def compact(value: float) -> str:
    """About three digits: 0.0312, 12, 12.3k, 2.1M, 3e-8."""
    size = abs(value)
    for limit, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit * 0.9995:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[sign]:.3g}{sign}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def percent(value: float) -> str:
    """100%, 66.4%, 2.3%."""
    size = abs(value)
    return f"{100 * value:.{3 if 0.1 <= size < 0.9995 else 2 if size < 0.1 else 4}g}%"


def seconds(value: float) -> str:
    """45 ms, 1.25 s, 3.2 min, 5.1 h."""
    for limit, unit in ((3600, "h"), (60, "min")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value * 1000:.3g} ms" if 0 < abs(value) < 0.1 else f"{value:.3g} s"


def byte_count(value: float) -> str:
    """512 B, 447 kB, 16.4 GB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def _axes(
    series: Sequence[Series],
    references: Sequence[tuple[str, float]],
    y_limits: tuple[float | None, float | None],
    size: tuple[int, int],
    right: float,
) -> tuple[Axis, Axis]:
    """Axes that include everything. The y axis is logarithmic where a linear one would show peaks above a flat line:
    all values positive, and the largest above 30 times the median.
    """
    width, height = size
    xs = [x for one in series for x in one.xs] or [0.0, 1.0]
    ys = [y for one in series for y in (*one.values, *(v for v in (*one.low, *one.high) if v is not None))]
    ys += [value for _, value in references]
    left, last = min(xs), max(xs)
    left = 0.0 if 0 < left <= 0.1 * last else left
    x = Axis(left, last if last > left else left + 1, 46, width - right)
    positive = sorted(y for y in ys if y > 0)
    if y_limits == (None, None) and len(positive) == len(ys) > 4 and positive[-1] > 30 * positive[len(ys) // 2]:
        return x, Axis(positive[0] / 1.2, positive[-1] * 1.2, height - 24, 10, log=True)
    low, high = (pick([*ys, *(v for v in y_limits if v is not None)] or [0.0, 1.0]) for pick in (min, max))
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-30):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    step = _round_step((high - low) / 4)
    return x, Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, height - 24, 10)


def _grid(x: Axis, y: Axis, x_format: Callable[[float], str], y_format: Callable[[float], str]) -> str:
    parts = []
    for tick in y.ticks(4):
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text x="{x.start - 7:.1f}" y="{at + 3.5:.1f}" text-anchor="end">{escape(y_format(tick))}</text>'
        )
    for tick in x.ticks(6 if x.stop - x.start > 380 else 5):
        parts.append(
            f'<text x="{x.at(tick):.1f}" y="{y.start + 17:.1f}" text-anchor="middle">{escape(x_format(tick))}</text>'
        )
    return "".join(parts)


def _line(series: Series, x: Axis, y: Axis) -> str:
    """Band, line and dots of one series."""
    look = series.look
    points = [None if v is None else (x.at(u), y.at(v)) for u, v in zip(series.xs, series.ys, strict=True)]
    band = [
        (x.at(u), y.at(a), y.at(b))
        for u, a, b in zip(series.xs, series.low, series.high, strict=False)
        if a is not None and b is not None
    ]
    parts = []
    if band:
        outline = [f"{u:.1f},{b:.1f}" for u, _, b in band] + [f"{u:.1f},{a:.1f}" for u, a, _ in reversed(band)]
        parts.append(f'<polygon class="band c{series.colour}" points="{" ".join(outline)}"/>')
    path, pen = [], "M"
    for point in points:
        if point is not None:
            path.append(f"{pen}{point[0]:.1f},{point[1]:.1f}")
        pen = "M" if point is None else "L"
    parts.append(f'<path class="line {look}" d="{"".join(path)}"/>')
    if series.dots or len(series.values) == 1:
        parts += [f'<circle class="dot {look}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.6"/>' for p in points if p]
    return "".join(parts)


def _marks(marks: Sequence[Mark], x: Axis, y: Axis) -> str:
    """Lines with names, in up to MARK_ROWS rows. A name without room is left out: its line shows it under the pointer."""
    parts: list[str] = []
    taken: list[list[tuple[float, float]]] = [[] for _ in range(MARK_ROWS)]
    for mark in sorted(marks, key=lambda mark: mark.tone != "bad"):  # the gravest get their names first
        at = x.at(mark.place)
        forwards = at < (x.start + x.stop) / 2
        width = CHARACTER_WIDTH * len(mark.name)
        span = (at + 4, at + 4 + width) if forwards else (at - 4 - width, at - 4)
        row = next((row for row, others in enumerate(taken) if not any(_overlap(span, one) for one in others)), None)
        name = ""
        if row is not None:
            taken[row].append(span)
            place = f'x="{at + (4 if forwards else -4):.1f}" y="{y.stop + 8 + 12 * row:.1f}"'
            name = f'<text {place} text-anchor="{"start" if forwards else "end"}">{escape(mark.name)}</text>'
        line = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.stop:.1f}"/>'
        parts.append(f'<g class="mark {mark.tone}"><title>{escape(mark.text)}</title>{line}{name}</g>')
    return "".join(parts)


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _data(
    label: str, xs: Sequence[float], ys: Sequence[float | None], y_format: Callable[[float], str], look: str
) -> str:
    """Positions and formatted values, for the page's script."""
    texts = ";".join("" if value is None else y_format(value) for value in ys)
    places = ";".join(f"{value:.7g}" for value in xs)
    return f'<g class="data {look}" data-label="{escape(label)}" data-x="{places}" data-y="{escape(texts)}"/>'


def _end_labels(ends: Sequence[tuple[float, str, str]], left: float, y: Axis) -> str:
    """Names at the lines' ends, moved apart so that they do not overlap."""
    gap, parts, above = 14.0, [], -math.inf
    ordered = sorted(ends)
    lowest = y.start - gap * (len(ordered) - 1)
    for i, (at, look, text) in enumerate(ordered):
        above = max(above + gap, min(at, lowest + gap * i))
        parts.append(f'<text class="end {look}" x="{left:.1f}" y="{above + 4:.1f}">{escape(text)}</text>')
    return "".join(parts)


def _svg(size: tuple[int, int], label: str, data: str, parts: Sequence[str]) -> str:
    width, height = size
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" {data}>'
    return "".join([head, *parts, "</svg>"])


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `rough`."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
