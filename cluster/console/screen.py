"""`understudy status` and `understudy tail` for eyes: one screen of a campaign, and trajectories in colour."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.console.progress import duration
from cluster.records.event_table import describe, row_of
from cluster.records.metric_table import listed

COLOURS = {"good": "green", "warn": "yellow", "bad": "red", "": "cyan"}
LIVE_TONES = {"running": "good", "lost": "bad", "starting": ""}
"""States of a campaign that no event of the same name announces."""
LOG_RATIO_COLOURS = ((2.0, "bold white on red3"), (0.7, "red"), (0.2, "yellow"))
"""log pi - log q of a token is at least so much -> how it is shown: the student is surer of it than its teacher."""


def status_screen(status: Mapping[str, Any]) -> RenderableType:
    """One screen of what `read_status` returned."""
    parts = [_head(status), _roles(status), _figures(status)]
    if status["news"]:
        lines = [f"{duration(event['wall_seconds']):>8}  {describe(event['kind'], event)}" for event in status["news"]]
        parts.append(Panel(Text("\n".join(lines)), title="news", title_align="left"))
    return Group(*parts)


def _head(status: Mapping[str, Any]) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    state = Text(status["state"], COLOURS[LIVE_TONES.get(status["state"], row_of(status["state"]).tone)])
    if status["cause"]:
        state.append(f" ({status['cause']})")
    if status["state"] == "lost" and status["seen_seconds_ago"] is not None:
        state.append(f" (last seen {duration(status['seen_seconds_ago'])} ago on {status['host']})")
    line.add_row(
        Text(status["name"], "bold"),
        state,
        ProgressBar(total=status["updates"], completed=status["update"], width=24),
        f"update {status['update']:,}/{status['updates']:,}",
        duration(status["wall_seconds"]) if status["wall_seconds"] else "",
        f"about {duration(status['seconds_left'])} left" if status["seconds_left"] else "",
    )
    return line


def _roles(status: Mapping[str, Any]) -> RenderableType:
    table = Table(
        "role", "actors", "restarts", "weights", "doing", "busy", box=None, padding=(0, 3), header_style="dim"
    )
    actors = status["actors"]
    for role, doing in (status["roles"] or dict.fromkeys(status.get("utilisation", {}), "")).items():
        mine = [actor for actor in actors if actor["name"].split(".")[0].split("-")[0] == role]
        alive = sum(actor["alive"] for actor in mine)
        there = Text(f"{alive}/{len(mine)}" if mine else "-", "red" if alive < len(mine) else "")
        busy = status.get("utilisation", {}).get(role)
        restarts = str(sum(actor["restarts"] for actor in mine)) if mine else "-"
        versions = sorted({actor["version"] for actor in mine if actor.get("version") is not None})
        weights = "-" if not versions else f"{versions[0]:,}" + (f" to {versions[-1]:,}" if versions[1:] else "")
        table.add_row(role, there, restarts, weights, doing, "-" if busy is None else f"{busy:.0%}")
    rates = (
        f"{status['trajectories_per_second']:,.1f} trajectories/s, {status['tokens_per_second']:,.0f} tokens/s"
        if "tokens_per_second" in status
        else ""
    )
    return Group(table, Text("; ".join(part for part in (status.get("bottleneck", ""), rates) if part), "bold"))


def _figures(status: Mapping[str, Any]) -> RenderableType:
    metrics, evaluation = status["metrics"], status["evaluation"]
    rows = {
        "training": listed("training", metrics),
        "evaluation": f"update {evaluation['step']:,}   {listed('evaluation', evaluation)}" if evaluation else "",
        "staleness": listed("staleness", metrics),
        "weights": f"version {status['policy_version']:,}   {listed('weights', metrics)}",
        "ledger": "   ".join(f"{state} {count:,}" for state, count in status["ledger"].items()),
        "queues": "   ".join(f"{name} {depth:,}" for name, depth in status["queues"].items()),
        "checkpoint": str(status["checkpoints"].get("path", "none yet")),
        "faults": str(status["faults"]),
    }
    if status["accuracy_teacher"] is not None:
        rows["evaluation"] += f"   teacher {status['accuracy_teacher']:.1%}"
    table = Table.grid(padding=(0, 3))
    for name, text in rows.items():
        if text:
            table.add_row(Text(name, "dim"), text)
    return table


def trajectory_text(row: Mapping[str, Any]) -> RenderableType:
    """One trajectory: prompt, and its response with each token coloured by log pi - log q."""
    verdict = "right" if row.get("reward") else "wrong"
    head = Text.assemble(
        (f"update {row['step']}  {row['id']}  ", "dim"),
        (verdict, "green" if row.get("reward") else "red"),
        (f"  {row['finish_reason']}  expected {row['reference']}" if row.get("reference") is not None else "", "dim"),
    )
    response = Text()
    for token, student, teacher in zip(row["tokens"], row["student_logprobs"], row["teacher_logprobs"], strict=True):
        response.append(str(token), _colour(student, teacher))
    return Group(head, Text(str(row["prompt"]), "dim"), response, Text(""))


def _colour(student: float | None, teacher: float | None) -> str:
    if student is None or teacher is None:
        return "dim"  # masked: the teacher has no score for it
    return next((style for limit, style in LOG_RATIO_COLOURS if student - teacher >= limit), "")
