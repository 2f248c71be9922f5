"""The report's timeline: a lane for each actor over the wall clock, and a list of all events. Pure."""

import time
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from cluster.records.event_table import BEGINNINGS, ENDS, FAULTS, describe, row_of
from cluster.report.charts import seconds

MAX_LINES = 120
"""Most events without a tone, or with a good one, in the list; only the newest. All others are listed."""
MAX_LANES = 40
ALERT = ' <span class="alert" title="an alert was sent">alert</span>'


def timeline(
    name: str, events: Sequence[dict[str, Any]], wall_seconds: float, calls: Callable[[str], bool] | None = None
) -> str:
    """Lanes and list of one run's events. name: of the run, if the page shows several. calls: whether a kind sent an alert."""
    title = f"<h3>{escape(name)}</h3>" if name else ""
    if not events:
        return f"{title}<p class=none>No events were recorded.</p>"
    events = sorted(events, key=lambda event: event["wall_seconds"])
    whole = max(wall_seconds, events[-1]["wall_seconds"]) or 1.0
    return title + _lanes(events, whole) + _listing(events, not name, calls or (lambda kind: False))


def exports(rows: Sequence[dict[str, Any]]) -> str:
    """What `understudy export` has written; "" where it has not."""
    lines = "".join(
        f"<tr><td>{time.strftime('%Y-%m-%d %H:%M', time.localtime(row.get('time') or 0))}</td>"
        f"<td>update {row['step']}</td><td><code>{escape(str(row.get('out', '')))}</code> {escape(str(row.get('dtype', '')))}</td></tr>"
        for row in rows
        if row.get("step") is not None
    )
    return f'<details open><summary>Exports</summary><table class="events">{lines}</table></details>' if lines else ""


def lives(events: Sequence[dict[str, Any]], whole: float) -> dict[str, list[tuple[float, float]]]:
    """Actor -> spans (start, end) of wall-clock seconds in which it was alive."""
    spans: dict[str, list[tuple[float, float]]] = {}
    since: dict[str, float] = {}
    before = 0.0

    def end(actor: str, at: float) -> None:
        if actor in since:
            spans[actor].append((since.pop(actor), at))

    for event in events:
        now, actor = event["wall_seconds"], str(event.get("actor", ""))
        if event["kind"] in ("actor_started", "actor_restarted") and actor:
            spans.setdefault(actor, [])
            since.setdefault(actor, now)
        elif event["kind"] in (*FAULTS, "actor_ended"):
            end(actor, now)
        elif event["kind"] in (*BEGINNINGS, *ENDS):
            for open_actor in list(
                since
            ):  # a new beginning without an end: the process was killed, and its actors with it
                end(open_actor, before if event["kind"] in BEGINNINGS else now)
        before = now
    for actor in list(since):
        end(actor, whole)
    return spans


def _lanes(events: Sequence[dict[str, Any]], whole: float) -> str:
    def place(at: float) -> str:
        return f"left:{100 * at / whole:.2f}%"

    rows = []
    campaign = "".join(
        f'<i class="mark {row_of(event["kind"]).tone}" style="{place(event["wall_seconds"])}" title="{_tooltip(event)}"></i>'
        for event in events
        if not event["kind"].startswith("actor_")
    )
    rows.append(f"<div><span>campaign</span><div>{campaign}</div></div>")
    spans = lives(events, whole)
    for actor, lived in list(spans.items())[:MAX_LANES]:
        bars = "".join(f'<b style="{place(a)};width:{max(100 * (b - a) / whole, 0.2):.2f}%"></b>' for a, b in lived)
        marks = "".join(
            f'<i class="mark {row_of(event["kind"]).tone}{" line" * (event["kind"] == "scaled")}" '
            f'style="{place(event["wall_seconds"])}" title="{_tooltip(event)}"></i>'
            for event in events
            if (event["kind"] in (*FAULTS, "scaling_failed") and event.get("actor") == actor)
            or (event["kind"] == "scaled" and event.get("role") == actor.rpartition("-")[0])
        )
        rows.append(f"<div><span>{escape(actor)}</span><div>{bars}{marks}</div></div>")
    if len(spans) > MAX_LANES:
        rows.append(f"<div><span>… {len(spans) - MAX_LANES} more</span><div></div></div>")
    ends = "".join(f"<span>{seconds(whole * part / 4)}</span>" for part in range(5))
    return f'<div class="lanes">{"".join(rows)}<div class="clock"><span></span><div>{ends}</div></div></div>'


def _listing(events: Sequence[dict[str, Any]], opened: bool, calls: Callable[[str], bool]) -> str:
    ordinary = [event for event in events if row_of(event["kind"]).tone in ("", "good")]
    left_out = {id(event) for event in ordinary[: max(len(ordinary) - MAX_LINES, 0)]}
    rows = [
        f'<tr><td>{seconds(event["wall_seconds"])}</td><td><span class="kind {row_of(event["kind"]).tone}">'
        f"{escape(event['kind'].replace('_', ' '))}</span>{ALERT * calls(event['kind'])}</td><td>{_details(event)}</td></tr>"
        for event in events
        if id(event) not in left_out
    ]
    note = f"<p class=none>{len(left_out):,} earlier ones are in events.jsonl.</p>" if left_out else ""
    state = " open" if opened and len(rows) <= 14 else ""
    return f'<details{state}><summary>{len(events):,} events</summary>{note}<table class="events">{"".join(rows)}</table></details>'


def _details(event: dict[str, Any]) -> str:
    fields = {key: value for key, value in event.items() if key not in ("time", "wall_seconds", "kind", "cause")}
    listed = " ".join(f"<span>{escape(key)} <code>{escape(str(value))}</code></span>" for key, value in fields.items())
    return listed + (f"<p>{escape(str(event['cause']))}</p>" if event.get("cause") else "")


def _tooltip(event: dict[str, Any]) -> str:
    return escape(f"{seconds(event['wall_seconds'])}: {describe(event['kind'], event)}", quote=True)
