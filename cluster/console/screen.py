"""What a person sees of a campaign: one screen for `run` and `status --watch`, plain lines without a terminal, the end in
a table, and trajectories in colour.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from actors.plain_text import concealed, printable
from cluster.console.status import StatusReader
from cluster.records.event_table import describe, row_of
from cluster.records.forms import verdict
from cluster.records.metric_table import METRICS, is_evaluation, listed, with_interval, written

COLOURS = {"good": "green", "warn": "yellow", "bad": "red", "": "cyan"}
LIVE_TONES = {"running": "good", "lost": "bad", "starting": "", "not begun": ""}
"""States of a campaign that no event of the same name announces."""
LOG_RATIO_COLOURS = ((2.0, "bold white on red3"), (0.7, "red"), (0.2, "yellow"))
"""Lower bound of log pi - log q -> style. Coloured tokens are those that the student prefers more than its teacher."""


class Progress:
    """What `run` shows while its campaign runs: the screen of `status --watch`, or plain lines without a terminal."""

    def __init__(
        self,
        run_dir: Path,
        console: Console | None = None,
        *,
        plain_every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ):
        """Without a terminal a line is printed every `plain_every_seconds`, and on each evaluation and the last update.

        began: time of the command by `clock`, from which the lines of events count; None: now.
        """
        self._every, self._clock, self._printed = plain_every_seconds, clock, float("-inf")
        self._console = console or Console(highlight=False)
        self._reader, self._lock, self._started = StatusReader(run_dir), threading.Lock(), clock()
        self._began = self._started if began is None else began
        self._seconds_before = self._reader.read({})["wall_seconds"] or 0.0
        """Wall-clock seconds of earlier processes of the campaign."""
        self.read_live: Callable[[], dict[str, Any]] = dict
        """Returns the content of status.json; the campaign sets it."""
        self._live: dict[str, Any] = {}
        """The last answer of `read_live`. rich's thread reads only this copy: the campaign's state keeps changing."""
        self.roles: dict[str, str] = {}
        """Role -> what it is doing."""
        self._screen: Live | None = None
        if self._console.is_terminal:
            self._screen = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._screen.start()

    def update(self, metrics: Mapping[str, Any], roles: Mapping[str, str]) -> None:
        """A line of metrics.jsonl has been written."""
        self.doing(roles)
        self.refresh()
        if self._screen is not None:
            return  # it reads the line at its next refresh
        last = metrics["step"] >= self._reader.config.pipeline.updates
        if is_evaluation(metrics) or last or self._clock() - self._printed >= self._every:
            self._printed = self._clock()
            self._print(status_line(self._status()))

    def refresh(self) -> dict[str, Any]:
        """Asks the campaign for the content of status.json, and returns it."""
        self._live = self.read_live()
        return self._live

    def doing(self, roles: Mapping[str, str]) -> None:
        """What each role is doing now."""
        self.roles = dict(roles)

    def note(self, text: str) -> None:
        """Prints one line for an event, above the screen."""
        self._print(f"{duration(self._clock() - self._began):>8}  {text}")

    def close(self) -> None:
        """Leaves the last screen on the terminal. After this only notes are printed."""
        if self._screen is not None:
            self._screen.stop()
            self._screen = None

    def leave(self) -> None:
        """Gives the terminal its cursor back. Takes no lock: the process is about to end, in the middle of anything."""
        if self._screen is not None:
            os.write(1, b"\x1b[?25h\n")

    def _status(self) -> dict[str, Any]:
        with self._lock:  # rich refreshes in a thread of its own
            status = self._reader.read({**self._live, "roles": self.roles})
        status["wall_seconds"] = self._seconds_before + self._clock() - self._started  # it also ticks between updates
        # Until the campaign has reported, the newest event is the end of the process before this one.
        return status if self._live else {**status, "state": "starting"}

    def _render(self) -> RenderableType:
        return status_screen(self._status(), news=False)  # `note` has printed the events above the screen

    def _print(self, text: str) -> None:
        # No markup, so that brackets in an error's text stay; no wrapping, so that a log has one line for one event.
        self._console.print(concealed(printable(text)), markup=False, highlight=False, emoji=False, soft_wrap=True)


def status_line(status: Mapping[str, Any]) -> str:
    """The status in one line, for logs."""
    metrics, evaluation, teacher = status["metrics"], status["evaluation"], status["accuracy_teacher"]
    parts = [f"update {status['update']}/{status['updates']}"]
    if "tokens_per_second" in status:
        parts.append(f"{status['tokens_per_second']:,.0f} tokens/s")
    kl = metrics.get("reverse_kl", evaluation.get("eval/reverse_kl"))
    # Where no teacher scores what is trained on, the loss says how it goes.
    if kl is None and "loss" in metrics:
        parts.append(f"loss {written(metrics['loss'], METRICS['loss'].digits)}")
    else:
        parts.append(f"reverse KL {written(kl, METRICS['reverse_kl'].digits)}")
    if "eval/accuracy" in evaluation:
        of_teacher = f" (teacher {teacher:.1%})" if teacher is not None else ""
        parts.append(f"accuracy {with_interval(evaluation, 'eval/accuracy', '.1%')}{of_teacher}")
    parts += [f"{name} {told}" for name, own in status.get("sets", {}).items() if (told := set_line(own))]
    if "staleness_mean" in metrics:
        parts.append(f"staleness {metrics['staleness_mean']:.1f}")
    if metrics.get("dropped"):
        parts.append(f"dropped {metrics['dropped']:,}")
    if status["seconds_left"]:
        parts.append(f"{duration(status['seconds_left'])} left")
    return "  ".join(parts)


def set_line(values: Mapping[str, Any]) -> str:
    """An evaluation set in a few words. values: its metrics without their prefix."""
    shown = (("accuracy", "", ".1%"), ("majority", "majority ", ".1%"), ("reverse_kl", "reverse KL ", ".4f"))
    return ", ".join(f"{label}{with_interval(values, key, form)}" for key, label, form in shown if key in values)


def status_screen(status: Mapping[str, Any], *, news: bool = True) -> RenderableType:
    """One screen of what `StatusReader.read` returned. news: with the last events in a box."""
    status = _printable(status)
    parts = [_head(status), _roles(status), _figures(status)]
    if status["news"] and news:
        lines = [f"{duration(event['wall_seconds']):>8}  {describe(event['kind'], event)}" for event in status["news"]]
        parts.append(Panel(Text("\n".join(lines)), title="news", title_align="left"))
    return Group(*parts)


@dataclass(frozen=True)
class _Fitting:
    """A table where it fits the terminal, else the same as text, which is folded between words."""

    table: Table
    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update(max_width=10_000), self.table).maximum
        yield self.table if needed <= options.max_width else self.text


def _head(status: Mapping[str, Any]) -> RenderableType:
    line = Table.grid(*(Column(overflow="fold") for _ in range(6)), padding=(0, 2))
    state = Text(status["state"], COLOURS[LIVE_TONES.get(status["state"], row_of(status["state"]).tone)])
    if status["cause"]:
        state.append(f" ({status['cause']})")
    if status["state"] == "lost" and status["seen_seconds_ago"] is not None:
        state.append(f" (last seen {duration(status['seen_seconds_ago'])} ago on {status['host']})")
    name = Text(status["name"], "bold")
    rest = (
        f"update {status['update']:,}/{status['updates']:,}",
        duration(status["wall_seconds"]) if status["wall_seconds"] else "",
        f"about {duration(status['seconds_left'])} left" if status["seconds_left"] else "",
    )
    line.add_row(name, state, ProgressBar(total=status["updates"], completed=status["update"], width=24), *rest)
    return _Fitting(line, Text("  ").join([name, state, *map(Text, filter(None, rest))]))


def _roles(status: Mapping[str, Any]) -> RenderableType:
    names = ("role", "actors", "restarts", "weights", "doing", "busy")
    columns = (Column(name, overflow="fold", header_style="dim") for name in names)
    table, lines = Table(*columns, box=None, padding=(0, 3)), []
    actors = status["actors"]
    for role, doing in (status["roles"] or dict.fromkeys(status.get("utilisation", {}), "")).items():
        mine = [actor for actor in actors if actor["name"].split(".")[0].split("-")[0] == role]
        alive = sum(actor["alive"] for actor in mine)
        there = Text(f"{alive}/{len(mine)}" if mine else "-", "red" if alive < len(mine) else "")
        busy = status.get("utilisation", {}).get(role)
        restarts = str(sum(actor["restarts"] for actor in mine)) if mine else "-"
        versions = sorted({actor["version"] for actor in mine if actor.get("version") is not None})
        weights = "-" if not versions else f"{versions[0]:,}" + (f" to {versions[-1]:,}" if versions[1:] else "")
        share = "-" if busy is None else f"{busy:.0%}"
        if role == "rollout" and status.get("waits_for_environments"):
            share += f", {status['waits_for_environments']:.0%} waiting for environments"
        table.add_row(role, there, restarts, weights, doing, share)
        told = f" actors, {restarts} restarts, weights {weights}, busy {share}: {doing}"
        lines.append(Text.assemble(f"{role}  ", there, told))
    notes = [
        f"{actor['name']} {'is silent for ' + duration(actor['silent_seconds']) if actor.get('silent_seconds') else 'is behind'}"
        for actor in actors
        if actor.get("silent_seconds") or actor.get("behind")
    ]
    notes += [
        f"{actor['name']} has waited for {duration(actor['waits_seconds'])}: {actor['waits_for']}"
        for actor in actors
        if actor.get("waits_for")
    ]
    notes += [
        f"{actor['name']} starts: {actor['doing']} ({duration(actor.get('doing_seconds', 0.0))})"
        for actor in actors
        if actor.get("doing")
    ]
    notes += [f"{row['phase']} ({duration(row['seconds'])})" for row in status.get("start", []) if not row["ended"]]
    if status.get("stands"):
        notes.insert(0, f"no update for {duration(status['last_update_seconds_ago'])}")
    if status.get("waits_for"):
        notes.append(status["waits_for"])
    rates = (
        f"{status['trajectories_per_second']:,.1f} trajectories/s, {status['tokens_per_second']:,.0f} tokens/s"
        if "tokens_per_second" in status and status["state"] != "paused" and not status.get("stands")
        else ""
    )
    found = Text("; ".join(part for part in (status.get("bottleneck", ""), rates) if part), "bold")
    return Group(_Fitting(table, Text("\n").join(lines)), found, *([Text("; ".join(notes), "yellow")] if notes else []))


def _figures(status: Mapping[str, Any]) -> RenderableType:
    metrics, evaluation = status["metrics"], status["evaluation"]
    rows = {
        "training": listed("training", metrics),
        "evaluation": f"update {evaluation['step']:,}   {listed('evaluation', evaluation)}" if evaluation else "",
        **{f"set {name}": f"update {own['step']:,}   {set_line(own)}" for name, own in status.get("sets", {}).items()},
        "staleness": listed("staleness", metrics),
        "weights": f"version {status['policy_version']:,}   {listed('weights', metrics)}",
        "ledger": "   ".join(f"{state} {count:,}" for state, count in status["ledger"].items()),
        "queues": "   ".join(f"{name} {depth:,}" for name, depth in status["queues"].items()),
        "checkpoint": str(status["checkpoints"].get("path", "none yet")),
        "faults": str(status["faults"]),
    }
    if status["accuracy_teacher"] is not None:
        rows["evaluation"] += f"   teacher {status['accuracy_teacher']:.1%}"
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 3))
    for name, text in rows.items():
        if text:
            table.add_row(Text(name, "dim"), text)
    return table


def trajectory_text(row: Mapping[str, Any]) -> RenderableType:
    """One trajectory: prompt, and its response with each token coloured by log pi - log q."""
    row, reward, judged = _printable(row), row.get("reward"), verdict(row)
    head = Text.assemble(
        (f"update {row['step']}  {row['id']}  ", "dim"),
        (judged, {"right": "green", "wrong": "red"}.get(judged, "dim")),
        (f"  reward {reward:g}" if reward not in (None, 0, 1) else "", "dim"),
        (f"  {row['finish_reason']}  expected {row['reference']}" if row.get("reference") is not None else "", "dim"),
    )
    response = Text()
    trained = row.get("trained") or [True] * len(row["tokens"])
    pairs = zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)
    for token, (student, teacher), own in zip(row["tokens"], pairs, trained, strict=True):
        response.append(str(token), _colour(student, teacher) if own else "italic dim")  # another wrote it
    return Group(head, Text(str(row["prompt"]), "dim"), response, Text(""))


def _printable(value: Any) -> Any:
    """The same value, and all texts in it, without what a terminal would obey."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list | tuple) else value


def _colour(student: float | None, teacher: float | None) -> str:
    if student is None or teacher is None:
        return "dim"  # masked: the teacher has no score for it
    return next((style for limit, style in LOG_RATIO_COLOURS if student - teacher >= limit), "")


class PlainConsole(Console):
    """A console whose reader may end first, for example `| head`: the command line takes the error as the end."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """rich would end the program with exit status 1."""
        raise BrokenPipeError(errno.EPIPE, "the reader of the output is gone")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """[rows][columns] of text, the first row a heading."""
    console = PlainConsole()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widest = widths.index(max(widths))
    whole = sum(widths) - widths[widest] + 3 * len(widths) + 12 <= console.width  # only the widest is folded
    columns = [Column(name, overflow="fold", no_wrap=whole and i != widest) for i, name in enumerate(rows[0])]
    table = Table(*columns, box=SIMPLE)
    for row in rows[1:]:
        table.add_row(*map(printable, row))
    console.print(table)


def runs_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What `listing` found, for `print_table`."""
    table = [["name", "state", "update", "changed", "directory"]]
    for row in rows:
        update, ago = f"{row['update']:,}/{row['updates']:,}", f"{duration(row['changed_seconds_ago'])} ago"
        table.append([row["name"], row["state"], update, ago, row["run_dir"]])
    return table


def summary_table(summary: Mapping[str, Any]) -> str:
    """The end of a campaign: student before, student after, teacher, where they were measured; updates, tokens, seconds."""
    rows = [
        ("student, before", "accuracy_start", "accuracy_sampled_start", "reverse_kl_start"),
        ("student, after", "accuracy_end", "accuracy_sampled_end", "reverse_kl_end"),
        ("teacher", "accuracy_teacher", "accuracy_sampled_teacher", ""),
    ]
    measured = any(summary.get(kl) is not None for *_, kl in rows)
    lines = [f"{'held-out prompts':<18}{'accuracy':>14}{'sampled':>14}{'reverse KL':>18}"]
    if all(summary.get(key) is None for _, *keys in rows for key in keys):  # only sets, or nothing, were evaluated
        rows, lines = [], []
    for name, accuracy, sampled, kl in rows:
        figures = (_of_summary(summary, accuracy, ".1%"), _of_summary(summary, sampled, ".1%"))
        distance = _of_summary(summary, kl, ".4f") if kl or not measured else "0"  # the teacher's distance to itself
        lines.append(f"{name:<18}{figures[0]:>14}{figures[1]:>14}{distance:>18}")
    for name, when in summary.get("sets", {}).items():
        lines.append(f"set {name}: {set_line(when['start'])} -> {set_line(when['end'])}{_change(when['end'])}")
    counts = (
        f"{written(summary.get('updates'), ',')} updates",
        f"{written(summary.get('tokens_generated'), ',')} tokens",
        f"{written(summary.get('wall_seconds'), ',.1f')} seconds",
    )
    return "\n".join([*lines, ", ".join(counts)])


def _of_summary(summary: Mapping[str, Any], key: str, form: str) -> str:
    low, high = (summary.get("intervals") or {}).get(key) or (None, None)
    return with_interval({key: summary.get(key), f"{key}:low": low, f"{key}:high": high}, key, form)


def _change(end: Mapping[str, Any]) -> str:
    """The paired difference to the untrained student, of the first quantity that has one."""
    for key, form in (("accuracy", "+.1%"), ("reverse_kl", "+.4f")):
        if end.get(f"{key}:from_start") is not None:
            low, high = (written(end[f"{key}:from_start:{bound}"], form) for bound in ("low", "high"))
            return f" ({written(end[f'{key}:from_start'], form)}, 95% {low} to {high})"
    return ""


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 4d03h."""
    whole = round(max(seconds, 0))
    for size, large, small in ((86400, "d", "h"), (3600, "h", "m"), (60, "m", "s")):
        if whole >= size:
            parts = {"h": 3600, "m": 60, "s": 1}[small]
            return f"{whole // size}{large}{whole % size // parts:02d}{small}"
    return f"{whole}s"
