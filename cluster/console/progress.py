"""What a person sees while a campaign runs: three lines that stay in place, or plain lines where there is no terminal."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text


class Progress:
    """Updates done, rates, the newest measurements, and what each role is doing."""

    def __init__(
        self,
        total_updates: int,
        console: Console | None = None,
        *,
        plain_every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Without a terminal a line is printed every `plain_every_seconds`, and on each evaluation and the last update."""
        self._total, self._every, self._clock = total_updates, plain_every_seconds, clock
        self._console = console or Console(highlight=False)
        self._started, self._printed = clock(), float("-inf")
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=20)
        """(time, step, tokens so far) of the last updates; rates are taken over them."""
        self._newest: dict[str, Any] = {}
        self._roles: dict[str, str] = {}
        self._lock = threading.Lock()
        self._live = None
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._screen, console=self._console, refresh_per_second=4)
            self._live.start()

    def update(self, metrics: Mapping[str, Any], roles: Mapping[str, str]) -> None:
        """Takes in the line of metrics.jsonl of one step, and what each role is doing."""
        step = int(metrics["step"])
        with self._lock:
            self._newest |= metrics
            self._roles = dict(roles)
            self._recent.append((self._clock(), step, int(metrics.get("tokens_generated") or 0)))
        evaluated, last = "eval/accuracy" in metrics, step >= self._total
        if self._live is None and (evaluated or last or self._clock() - self._printed >= self._every):
            self._printed = self._clock()
            seconds_left = self.seconds_left()
            left = f"{duration(seconds_left)} left" if seconds_left is not None and not last else ""
            self._print("  ".join(part for part in (f"update {step}/{self._total}", *self._figures(), left) if part))

    def doing(self, roles: Mapping[str, str]) -> None:
        """What each role is doing, between updates; the terminal shows it at its next refresh."""
        with self._lock:
            self._roles = dict(roles)

    @property
    def roles(self) -> dict[str, str]:
        """What each role is doing."""
        with self._lock:
            return dict(self._roles)

    def note(self, text: str) -> None:
        """One line for one event: it scrolls past, above what stays."""
        self._print(f"{duration(self._clock() - self._started):>8}  {text}")

    def close(self) -> None:
        """Leaves the last state on the terminal. Nothing is shown after this but notes."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def tokens_per_second(self) -> float | None:
        """Tokens sampled in a second, over the last updates."""
        seconds, _, tokens = self._pace()
        return tokens / seconds if seconds else None

    def seconds_left(self) -> float | None:
        """Seconds until the last update, at the pace of the last updates."""
        seconds, updates, _ = self._pace()
        return seconds / updates * (self._total - self._recent[-1][1]) if updates else None

    def _pace(self) -> tuple[float, int, int]:
        """Seconds, updates and tokens between the first and the last of the recent updates."""
        if not self._recent:
            return 0.0, 0, 0
        (start, first, before), (end, last, after) = self._recent[0], self._recent[-1]
        return end - start, last - first, after - before

    def _figures(self) -> list[str]:
        """The newest measurements, as far as there are any; those on held-out prompts stand until the next evaluation."""
        newest, parts = self._newest, []
        if (rate := self.tokens_per_second()) is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        kl = newest.get("reverse_kl", newest.get("eval/reverse_kl"))
        parts.append(f"reverse KL {_number(kl, '.4f')}")
        if "eval/accuracy" in newest:
            teacher = newest.get("eval/accuracy_teacher")
            of_teacher = f" (teacher {_number(teacher, '.1%')})" if teacher is not None else ""
            parts.append(f"accuracy {_number(newest['eval/accuracy'], '.1%')}{of_teacher}")
        if newest.get("staleness_mean") is not None:
            parts.append(f"staleness {newest['staleness_mean']:.1f}")
        if newest.get("dropped"):
            parts.append(f"dropped {newest['dropped']:,}")
        return parts

    def _screen(self) -> RenderableType:
        with self._lock:
            step = self._newest.get("step")
            elapsed, left = duration(self._clock() - self._started), self.seconds_left()
            head = Table.grid(padding=(0, 2))
            bar = ProgressBar(total=self._total, completed=step or 0, width=32, pulse=step is None)
            ahead = f"about {duration(left)} left" if left is not None and (step or 0) < self._total else ""
            count = f"update {step}/{self._total}" if step is not None else "starting"
            head.add_row(bar, Text(count, "bold"), Text(elapsed), Text(ahead, "dim"))
            figures = Text("   ".join(self._figures() if self._newest else []))
            roles = Text("   ").join(
                Text.assemble((role, "cyan"), " ", (doing, "dim" if doing == "idle" else ""))
                for role, doing in self._roles.items()
            )
        return Group(head, *(line for line in (figures, roles) if line.plain))

    def _print(self, text: str) -> None:
        # No markup, so that brackets in an error's text stay; no wrapping, so that a log has one line for one event.
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """[rows][columns] of text, the first row a heading."""
    table = Table(*(Column(name, overflow="fold") for name in rows[0]), box=SIMPLE)
    for row in rows[1:]:
        table.add_row(*row)
    Console(highlight=False).print(table)


def summary_table(summary: Mapping[str, Any]) -> str:
    """The end of a campaign in five lines: student before, student after, teacher; updates, tokens, seconds."""
    rows = [
        ("student, before", "accuracy_start", "accuracy_sampled_start", "reverse_kl_start"),
        ("student, after", "accuracy_end", "accuracy_sampled_end", "reverse_kl_end"),
        ("teacher", "accuracy_teacher", "accuracy_sampled_teacher", ""),
    ]
    lines = [f"{'held-out prompts':<18}{'accuracy':>10}{'sampled':>10}{'reverse KL':>12}"]
    for name, accuracy, sampled, kl in rows:
        figures = (_number(summary.get(accuracy), ".1%"), _number(summary.get(sampled), ".1%"))
        distance = _number(summary.get(kl), ".4f") if kl else "0"  # the teacher's distance to itself
        lines.append(f"{name:<18}{figures[0]:>10}{figures[1]:>10}{distance:>12}")
    counts = (
        f"{_number(summary.get('updates'), ',')} updates",
        f"{_number(summary.get('tokens_generated'), ',')} tokens",
        f"{_number(summary.get('wall_seconds'), ',.1f')} seconds",
    )
    return "\n".join([*lines, ", ".join(counts)])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 4d03h."""
    whole = round(max(seconds, 0))
    for size, large, small in ((86400, "d", "h"), (3600, "h", "m"), (60, "m", "s")):
        if whole >= size:
            parts = {"h": 3600, "m": 60, "s": 1}[small]
            return f"{whole // size}{large}{whole % size // parts:02d}{small}"
    return f"{whole}s"
