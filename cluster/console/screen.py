"""What a person sees of a campaign: one screen for `run` and `status --watch`, plain lines without a terminal, the end in
a table, and trajectories in colour.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from cluster.records.metric_table import METRICS, is_evaluation, listed, of_status, with_change, with_interval, written
from cluster.records.outcome import losses, outcome
from cluster.records.rewards import is_graded, told_as
from cluster.records.turns import turns_of

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
        wall_seconds: Callable[[], float] = time.monotonic,
    ):
        """Without a terminal a line is printed every `plain_every_seconds`, and on each evaluation and the last update.

        wall_seconds: the campaign's clock (`RunRecords.wall_seconds`), by which events are told.
        """
        self._every, self._clock, self._printed = plain_every_seconds, wall_seconds, float("-inf")
        self._console = console or Console(highlight=False)
        self._reader, self._lock = StatusReader(run_dir), threading.Lock()
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

    def note(self, text: str, wall_seconds: float | None = None) -> None:
        """Prints one line for an event, above the screen. wall_seconds: those of its line of events.jsonl; None: now."""
        self._print(f"{duration(self._clock() if wall_seconds is None else wall_seconds):>8}  {text}")

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
        status["wall_seconds"] = self._clock()  # it also ticks between updates
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
    graded = status.get("graded", [])
    if "eval/accuracy" in evaluation:
        how = told_as("" in graded)
        of_teacher = f" (teacher {teacher:{how.form}})" if teacher is not None else ""
        parts.append(f"{how.name} {with_interval(evaluation, 'eval/accuracy', how.form)}{of_teacher}")
    sets = status.get("sets", {}).items()
    parts += [f"{name} {told}" for name, own in sets if (told := set_line(own, graded=name in graded))]
    parts += [
        f"{metric.label} {written(metrics[key], metric.digits)}"
        for key, metric in of_status("responses").items()
        if key in metrics
    ]
    if "staleness_mean" in metrics:
        parts.append(f"staleness {metrics['staleness_mean']:.1f}")
    if metrics.get("dropped"):
        parts.append(f"dropped {metrics['dropped']:,}")
    if status["seconds_left"]:
        parts.append(f"{duration(status['seconds_left'])} left")
    return "  ".join(parts)


def set_line(values: Mapping[str, Any], *, graded: bool) -> str:
    """An evaluation set in a few words. values: its metrics without their prefix. graded: its rewards are."""
    form = told_as(graded).form
    shown = {"accuracy": (f"{told_as(graded).name} " if graded else "", form), "right": ("right ", ".1%")}
    shown |= {"majority": ("majority ", form), "reverse_kl": ("reverse KL ", ".4f")}
    return ", ".join(
        f"{label}{with_interval(values, key, form)}" for key, (label, form) in shown.items() if key in values
    )


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
    metrics, evaluation, graded = status["metrics"], status["evaluation"], status.get("graded", [])
    rows = {
        "training": listed("training", metrics),
        "responses": listed("responses", metrics),
        "evaluation": f"update {evaluation['step']:,}   {listed('evaluation', evaluation, graded='' in graded)}"
        if evaluation
        else "",
        **{
            f"set {name}": f"update {own['step']:,}   {set_line(own, graded=name in graded)}"
            for name, own in status.get("sets", {}).items()
        },
        "staleness": listed("staleness", metrics),
        "weights": f"version {status['policy_version']:,}   {listed('weights', metrics)}",
        "ledger": "   ".join(f"{state} {count:,}" for state, count in status["ledger"].items()),
        "queues": "   ".join(f"{name} {depth:,}" for name, depth in status["queues"].items()),
        "checkpoint": str(status["checkpoints"].get("path", "none yet")),
        "faults": losses(status["faults"], status["dropped_because"], status["ledger"].get("dropped", 0)),
    }
    if status["accuracy_teacher"] is not None:
        rows["evaluation"] += f"   teacher {status['accuracy_teacher']:{told_as('' in graded).form}}"
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 3))
    for name, text in rows.items():
        if text:
            table.add_row(Text(name, "dim"), text)
    return table


def trajectory_text(row: Mapping[str, Any]) -> RenderableType:
    """One trajectory: prompt, and its response with each token coloured by log pi - log q; of several turns, each with who wrote it."""
    row, reward, judged = _printable(row), row.get("reward"), verdict(row)
    head = Text.assemble(
        (f"update {row['step']}  {row['id']}  ", "dim"),
        (judged, {"right": "green", "wrong": "red"}.get(judged, "dim")),
        (f"  reward {reward:g}" if reward not in (None, 0, 1) else "", "dim"),
        (f"  {row['finish_reason']}  expected {row['reference']}" if row.get("reference") is not None else "", "dim"),
    )
    pairs = zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)
    tokens = [(str(token), _colour(*pair)) for token, pair in zip(row["tokens"], pairs, strict=True)]
    trained = row.get("trained") or []
    if all(trained):
        return Group(head, Text(str(row["prompt"]), "dim"), Text.assemble(*tokens), Text(""))
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for turn in turns_of(trained, row.get("begins") or []):
        part = tokens[turn.begin : turn.end]
        others = [(text, "italic dim") for text, _ in part]
        table.add_row(Text(turn.by, "dim"), Text.assemble(*(part if turn.student else others)))
    return Group(head, Text(str(row["prompt"]), "dim"), table, Text(""))


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


def print_table(rows: Sequence[Sequence[str]], named_by: int = 1) -> None:
    """[rows][columns] of text, the first row a heading. At most the widest column is folded; where that is not enough, each row is a
    block of lines under its first `named_by` cells."""
    console = PlainConsole()
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widest = widths.index(max(widths))
    room = console.width - (sum(widths) - widths[widest] + 3 * len(widths))
    if room < max([12, *map(len, rows[0][widest].split())]):
        for line in _blocks(rows, named_by, console.width):
            console.print(line, markup=False, emoji=False)
        return
    columns = [Column(name, overflow="fold", no_wrap=i != widest) for i, name in enumerate(rows[0])]
    table = Table(*columns, box=SIMPLE)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def _blocks(rows: Sequence[Sequence[str]], named_by: int, width: int) -> Iterator[str]:
    """The rows of a table, each as lines: what names it, and then a line for each other cell."""
    names = rows[0][named_by:]
    column = max(map(len, names))
    for row in rows[1:]:
        yield "  ".join(row[:named_by])
        for name, cell in zip(names, row[named_by:], strict=True):
            if not cell:
                continue
            line = f"  {name:<{column}}  {cell}"
            yield from [line] if len(line) <= width else [f"  {name}", f"    {cell}"]


def runs_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What `listing` found, for `print_table`."""
    table = [["name", "state", "update", "changed", "directory"]]
    for row in rows:
        update, ago = f"{row['update']:,}/{row['updates']:,}", f"{duration(row['changed_seconds_ago'])} ago"
        table.append([row["name"], row["state"], update, ago, row["run_dir"]])
    return table


def summary_table(summary: Mapping[str, Any]) -> str:
    """The end of a campaign: student before, student after, teacher, where they were measured; updates, tokens, seconds."""
    columns, rows = outcome(summary)
    table = [["held-out prompts", *columns], *([row.name, *row.cells] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in table]
    for name, when in summary.get("sets", {}).items():
        graded = any(is_graded(values, of="") for values in when.values())
        before, after = (set_line(when[end], graded=graded) for end in ("start", "end"))
        change = f" -> {after}{_change(when['end'], told_as(graded).form)}" if after else ""
        lines.append(f"set {name}: {before}{change}")
    counts = (
        f"{written(summary.get('updates'), ',')} updates",
        f"{written(summary.get('tokens_generated'), ',')} tokens",
        f"{written(summary.get('wall_seconds'), ',.1f')} seconds",
    )
    lines.append(", ".join(counts))
    because, dropped = summary.get("dropped_because") or {}, (summary.get("ledger") or {}).get("dropped", 0)
    if summary.get("faults") or dropped:
        lines.append(losses(summary.get("faults") or 0, because, dropped))
    return "\n".join(lines)


def _change(end: Mapping[str, Any], form: str) -> str:
    """The paired difference to the untrained student, of the first quantity that has one. form: of rewards."""
    changes = (with_change(end, key, how) for key, how in (("accuracy", form), ("reverse_kl", ".4f")))
    return next((f"; change {change}" for change in changes if change), "")


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 4d03h."""
    whole = round(max(seconds, 0))
    for size, large, small in ((86400, "d", "h"), (3600, "h", "m"), (60, "m", "s")):
        if whole >= size:
            parts = {"h": 3600, "m": 60, "s": 1}[small]
            return f"{whole // size}{large}{whole % size // parts:02d}{small}"
    return f"{whole}s"
