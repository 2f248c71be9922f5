"""The charts of a report, drawn from the lines of metrics.jsonl and the rows of metric_table.py."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, NamedTuple

from cluster.records.event_table import Event, describe, row_of
from cluster.records.metric_table import METRICS, SECTIONS, Metric
from cluster.records.reader import BUSY, tokens_so_far
from cluster.records.rewards import is_graded
from cluster.report.charts import (
    PALETTE_SIZE,
    Mark,
    Series,
    byte_count,
    compact,
    line_chart,
    percent,
    seconds,
    stacked_bars,
)

Rows = Sequence[dict[str, Any]]
"""The lines of one run's metrics.jsonl."""


@dataclass(frozen=True)
class Figure:
    """One chart of the page. The first key is drawn solid; others are faint, or dashed for held-out prompts."""

    title: str
    note: str
    keys: tuple[tuple[str, str], ...]
    """(key of metrics.jsonl, name of the line)."""
    form: Callable[[float], str] = compact
    limits: tuple[float | None, float | None] = (None, None)


def figures_of(section: str) -> list[Figure]:
    """The charts of a section, from the rows of METRICS that name one; histograms are drawn by `histogram_figure`."""
    charts: dict[str, list[str]] = {}
    for key, metric in METRICS.items():
        if metric.section == section and metric.chart and metric.form != "histogram":
            charts.setdefault(metric.chart, []).append(key)
    return [_figure(title, keys) for title, keys in charts.items()]


def _figure(title: str, keys: Sequence[str]) -> Figure:
    """The first metric gives the caption, the format and the limits."""
    first = METRICS[keys[0]]
    lines = tuple((key, METRICS[key].line or METRICS[key].chart.lower()) for key in keys)
    return Figure(title, _caption(first), lines, FORMS[first.form], first.limits)


def _caption(metric: Metric) -> str:
    unit = f" ({metric.unit})" if metric.unit.startswith("nats") else ""  # elsewhere the meaning names what is counted
    return escape(metric.meaning.replace("`", "") + unit)


FORMS = {"number": compact, "percent": percent, "seconds": seconds, "bytes": byte_count}
HERO_TITLES = ("Accuracy on held-out prompts", "Reverse KL to the teacher")
"""The two large charts at the top of the page. The others follow by section."""
FIGURES = {section: figures_of(section) for section in SECTIONS}
HERO = tuple(figure for title in HERO_TITLES for own in FIGURES.values() for figure in own if figure.title == title)
GROUPS = {section: [figure for figure in own if figure not in HERO] for section, own in FIGURES.items()}
ACROSS = {"updates": "step", "tokens": "tokens_generated", "time": "wall_seconds"}
"""What the two large charts can be drawn against."""


def read_series(figure: Figure, runs: Sequence[tuple[str, Rows]], across: str = "step") -> list[Series]:
    """A line for each run and key. The colour is the run's; the look (solid, faint, dashed) is the key's."""
    series = []
    for run, (name, rows) in enumerate(runs):
        for number, (key, label) in enumerate(figure.keys):
            held_out = key.startswith("eval/")
            there = [row for row in rows if key in row and _place(row, across) is not None]
            points = [(_place(row, across), row[key]) for row in there]
            series.append(
                Series(
                    label if len(runs) == 1 else name if len(figure.keys) == 1 else f"{name}, {label}",
                    [float(place) for place, _ in points if place is not None],
                    [value for _, value in points],
                    colour=run % PALETTE_SIZE,
                    dashed=number > 0 and held_out,
                    faint=number > 0,
                    dots=held_out and len(points) <= 60,
                    low=_band(there, key, "low"),
                    high=_band(there, key, "high"),
                )
            )
    return [one for one in series if one.values]


def _band(rows: Rows, key: str, bound: str) -> list[Any]:
    """The bounds of an interval at each point; [] where no row has one, and the value itself where this one has none."""
    there = any(row.get(f"{key}:{bound}") is not None for row in rows)
    return [row[key] if row.get(f"{key}:{bound}") is None else row[f"{key}:{bound}"] for row in rows] if there else []


@dataclass(frozen=True)
class Past:
    """What has changed the course of a run: guards' actions, changed settings, the metrics of undone updates. Empty for
    several runs."""

    events: Sequence[dict[str, Any]] = ()
    undone: Rows = ()
    exports: Rows = ()

    def marks(self, figure: Figure, across: str = "step") -> list[Mark]:
        """The marks of a chart: every action, change and export, but warnings only on charts of their metric."""
        keys = [key for key, _ in figure.keys]
        exported = [
            Mark(
                row["step"],
                "exported",
                "good",
                f"the checkpoint of update {row['step']} was exported to {row.get('out')}",
            )
            for row in self.exports
            if across == "step" and row.get("step") is not None
        ]
        return exported + [
            Mark(float(event[across]), row.label, row.tone, _told(event, row))
            for event in self.events
            if ((row := row_of(event["kind"])).guard_action or row.marked) and event.get(across) is not None
            if row.guard_action != "warn" or event.get("metric") in keys
        ]

    def series(self, figure: Figure) -> list[Series]:
        """The lines of undone updates; each rollback begins a new line."""
        parts: list[list[dict[str, Any]]] = []
        for row in self.undone:
            if not parts or row["step"] <= parts[-1][-1]["step"]:
                parts.append([])
            parts[-1].append(row)
        return [one for part in parts for one in read_series(figure, [("", part)])]


def hero_figures(runs: Sequence[tuple[str, Rows]], teachers: Iterable[float], past: Past) -> str:
    """Accuracy and reverse KL, each against updates, tokens and time. The page shows one of the three at a time."""
    graded = any(is_graded(row) for _, rows in runs for row in rows)
    parts = []
    for figure in (_of_rewards(HERO[0]) if graded else HERO[0], *HERO[1:]):
        if not read_series(figure, runs):
            continue
        references = [("teacher", mean) for mean in teachers] if figure.keys == HERO[0].keys else []
        charts = []
        for name, key in ACROSS.items():
            chart = line_chart(
                read_series(figure, runs, key),
                label=f"{figure.title} against {name}",
                y_format=figure.form,
                y_limits=figure.limits,
                references=references,
                marks=past.marks(figure, key),
                undone=past.series(figure) if key == "step" else (),
                x_name={"updates": "update", "tokens": "tokens", "time": "at"}[name],
                x_format=seconds if key == "wall_seconds" else compact,
                size=(500, 250),
                end_labels=len(runs) == 1,
            )
            hidden = "" if name == "updates" else " hidden"
            charts.append(f'<div data-across="{name}"{hidden}>{chart}</div>')
        parts.append(frame(_explained(figure, runs), "".join(charts), ""))
    return "".join(parts)


def _of_rewards(figure: Figure) -> Figure:
    """The chart of accuracies, where they are means of graded rewards."""
    note = "mean reward of the student's answers, with its most likely tokens, to the held-out prompts with a reference answer"
    return replace(figure, title="Mean reward on held-out prompts", note=note, form=compact, limits=(0, None))


def small_figures(figures: Sequence[Figure], runs: Sequence[tuple[str, Rows]], past: Past) -> tuple[str, str]:
    """(charts, list of metrics that never changed): a flat line is given as a number instead."""
    drawn, steady = [], []
    for figure in figures:
        series = read_series(figure, runs)
        if not series:
            continue
        if all(_constant(one.values) for one in series) and len({figure.form(one.values[0]) for one in series}) == 1:
            steady.append(f"<div><dt>{figure.title}</dt><dd>{escape(figure.form(series[0].values[-1]))}</dd></div>")
            continue
        chart = line_chart(
            series,
            label=figure.title,
            y_format=figure.form,
            y_limits=figure.limits,
            marks=past.marks(figure),
            undone=past.series(figure),
        )
        latest = "".join(
            f'<span class="key {one.look}">{escape(one.label)} <b>{escape(figure.form(one.values[-1]))}</b></span>'
            if len(series) > 1
            else f"<b>{escape(figure.form(one.values[-1]))}</b>"
            for one in series
        )
        drawn.append(frame(_explained(figure, runs), chart, latest if len(runs) == 1 else ""))
    return "".join(drawn), "".join(steady)


def _told(event: dict[str, Any], row: Event) -> str:
    return f"{event.get('guard')}: {event.get('cause')}" if row.guard_action else describe(event["kind"], event)


class Histogram(NamedTuple):
    """How a metric whose value is a list of counts is drawn."""

    at: Callable[[int], float]
    """The x of the bar of each place in the list."""
    unit: str


HISTOGRAMS = {
    # The bins of learner/metrics.py, which is not imported here because it imports torch.
    "log_ratio_histogram": Histogram(lambda place: (place - 8) / 2, "nats"),
    "staleness_histogram": Histogram(float, "versions behind"),
}


def histogram_figure(key: str, name: str, rows: Rows) -> str:
    """The counts of the last tenth of the updates, summed; "" for a single bar."""
    histogram, metric = HISTOGRAMS[key], METRICS[key]
    counted = [row[key] for row in rows if row.get(key)]
    last = counted[-max(1, len(counted) // 10) :]
    if not last or len(last[-1]) < 2:
        return ""
    sums = [float(sum(column)) for column in zip(*last, strict=True)]
    chart = stacked_bars(
        [histogram.unit],
        [histogram.at(place) for place in range(len(sums))],
        [[count] for count in sums],
        label=metric.chart,
        y_format=compact,
        x_name=histogram.unit,
    )
    note = f"{_caption(metric)}; sum over the last tenth of the updates"
    return frame(Figure(metric.chart, f"{escape(name)}: {note}" if name else note, ()), chart, "")


def busy_figure(name: str, rows: Rows) -> str:
    """Stacked bars: seconds that the actors of each role worked for each update."""
    rows = [row for row in rows if all(row.get(key) is not None for key in BUSY.values())]
    if not rows:
        return ""
    chart = stacked_bars(
        list(BUSY),
        [row["step"] for row in rows],
        [[row[key] for key in BUSY.values()] for row in rows],
        label="Busy seconds of each role, by update",
        y_format=seconds,
    )
    note = f"{escape(name) or 'all actors'}, by update, evaluations included"
    keys = "".join(f'<span class="key r{i}">{role}</span>' for i, role in enumerate(BUSY))
    return frame(Figure("Busy seconds", note, ()), chart, keys)


def _explained(figure: Figure, runs: Sequence[tuple[str, Rows]]) -> Figure:
    """With a note on the second line's look: with several runs, colours stand for runs."""
    if len(runs) == 1 or len(figure.keys) == 1:
        return figure
    look = "dashed" if figure.keys[1][0].startswith("eval/") else "faint"
    return replace(figure, note=f"{figure.note}; {look}: {figure.keys[1][1]}")


def frame(figure: Figure, chart: str, latest: str) -> str:
    """A chart with its caption. latest: HTML beside the title."""
    head = f"<figcaption><h3>{figure.title}</h3><p>{figure.note}</p><div class=latest>{latest}</div></figcaption>"
    return f"<figure>{head}{chart}</figure>"


def _place(row: dict[str, Any], across: str) -> float | None:
    """The x of a row."""
    return tokens_so_far(row) if across == "tokens_generated" else row.get(across)


def _constant(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-4 * max(map(abs, values))
