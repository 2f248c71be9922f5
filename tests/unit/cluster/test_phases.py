"""The phases of a start: printed as they begin and end, shown on a terminal, told to the records."""

import io
import subprocess
import sys
import threading

from cluster.console.status import live_actors
from cluster.fleet.ray_actor import Replica
from cluster.phases import Start
from tests.actors_of_this_process import Events, with_fleet
from tests.waiting import until


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_phase_has_a_line_when_it_begins_and_one_with_its_seconds() -> None:
    clock, out = Clock(), io.StringIO()
    start = Start(clock, out)
    with start.shown(), start.phase("reading"):
        clock.now += 2.0
        with start.phase("looking"):
            clock.now += 0.05  # too short for a second line
        assert start.now() == "reading (2 s)"
    assert out.getvalue().splitlines() == [
        "      0s  reading ...",
        "      2s  looking ...",
        "      2s  reading: 2.0 s",
    ]  # fmt: skip
    assert [(row["phase"], row["began"], row["seconds"], row["ended"]) for row in start.rows()] == [
        ("reading", 0.0, 2.05, True),
        ("looking", 2.0, 0.05, True),
    ]


def test_a_phase_ends_with_an_error_and_an_unfinished_one_counts_until_now() -> None:
    clock = Clock()
    start = Start(clock, io.StringIO())
    try:
        with start.phase("loading"):
            clock.now += 1.0
            raise OSError
    except OSError:
        pass
    start.opened("update 1")
    clock.now += 3.0
    assert [(row["phase"], row["seconds"], row["ended"]) for row in start.rows()] == [
        ("loading", 1.0, True),
        ("update 1", 3.0, False),
    ]


def test_a_terminal_has_a_live_line_until_the_screen_takes_over() -> None:
    out, told = Terminal(), []
    start = Start(stream=out)
    with start.shown(), start.phase("reading"):
        until(lambda: "reading (0 s)" in out.getvalue(), "the live line")
        start.tell(told.append)
        shown = out.getvalue()
        with start.phase("starting Ray"):
            pass
    assert shown.endswith("\r\x1b[2K") and out.getvalue() == shown
    assert told[0] == "starting Ray ..." and "phases" not in {thread.name for thread in threading.enumerate()}


def test_the_second_campaign_of_a_process_has_phases_of_its_own() -> None:
    start = Start(stream=io.StringIO())
    with start.phase("importing"):
        pass
    start.of_a_campaign()
    with start.phase("reading"):
        pass
    assert [row["phase"] for row in start.rows()] == ["importing", "reading"]
    start.over = True
    with start.phase("replacing"):
        pass
    assert len(start.rows()) == 2
    start.of_a_campaign()
    assert start.rows() == [] and not start.over


def test_the_first_line_comes_before_torch_transformers_and_ray() -> None:
    program = (
        "import sys, cluster.cli as cli, cluster.phases as phases\n"
        "large = {'torch', 'transformers', 'ray', 'vllm', 'omegaconf', 'numpy', 'rich'}\n"
        "phases.START._write = lambda text: (print(text, sorted(large & set(sys.modules))), sys.exit())\n"
        "cli.main(['run', 'configs/quickstart.yaml'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "      0s  looking at the configuration ...", done.stdout + done.stderr
    assert done.stdout.split("\n")[1].strip() == "[]"


def test_an_actor_tells_how_long_each_phase_of_its_start_took(monkeypatch) -> None:
    class Worker:
        async def status(self) -> dict:
            return {}

    async def body(_: object, events: Events) -> None:
        [(kind, fields)] = events
        assert kind == "actor_started" and fields["phases"]["loads its model"] == 0.25
        assert fields["cause"].endswith("loads its model 0.2") or fields["cause"].endswith("loads its model 0.3")
        assert set(fields["phases"]) == {"process", "loads its model"} and fields["seconds"] >= 0

    with_fleet(monkeypatch, Worker, body, replicas=1)


def test_the_status_says_what_each_starting_actor_does() -> None:
    waits, starts, loads = Replica("rollout-0"), Replica("rollout-1"), Replica("rollout-2")
    starts.handle = loads.handle = object()
    loads.doing = "loads its model"
    rows = live_actors([waits, starts, loads])
    assert [row["doing"] for row in rows] == ["it waits for its place", "its process starts", "loads its model"]
    assert all(row["doing_seconds"] >= 0 for row in rows)
