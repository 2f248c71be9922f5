"""A signal at any time ends in a checkpoint or in one line; a terminal that closes takes nothing with it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.console import terminal
from cluster.console.status import read_status
from cluster.console.terminal import LastingStream, lasting_output
from cluster.interrupts import WARNINGS, Interrupts
from cluster.records.writer import read_jsonl
from tests import clean_process, interrupted_campaign, light_campaign
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[3]
PASSES = {"compute_dtype": "float32", "optimizer": {"learning_rate": 1e-3}}
SMALL = {"updates": 6, "prompts_per_update": 4, "samples_per_prompt": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return light_campaign.make_folder(tmp_path_factory.mktemp("interrupts"))


class Campaign:
    """A light campaign that waits in update 4, after the checkpoint of update 2, or in the update of this number."""

    def __init__(
        self, folder: Path, name: str, body: Any = interrupted_campaign.run_to_update, number: int = 4, **changes: Any
    ):
        self.place = folder / f"place-{name}"
        self.place.mkdir()
        self.run_dir, self.log = folder / "runs" / name, self.place / "log"
        config = light_campaign.configuration(folder, name, **{"checkpoint": {"every_updates": 2}, **changes})
        where = (
            (self.place, number, str(config))
            if body is not interrupted_campaign.run_to_start
            else (self.place, str(config))
        )
        self.process = clean_process.start(body, *where, log=self.log)
        until((self.place / "reached").exists, f"{name}: {self.text()}", self.process.is_alive)
        if body is not interrupted_campaign.run_to_start and number > 2:
            until(lambda: self.steps() == [2], "the checkpoint of update 2", self.process.is_alive)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def go(self) -> None:
        """Lets the update go on, once the learner is asked to give it up."""
        until((self.place / "asked").exists, self.text(), self.process.is_alive)
        (self.place / "go").touch()

    def end(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def steps(self) -> list[int]:
        return [int(path.name[5:]) for path in sorted((self.run_dir / "checkpoints").glob("step_*"))]

    def kinds(self) -> list[str]:
        return [row["kind"] for row in read_jsonl(self.run_dir / "events.jsonl")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda n: n.name)
def test_each_signal_says_at_once_what_it_waits_for_and_ends_with_a_checkpoint(folder: Path, number: Any) -> None:
    campaign = Campaign(folder, f"asked-{number.name}")
    campaign.signal(number)
    said = (
        f"understudy: {number.name}: update 4 is given up, then a checkpoint is written (the last one is of update 2)"
    )
    until(lambda: said in campaign.text(), campaign.text(), campaign.process.is_alive)
    campaign.go()
    assert campaign.end() == 130, campaign.text()
    assert campaign.steps()[-1] == 3 and campaign.kinds()[-1] == "stopped"
    assert "Traceback" not in campaign.text()


def test_an_interrupt_of_the_first_update_has_nothing_to_save_and_shows_nothing_as_after_that_was_measured_before(
    folder: Path,
) -> None:
    campaign = Campaign(folder, "first", number=1)
    campaign.signal(signal.SIGINT)
    said = "understudy: SIGINT: update 1 is given up, and before the first update there is nothing to save; a second"
    until(lambda: said in campaign.text(), campaign.text(), campaign.process.is_alive)
    campaign.go()
    assert campaign.end() == 130, campaign.text()
    assert campaign.steps() == [] and "interrupted: there was nothing to save" in campaign.text()
    assert "student, before" in campaign.text() and "student, after" not in campaign.text()
    summary = json.loads((campaign.run_dir / "summary.json").read_text())
    assert summary["accuracy_start"] is not None and summary["accuracy_end"] is None
    page = (campaign.run_dir / "report.html").read_text()
    assert "Student, before" in page and "Student, after" not in page
    status = read_status(campaign.run_dir)
    assert status["state"] == "stopped" and status["ledger"] == summary["ledger"] and status["queues"] == {}
    assert set(status["roles"].values()) == {"ended"}


@pytest.mark.parametrize("bound", [0, 2])
def test_an_interrupt_between_micro_batches_saves_at_once_and_the_campaign_goes_on_bit_for_bit(
    folder: Path, bound: int
) -> None:
    changes = {"learner": {**PASSES, "microbatch_tokens": 1}, "pipeline": {**SMALL, "max_staleness": bound}}
    campaign = Campaign(folder, f"between-{bound}", interrupted_campaign.run_to_second_pass, **changes)
    campaign.signal(signal.SIGTERM)
    until(lambda: "update 4 is given up" in campaign.text(), campaign.text(), campaign.process.is_alive)
    campaign.go()
    assert campaign.end() == 130, campaign.text()
    assert campaign.steps() == [2, 3] and "Traceback" not in campaign.text()
    again = light_campaign.start(folder / f"between-{bound}.yaml")
    light_campaign.finish(again, folder / f"between-{bound}.yaml")
    light_campaign.assert_ledger_adds_up(campaign.run_dir, updates=6, size=8, max_staleness=bound)
    if bound:
        return  # which weights sampled what depends on the machine's load
    calm = light_campaign.configuration(folder, "between-calm", **changes)
    light_campaign.finish(light_campaign.start(calm), calm)
    undisturbed, disturbed = (
        light_campaign.fingerprint(folder / "runs" / name) for name in ("between-calm", "between-0")
    )
    assert {k: v for k, v in disturbed.items() if "step_00000003" not in k} == undisturbed


def test_a_second_signal_ends_now_with_what_is_saved(folder: Path) -> None:
    campaign = Campaign(folder, "twice")
    campaign.signal(signal.SIGTERM)
    campaign.signal(signal.SIGTERM)  # as `timeout` does: to the process, and to its group
    until(lambda: "a second SIGINT or SIGTERM ends it now" in campaign.text(), "a line", campaign.process.is_alive)
    campaign.signal(signal.SIGUSR1)  # a scheduler's warning does not insist
    campaign.process.join(0.5)
    assert campaign.process.is_alive()
    campaign.signal(signal.SIGTERM)
    assert campaign.end() == 130, campaign.text()
    assert campaign.steps() == [2] and "SIGTERM again: ended now" in campaign.text()
    last = read_jsonl(campaign.run_dir / "events.jsonl")[-1]
    assert (last["kind"], last["step"], last["cause"]) == ("stopped", 2, "ended at once in update 4")
    assert "Traceback" not in campaign.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_while_the_actors_start_is_one_line(folder: Path, number: Any) -> None:
    campaign = Campaign(folder, f"starting-{number.name}", interrupted_campaign.run_to_start)
    campaign.signal(number)
    assert campaign.end() == 130
    [line] = [line for line in campaign.text().splitlines() if "interrupted" in line]
    assert line.startswith(f"understudy: interrupted ({number.name}) before there was anything")
    assert "Traceback" not in campaign.text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2], ids=lambda n: n.name)
def test_a_signal_during_the_imports_is_one_line(folder: Path, number: Any) -> None:
    light_campaign.configuration(folder, "importing")
    import_of_torch = (
        "import os, signal, sys; sys.meta_path.insert(0, type('F', (), {'find_spec': staticmethod(lambda name, "
    )
    import_of_torch += f"*_: os.kill(os.getpid(), {int(number)}) if name == 'torch' else None)}})())"
    program = f"{import_of_torch}; from cluster.cli import main; main(['run', 'importing.yaml'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130, done.stderr
    assert re.fullmatch(rf"understudy: interrupted \({number.name}\) before .*\n", done.stderr)
    assert done.stdout.endswith("importing Ray and transformers ...\n")


def test_a_terminal_that_closes_leaves_a_checkpoint_and_every_record(folder: Path) -> None:
    campaign = Campaign(folder, "terminal", interrupted_campaign.run_in_a_terminal)
    (campaign.place / "close").touch()
    until((campaign.place / "closed").exists, "a terminal that is closed", campaign.process.is_alive)
    campaign.go()
    assert campaign.end() == 130, campaign.text()
    assert campaign.steps()[-1] == 3 and campaign.kinds()[-1] == "stopped"
    assert json.loads((campaign.run_dir / "summary.json").read_text())["updates"] == campaign.steps()[-1] == 3


def test_output_on_a_full_disk_does_not_end_the_campaign(folder: Path) -> None:
    config = light_campaign.configuration(folder, "unread", pipeline={"updates": 3})
    process = clean_process.start(light_campaign.run_command_here, folder, "run", str(config), log=Path("/dev/full"))
    process.join()
    assert process.exitcode == 0
    assert read_jsonl(folder / "runs" / "unread" / "events.jsonl")[-1]["kind"] == "finished"


def writer_of_a_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def writer_of_a_terminal() -> int:
    ours, theirs = os.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize("gone", [writer_of_a_pipe, writer_of_a_terminal])
def test_output_that_nobody_reads_any_more_is_dropped(gone: Any) -> None:
    with open(gone(), "w") as file:
        stream = LastingStream(file)
        assert stream.write("text") == 4
        stream.writelines(["a", "b"])
        stream.flush()
        os.write(file.fileno(), b"later")  # of others: it does not fail either


def test_a_full_disk_drops_output_and_takes_later_lines() -> None:
    with open("/dev/full", "w") as file:  # closing it flushes it, as the end of Python does
        stream = LastingStream(file)
        assert stream.write("text") == 4
        stream.flush()
        assert os.readlink(f"/proc/self/fd/{file.fileno()}") == "/dev/full"


def test_a_reader_that_stands_still_is_waited_for_once_and_gets_later_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.01)
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        stream = LastingStream(file)
        stream.write("a" * (1 << 20) + "\n")  # a pipe holds 64 KiB: without patience's end this waits for ever
        monkeypatch.setattr(terminal, "PATIENCE_SECONDS", None)  # select's word for ever
        stream.write("dropped")
        taken = len(os.read(reader, 1 << 20))
        assert 4096 <= taken < 1 << 20
        stream.write("later")
        assert os.read(reader, 100) == b"later"
    os.close(reader)


def test_output_is_as_before_after_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with lasting_output():
            assert sys.stdout is not file
            print("é\udcff", end="")
        assert sys.stdout is file
    assert (tmp_path / "out").read_text() == "é\\udcff"


def test_handlers_are_as_before_and_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().heard():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            for number in (signal.SIGINT, signal.SIGTERM, *WARNINGS[1:]):
                assert callable(signal.getsignal(number)) and signal.getsignal(number) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)
