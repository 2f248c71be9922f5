"""A campaign that runs beside a benchmark is looked at when its updates are there."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import watch

STANDS = "import subprocess, sys; subprocess.Popen(['cat']); print(flush=True); sys.stdin.read()"
"""Has a process below it, says so, and both stand until their input ends."""


@pytest.fixture
def campaign() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", STANDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def write(metrics: Path, *updates: int, rest: str = "") -> None:
    with metrics.open("a") as file:
        file.write("".join(json.dumps({"step": update}) + "\n" for update in updates) + rest)


def test_a_line_that_is_being_written_is_none_yet(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert watch.rows(metrics) == [] and watch.newest(metrics) == 0
    write(metrics, 0, 1, rest='{"step": 2')
    assert watch.rows(metrics) == [{"step": 0}, {"step": 1}] and watch.newest(metrics) == 1
    write(metrics, rest="}\n")
    assert watch.newest(metrics) == 2


def test_each_mark_is_the_first_look_after_an_update_with_what_all_processes_have_used(
    campaign: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([0, 1, 1, 2, 4])  # one of them passes over an update
    monkeypatch.setattr(watch, "newest", lambda _: next(looks))
    first, second = watch.marks(campaign, Path("metrics.jsonl"), (1, 3))
    assert (first.update, second.update) == (1, 4) and first.time < second.time
    for mark in (first, second):
        assert {kind for kind, _ in mark.used.values()} == {"campaign", "cat"}
        assert mark.used[campaign.pid][0] == "campaign" and mark.used[campaign.pid][1] > 0


@pytest.mark.parametrize("at_the_look", [True, False])
def test_a_campaign_that_ends_too_early_has_fewer_marks(
    at_the_look: bool, tmp_path: Path, campaign: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = watch.used
    write(tmp_path / "metrics.jsonl", 1)

    def last(pid: int) -> dict[int, tuple[str, float]]:
        found = {} if at_the_look else used(pid)
        campaign.communicate()
        return used(pid) if at_the_look else found

    monkeypatch.setattr(watch, "used", last)
    found = watch.marks(campaign, tmp_path / "metrics.jsonl", (1, 2))
    assert [mark.update for mark in found] == ([] if at_the_look else [1])
