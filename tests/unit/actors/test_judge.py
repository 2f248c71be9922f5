"""Verdicts of a verifier that runs in a process of its own."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from actors.config import VerifierConfig
from actors.data.judge import MOST_IN_A_ROW, Judge
from actors.errors import CampaignError, UserError
from tests.processes import command_of, ended
from tests.waiting import PATIENCE_SECONDS, until

MODULE = """
import ctypes, os, subprocess, sys, time
def word(response, reference):
    print("a line on standard output", flush=True)
    if response == "raise": raise KeyError("left")
    if response == "exit": sys.exit(3)
    if response == "gone": os._exit(3)
    if response == "crash": ctypes.string_at(0)
    if response == "sleep": time.sleep(600)
    if response.startswith("/"):
        open(response, "w").close()
        time.sleep(600)
    if response == "nan": return float("nan")
    if response == "interrupt": raise KeyboardInterrupt
    if response == "large": return 1e308
    if response == "detach": subprocess.Popen(["sleep", "600"], start_new_session=True)
    if response == "close": os.closerange(3, 1000)
    if response == "write":
        for i in range(3, 1000):
            try: os.write(i, b'{"reward": 7}\\n')
            except OSError: pass
    return float(response == reference)
"""


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Judge]]:
    (tmp_path / "words_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    made: list[Judge] = []

    def make(name: str, pattern: str | None = None, seconds: float = 30.0) -> Judge:
        made.append(Judge(VerifierConfig(name, pattern, seconds)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "verifier_process" in " ".join(command_of(child))]


def test_a_pattern_that_never_ends_costs_its_deadline_and_the_next_response_is_judged(judge: Callable) -> None:
    found = judge("regex", r"(.+)+ZZ", seconds=0.5).rewards(["a" * 40, "bZZ", "a" * 40], ["b", "b", "b"])
    assert found.rewards.tolist() == [0.0, 1.0, 0.0]
    assert found.failed == ["no verdict within 0.5 s (evaluation.verifier.timeout_seconds)"] * 2


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("raise", r"words_of_mine:word, which failed (KeyError: 'left')"),
        ("exit", "words_of_mine:word, which failed (SystemExit: 3)"),
        ("nan", "words_of_mine:word, which returned nan"),
        ("interrupt", "KeyboardInterrupt: "),
        ("large", "words_of_mine:word, which returned 1e+308"),
        ("close", "its process ended (exit status 1)"),
        ("gone", "its process ended (exit status 3)"),
        ("crash", "its process ended (signal 11)"),
    ],
)
def test_a_function_that_fails_costs_one_verdict(
    judge: Callable, response: str, reason: str, capfd: pytest.CaptureFixture
) -> None:
    found = judge("words_of_mine:word").rewards(["a", response, "a"], ["a", "a", "b"])
    assert found.rewards.tolist() == [1.0, 0.0, 0.0]
    assert len(found.failed) == 1 and found.failed[0].endswith(reason)
    assert response == "crash" or "Traceback" not in capfd.readouterr().err


def test_what_a_function_writes_to_descriptors_is_no_verdict(judge: Callable) -> None:
    assert judge("words_of_mine:word").rewards(["write", "a"], ["a", "a"]).rewards.tolist() == [0.0, 1.0]


def test_a_detached_program_of_a_function_ends_with_its_process(judge: Callable) -> None:
    one = judge("words_of_mine:word")
    one.rewards(["detach"], ["a"])
    [program] = [child for process in children() for child in process.children() if child.name() == "sleep"]
    one.close()
    until(lambda: ended(program), "the end of the program")


def test_a_function_that_waits_is_ended_and_what_it_prints_is_not_on_standard_output(
    judge: Callable, capfd: pytest.CaptureFixture
) -> None:
    assert judge("words_of_mine:word", seconds=0.5).rewards(["sleep", "a"], ["a", "a"]).rewards.tolist() == [0, 1]
    out, err = capfd.readouterr()
    assert not out and err.count("a line on standard output") == 2


def test_failures_in_a_row_end_the_campaign_and_single_ones_do_not(judge: Callable) -> None:
    one = judge("words_of_mine:word")
    mixed = [*["raise"] * (MOST_IN_A_ROW - 1), "a"] * 2
    assert one.rewards(mixed, ["a"] * len(mixed)).rewards.sum() == 2
    with pytest.raises(CampaignError, match=r"20 responses in a row have no verdict \(the last: .*KeyError"):
        one.rewards(["raise"] * MOST_IN_A_ROW, ["a"] * MOST_IN_A_ROW)


def test_math_gives_verdicts_in_any_thread(judge: Callable) -> None:
    pytest.importorskip("math_verify")
    found: list[np.ndarray] = []
    one = judge("math")
    responses, references = [r"so \boxed{0.5}", "$2$", "1,000"], [r"\frac{1}{2}", "3", "1000"]
    threads = [
        threading.Thread(target=lambda: found.append(one.rewards(responses, references).rewards)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [rewards.tolist() for rewards in found] == [[1, 0, 1]] * 2


def test_a_killed_process_is_replaced_and_no_descriptor_or_process_is_left(judge: Callable) -> None:
    one, before = judge("exact"), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert one.rewards(["a"], ["a"]).rewards.tolist() == [1.0]
        [process] = children()
        process.send_signal(signal.SIGKILL)
        until(lambda p=process: ended(p), "the end of the process")
    one.close()
    assert len(os.listdir("/proc/self/fd")) == before and not children()


def own_memory(process: psutil.Process) -> int:
    """In bytes, without pages of files, such as libraries: how many of those are there is the machine's affair."""
    found = process.memory_info()
    return found.rss - found.shared


def test_many_verdicts_are_fast_and_nothing_grows(judge: Callable) -> None:
    one, count = judge("numeric"), 10_000
    one.rewards(["1"], ["1"])
    [process] = children()
    before = own_memory(process)
    responses = [str(i) for i in range(count)]
    assert one.rewards(responses, responses).rewards.sum() == count
    assert children() == [process] and own_memory(process) - before < 8 << 20


def test_nothing_starts_before_something_is_judged(judge: Callable) -> None:
    one = judge("numeric")
    assert one.try_references(["1", "2"], 1.0) == (2, None)
    assert not children()


def test_closing_ends_a_verdict_that_is_waited_for(judge: Callable, tmp_path: Path) -> None:
    one, begun = judge("words_of_mine:word", seconds=PATIENCE_SECONDS), tmp_path / "begun"
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            one.rewards([str(begun)], ["b"])
        except CampaignError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(begun.exists, "a verdict that has begun")
    one.close()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive() and "closed while" in str(raised[0])


@pytest.mark.parametrize(
    ("name", "references", "tried", "told"),
    [
        ("numeric", ["1", "n/a", "x"], 1, "numeric, and the reference 'n/a'"),
        ("math", ["1", "x^2", "{1,2"], 2, "math, and the reference '{1,2'"),
        ("exact", ["", "n/a"], 2, None),
        ("words_of_mine:word", ["a", "raise"], 1, "KeyError: 'left'"),
        ("words_of_mine:word", ["crash"], 0, "which failed (its process ended (signal 11))"),
    ],
)
def test_references_that_a_verifier_cannot_use_are_found(
    judge: Callable, name: str, references: list[str], tried: int, told: str | None
) -> None:
    if name == "math":
        pytest.importorskip("math_verify")
    found = judge(name).try_references(references, 60.0)
    assert found.tried == tried and (told in str(found.error) if told else found.error is None)


def test_a_module_that_ends_the_process_when_it_is_imported_is_named(tmp_path: Path, judge: Callable) -> None:
    (tmp_path / "gone_at_once.py").write_text("import os\nos._exit(4)\n")
    with pytest.raises(
        UserError, match=r"^evaluation\.verifier\.name: found gone_at_once:f, its process ended \(exit st"
    ):
        judge("gone_at_once:f").rewards(["a"], ["a"])
    with pytest.raises(UserError, match="its process ended"):
        judge("gone_at_once:f").try_references(["a"], 1.0)
