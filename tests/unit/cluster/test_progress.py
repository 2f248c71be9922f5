import io

from rich.console import Console

from cluster.console.progress import Progress, summary_table


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(total: int) -> tuple[Progress, Clock, io.StringIO]:
    clock, output = Clock(), io.StringIO()
    return Progress(total, Console(file=output, width=40), plain_every_seconds=5, clock=clock), clock, output


def row(step: int, **more: object) -> dict:
    return {"step": step, "tokens_generated": 1000 * step, "reverse_kl": 0.25, "staleness_mean": 0.5, **more}


ROLES = {"rollout": "64 trajectories", "teacher": "idle", "learner": "update 3"}


def test_without_a_terminal_lines_are_whole_plain_and_not_too_many():
    progress, clock, output = plain(total=100)
    for step in range(1, 21):
        clock.now += 1.0
        progress.update(row(step), ROLES)
    lines = output.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["update 1/100", "update 6/100", "update 11/100", "update 16/100"]
    assert lines[1] == "update 6/100  1,000 tokens/s  reverse KL 0.2500  staleness 0.5  1m34s left"
    assert "\x1b" not in output.getvalue()


def test_evaluations_and_the_last_update_are_always_printed():
    progress, _, output = plain(total=3)
    progress.update({"step": 0, "policy_version": 0, "eval/accuracy": 0.1, "eval/accuracy_teacher": 1.0}, ROLES)
    progress.update(row(1), ROLES)
    progress.update(row(2, **{"eval/accuracy": 0.5}), ROLES)
    progress.update(row(3), ROLES)
    lines = output.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["update 0/3", "update 2/3", "update 3/3"]
    assert "accuracy 50.0% (teacher 100.0%)" in lines[1] and "accuracy 50.0%" in lines[2]


def test_the_pace_of_a_resumed_campaign_counts_from_where_it_was_taken_up():
    progress, clock, _ = plain(total=50)
    assert progress.seconds_left() is None and progress.tokens_per_second() is None
    for step in (41, 42, 43):
        clock.now += 2.0
        progress.update(row(step), ROLES)
    assert progress.tokens_per_second() == 500 and progress.seconds_left() == 14


def test_a_note_is_printed_as_it_is():
    progress, clock, output = plain(total=1)
    clock.now = 65
    progress.note("actor died actor=rollout-0 cause=KeyError: [bold]weights[/bold] " + "x" * 80)
    assert (
        output.getvalue() == f"   1m05s  actor died actor=rollout-0 cause=KeyError: [bold]weights[/bold] {'x' * 80}\n"
    )


def test_figures_that_are_missing_or_not_finite_are_dashes():
    progress, _, output = plain(total=2)
    progress.update({"step": 2, "reverse_kl": None, "eval/accuracy": None, "staleness_mean": None}, {})
    assert output.getvalue() == "update 2/2  reverse KL -  accuracy -\n"


def test_on_a_terminal_the_newest_state_stays_in_place():
    clock, output = Clock(), io.StringIO()
    progress = Progress(60, Console(file=output, force_terminal=True, width=120, color_system=None), clock=clock)
    progress.update(row(12, **{"eval/accuracy": 0.66}), ROLES)
    progress.doing({**ROLES, "teacher": "32 trajectories"})
    progress.note("checkpoint step=12")
    progress.close()
    screen = output.getvalue().rsplit("checkpoint step=12", 1)[1]
    for text in ("update 12/60", "accuracy 66.0%", "teacher 32 trajectories", "learner update 3"):
        assert text in screen
    progress.close()  # twice does no harm


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
    assert "-" in summary_table({})  # a campaign that was interrupted before anything was measured
