"""The report's section on evaluation sets: curves with the bands of their intervals, changes, and exposure bias."""

from collections.abc import Sequence
from html import escape

from cluster.records.metric_table import sets_of, with_change, with_interval
from cluster.records.rewards import is_graded, told_as
from cluster.report.charts import Series, compact, line_chart, percent
from cluster.report.figures import Figure, Past, Rows, frame, read_series

OF_REWARDS = ("accuracy", "majority")
"""Means of rewards: shares, or whatever graded rewards are."""
OTHER_CHARTS = (
    ("right answers", ("right",), percent, (0, 1)),
    ("reverse KL", ("reverse_kl", "reverse_kl_on_teacher_text"), compact, (0, None)),
    ("entropy", ("entropy",), compact, (0, None)),
)
NAMES = {
    "right": "right",
    "majority": "majority vote",
    "reverse_kl": "own text",
    "reverse_kl_on_teacher_text": "teacher's text",
    "entropy": "entropy",
}
SHOWN = (
    ("accuracy", ".1%"),
    ("right", ".1%"),
    ("majority", ".1%"),
    ("reverse_kl", ".4f"),
    ("entropy", ".3f"),
    ("response_length_mean", ".1f"),
)


def evaluation_sets(curves: Sequence[tuple[str, Rows]], past: Past) -> str:
    """The section, "" where no run has a set. curves: name and lines of metrics.jsonl of each run."""
    names = list(dict.fromkeys(name for _, rows in curves for row in rows for name in sets_of(row)))
    drawn = []
    for name in names:
        graded = any(is_graded(row, f"eval/{name}/") for _, rows in curves for row in rows)
        means = (told_as(graded).name, OF_REWARDS, compact if graded else percent, (0, None if graded else 1))
        labels = {**NAMES, "accuracy": told_as(graded).name}
        for title, keys, form, limits in (means, *OTHER_CHARTS):
            pairs = tuple((f"eval/{name}/{key}", labels[key]) for key in keys)
            figure = Figure(
                f"{escape(name)}: {title}", "with its 95% interval, clustered by prompt", pairs, form, limits
            )
            if series := read_series(figure, curves):
                chart = line_chart(
                    series, label=f"{name}: {title}", y_format=form, y_limits=limits, marks=past.marks(figure)
                )
                drawn.append(frame(figure, chart, ""))
        drawn += [exposure(name, run, rows) for run, rows in curves]
    table = changes(names, curves[0][1]) if names and len(curves) == 1 else ""
    return (
        f'<section><h2>Evaluation sets</h2>{table}<div class="grid">{"".join(drawn)}</div></section>' if names else ""
    )


def exposure(name: str, run: str, rows: Rows) -> str:
    """The last evaluation's reverse KL by position, on prefixes of the student and of the teacher; "" without one."""
    key = f"eval/{name}/exposure"
    last = next((row for row in reversed(rows) if row.get(f"{key}_position")), None)
    if last is None:
        return ""
    places = [float(place) for place in last[f"{key}_position"]]
    series = []
    for colour, (who, label) in enumerate((("own", "student's prefixes"), ("teacher", "teacher's prefixes"))):
        values, low, high = (last[f"{key}_{who}{end}"] for end in ("", ":low", ":high"))
        series.append(Series(label, places, values, colour=colour, dots=True, low=low, high=high))
    note = f"update {last['step']:,}; reverse KL (nats per token) by position in the response, with its 95% interval"
    figure = Figure(f"{escape(name)}: exposure bias", f"{escape(run)}: {note}" if run else note, ())
    chart = line_chart(
        series, label=f"{name}: exposure bias", y_format=compact, y_limits=(0, None), x_name="token", x_format=compact
    )
    keys = "".join(f'<span class="key c{one.colour}">{escape(one.label)}</span>' for one in series)
    return frame(figure, chart, keys)


def changes(names: Sequence[str], rows: Rows) -> str:
    """Table: each set before and after training, and the paired difference."""
    lines = []
    for name in names:
        own = [row for row in rows if name in sets_of(row)]
        told = told_as(any(is_graded(row, f"eval/{name}/") for row in own))
        for key, its in SHOWN:
            full, form = f"eval/{name}/{key}", told.form if key in OF_REWARDS else its
            if not own or full not in own[-1]:
                continue
            after = own[-1] if own[-1]["step"] else {}
            cells = [
                with_interval(own[0], full, form) if full in own[0] else "–",
                with_interval(after, full, form),
                with_change(after, full, form) or "–",
            ]
            label = told.name if key == "accuracy" else key.replace("_", " ")
            lines.append(
                f"<tr><th>{escape(name)}</th><td>{label}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
            )
    head = "".join(f"<th>{name}</th>" for name in ("Set", "", "Before", "After", "Change (95%, paired)"))
    return f'<div class="wide"><table class="result many"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
