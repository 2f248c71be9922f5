import io
import time
from pathlib import Path

from rich.console import Console

from cluster.console.screen import Progress, duration, status_screen, summary_table
from cluster.console.status import read_status, write_status
from cluster.records.metric_table import METRIC_KEYS, METRICS
from cluster.records.writer import RunRecords, read_jsonl
from tests.fake_run import CONFIG

LIVE = {"state": "running", "ledger": {"issued": 9}, "actors": []}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A campaign that goes on, and what it shows."""

    def __init__(self, path: Path, total: int, **console: object):
        path.mkdir()
        (path / "config.yaml").write_text(
            CONFIG.format(name=path.name, seed=0, updates=total, max_staleness=1, learning_rate=1e-4)
        )
        self.path, self.clock, self.output = path, Clock(), io.StringIO()
        self.records = RunRecords(path)
        self.records.event("loop_started", step=0)
        self.progress = Progress(
            path, Console(file=self.output, width=160, **console), plain_every_seconds=5, wall_seconds=self.clock
        )
        self.progress.read_live = lambda: LIVE

    def update(self, step: int, **more: object) -> None:
        row = {key: [0.5] if METRICS[key].form == "histogram" else 0.5 for key in METRIC_KEYS}
        row |= {"step": step, "wall_seconds": self.clock.now, "dropped": 0}
        row |= {"tokens_generated": 1000 * step, "reverse_kl": 0.25, **more}
        self.records.metrics(row)
        self.progress.update(row, ROLES)


ROLES = {"rollout": "64 trajectories", "teacher": "idle", "learner": "update 3"}


def test_without_a_terminal_lines_are_whole_plain_and_not_too_many(tmp_path):
    run = Run(tmp_path / "run", total=100)
    for step in range(1, 21):
        run.clock.now += 1.0
        run.update(step)
    lines = run.output.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["update 1/100", "update 6/100", "update 11/100", "update 16/100"]
    assert lines[1] == "update 6/100  1,000 tokens/s  reverse KL 0.2500  staleness 0.5  1m34s left"
    assert "\x1b" not in run.output.getvalue()


def test_evaluations_and_the_last_update_are_always_printed(tmp_path):
    run = Run(tmp_path / "run", total=3)
    row = {"step": 0, "policy_version": 0, "eval/accuracy": 0.1, "eval/accuracy_teacher": 1.0}
    run.records.metrics(row)
    run.progress.update(row, ROLES)
    run.update(1)
    run.update(2, **{"eval/accuracy": 0.5})
    run.update(3)
    lines = run.output.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["update 0/3", "update 2/3", "update 3/3"]
    assert "accuracy 50.0% (teacher 100.0%)" in lines[1] and "accuracy 50.0%" in lines[2]


def test_a_note_is_printed_as_it_is(tmp_path):
    run = Run(tmp_path / "run", total=1)
    run.clock.now = 65
    run.progress.note("actor died actor=rollout-0 cause=KeyError: [bold]weights[/bold] " + "x" * 200)
    assert (
        run.output.getvalue()
        == f"   1m05s  actor died actor=rollout-0 cause=KeyError: [bold]weights[/bold] {'x' * 200}\n"
    )


def test_an_event_has_the_same_seconds_in_the_terminal_in_its_file_and_in_the_news(tmp_path):
    """Also in a campaign that was resumed: its clock goes on."""
    run = Run(tmp_path / "run", total=1)
    run.records.metrics({"step": 0, "policy_version": 0, "wall_seconds": 4000.0})
    records = RunRecords(
        run.path, began=time.monotonic() - 100.0
    )  # the next process, whose command is older than its records
    records.event("paused")
    run.clock.now = 9000.0  # the line is printed later
    run.progress.note("paused", records.last_event_seconds)
    [event] = [row for row in read_jsonl(run.path / "events.jsonl") if row["kind"] == "paused"]
    assert event["wall_seconds"] == records.last_event_seconds and event["wall_seconds"] >= 4100.0
    [line] = run.output.getvalue().splitlines()
    [news] = [line for line in _screen(run.path).splitlines() if "paused" in line and "│" in line]
    assert line.split()[0] == news.strip("│ ").split()[0] == duration(event["wall_seconds"])


def _screen(run_dir: Path) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(status_screen(read_status(run_dir)))
    return console.export_text()


def test_figures_that_are_missing_or_not_finite_are_dashes_or_left_out(tmp_path):
    run = Run(tmp_path / "run", total=2)
    run.update(2, reverse_kl=float("nan"), loss=None, staleness_mean=None, **{"eval/accuracy": None})
    assert run.output.getvalue() == "update 2/2  reverse KL -\n"


def test_without_a_reverse_kl_the_line_has_the_loss(tmp_path):
    run = Run(tmp_path / "run", total=2)
    run.update(
        2, reverse_kl=None, loss=1.23456, staleness_mean=None, **{"eval/accuracy": None, "eval/reverse_kl": None}
    )
    assert run.output.getvalue() == "update 2/2  loss 1.235\n"


def test_on_a_terminal_the_screen_is_that_of_status_and_stays_in_place(tmp_path):
    run = Run(tmp_path / "run", total=60, force_terminal=True, color_system=None)
    run.update(12, **{"eval/accuracy": 0.66})
    run.progress.doing({**ROLES, "teacher": "32 trajectories"})
    run.progress.note("checkpoint step=12")
    run.progress.close()
    shown = run.output.getvalue().rsplit("checkpoint step=12", 1)[1]
    for text in ("update 12/60", "accuracy 66.0%", "32 trajectories", "update 3"):
        assert text in shown
    write_status(run.path, {**LIVE, "roles": run.progress.roles})
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(status_screen(read_status(run.path), news=False))
    there = console.export_text()
    assert all(line.strip() in shown for line in there.splitlines())
    run.progress.close()  # twice does no harm


def test_before_a_resumed_campaign_has_reported_its_last_end_is_not_shown(tmp_path):
    run = Run(tmp_path / "run", total=3)
    run.update(1)
    run.records.event("stopped", step=1)
    run.progress.close()
    output = io.StringIO()
    again = Progress(run.path, Console(file=output, width=160, force_terminal=True, color_system=None))
    again.close()
    assert "starting" in output.getvalue() and "stopped" not in output.getvalue()


def test_the_summary_has_before_after_teacher_and_what_it_took():
    summary = {
        "accuracy_start": 0.117,
        "accuracy_end": 0.984,
        "accuracy_teacher": 1.0,
        "accuracy_sampled_start": 0.293,
        "accuracy_sampled_end": None,
        "reverse_kl_start": 0.5553,
        "reverse_kl_end": 0.0123,
        "updates": 60,
        "tokens_generated": 175772,
        "wall_seconds": 46.623,
    }
    lines = [line.split() for line in summary_table(summary).splitlines()]
    assert lines[1:] == [
        ["student,", "before", "11.7%", "29.3%", "0.5553"],
        ["student,", "after", "98.4%", "-", "0.0123"],
        ["teacher", "100.0%", "-", "0"],
        ["60", "updates,", "175,772", "tokens,", "46.6", "seconds"],
    ]
    # It was interrupted before an evaluation after an update.
    for key in ("accuracy_end", "reverse_kl_end"):
        summary[key] = None
    assert not [line for line in summary_table(summary).splitlines() if line.startswith("student, after")]
    begun = {"near": {"start": {"accuracy": 0.25}, "end": {}}}
    assert summary_table({"sets": begun}).splitlines()[0] == "set near: 25.0%"
    # The teacher has no distance to what was not measured.
    teacher = summary_table({"accuracy_teacher": 1.0}).splitlines()[2]
    assert teacher.split() == ["teacher", "100.0%", "-", "-"]
    # A campaign with sets alone, or one that was interrupted before anything was measured.
    sets = {"near": {"start": {"accuracy": 0.25}, "end": {"accuracy": 0.5}}}
    lines = summary_table({"sets": sets, "updates": 6}).splitlines()
    assert [line.split()[0] for line in lines] == ["set", "6"] and len(summary_table({}).splitlines()) == 1
