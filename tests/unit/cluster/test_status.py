"""What `understudy status` and `understudy tail` say of runs in every state, from files alone."""

import asyncio
import errno
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.errors import UserError
from cluster.cli import main
from cluster.console import status as status_module
from cluster.console.runs import find_run
from cluster.console.screen import status_line, status_screen, summary_table, trajectory_text
from cluster.console.status import LOST_AFTER_SECONDS, StatusReader, keep_status, read_status, write_status
from cluster.records.event_table import describe
from cluster.records.reader import JsonlTail
from cluster.records.writer import RunRecords, read_jsonl, trajectory_files
from tests.fake_run import make_fake_run

LIVE = {
    "roles": {"rollout": "64 trajectories", "teacher": "idle", "learner": "update 26"},
    "actors": [
        {"name": "rollout-0", "alive": True, "restarts": 0, "under_way": 64, "version": 41},
        {"name": "rollout-1", "alive": False, "restarts": 2, "under_way": 0, "version": 39},
        {"name": "teacher.default-0", "alive": True, "restarts": 0, "under_way": 0},
        {"name": "learner-0", "alive": True, "restarts": 0, "under_way": 1},
    ],
    "ledger": {"issued": 1700, "sampled": 10, "scored": 3, "trained": 1600, "dropped": 2},
}


@pytest.fixture
def running(tmp_path: Path) -> Path:
    run = make_fake_run(tmp_path / "running", updates=25, of=100)
    write_status(run, LIVE)
    return run


def shown(status: dict[str, Any], width: int = 140) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(status_screen(status))
    return console.export_text()


def test_a_running_campaign_is_told_with_rates_and_what_limits_it(running: Path) -> None:
    status = read_status(running)
    rows = [row for row in read_jsonl(running / "metrics.jsonl") if row["step"] > 0]
    seconds = (rows[-1]["wall_seconds"] - rows[5]["wall_seconds"]) / 19
    assert status["state"] == "running"
    assert (status["update"], status["updates"]) == (25, 100)
    assert status["updates_per_hour"] == pytest.approx(3600 / seconds, rel=1e-3)
    assert status["seconds_left"] == pytest.approx(75 * seconds, rel=1e-3)
    assert status["bottleneck"].startswith("rollout-bound: a third rollout actor would give +")
    assert status["ledger"] == LIVE["ledger"]
    text = shown(status)
    assert "running" in text and "update 25/100" in text and "left" in text
    rollout = next(line for line in text.splitlines() if line.strip().startswith("rollout"))
    assert "1/2" in rollout and "64 trajectories" in rollout and "39 to 41" in rollout
    teacher = next(line for line in text.splitlines() if line.strip().startswith("teacher"))
    assert "1/1" in teacher


def test_nothing_is_foretold_while_no_update_comes_and_it_is_said_who_is_silent(running: Path) -> None:
    silent = {**LIVE["actors"][0], "silent_seconds": 200.0, "behind": False}
    behind = {**LIVE["actors"][1], "alive": True, "silent_seconds": 0.0, "behind": True}
    live = {**LIVE, "actors": [silent, behind, *LIVE["actors"][2:]], "last_update_seconds_ago": 185.0}
    write_status(running, {**live, "waits_for": "the disk takes no writes"})
    status = read_status(running)
    assert status["stands"] and status["seconds_left"] is None and status["bottleneck"] == ""
    assert 185.0 <= status["last_update_seconds_ago"] < 200.0
    text = shown(status)
    assert "no update for 3m" in text and "rollout-0 is silent for 3m20s" in text and "rollout-1 is behind" in text
    assert "the disk takes no writes" in text and "left" not in text.splitlines()[0] and "tokens/s" not in text
    write_status(running, {**live, "last_update_seconds_ago": 1.0})
    status = read_status(running)
    assert not status["stands"] and status["seconds_left"] and status["bottleneck"]
    write_status(running, {**live, "last_update_seconds_ago": 1.0, "state": "paused"})
    status = read_status(running)
    assert status["state"] == "paused" and status["seconds_left"] is None and status["bottleneck"] == ""


def test_status_is_written_in_place_where_a_new_file_finds_no_room(
    running: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_status(running, {**LIVE, "padding": "x" * 100})
    monkeypatch.setattr(status_module, "write_atomically", full)
    write_status(running, {**LIVE, "waits_for": "the disk"})
    assert read_status(running)["waits_for"] == "the disk"


def test_a_task_beside_the_loop_survives_its_errors_and_tells_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([ValueError("a"), ValueError("a"), OSError("b"), None])
    told: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(status_module, "EVERY_SECONDS", 0.001)

    async def work() -> None:
        if error := next(errors):
            raise error

    asyncio.run(status_module.persistently("commands", work, lambda kind, **fields: told.append((kind, fields))))
    assert [fields["cause"] for _, fields in told] == ["ValueError: a", "OSError: b"]
    assert "commands" in describe(*told[0])


def test_a_campaign_that_has_not_written_for_long_is_lost(running: Path) -> None:
    later = time.time() + LOST_AFTER_SECONDS + 5
    status = read_status(running, now=later)
    assert status["state"] == "lost"
    assert status["seconds_left"] is None
    assert "last seen" in shown(status)
    (running / "status.json").unlink()
    assert read_status(running)["state"] == "lost"


def test_a_campaign_whose_loop_has_not_begun_is_starting(running: Path) -> None:
    with (running / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0, "wall_seconds": 30, "kind": "resumed", "cause": ""}) + "\n")
    assert read_status(running)["state"] == "starting"


@pytest.mark.parametrize("kind", ["finished", "stopped", "failed"])
def test_how_a_campaign_ended_is_told_whatever_its_last_sign_of_life(running: Path, kind: str) -> None:
    with (running / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0, "wall_seconds": 30, "kind": kind, "cause": "E: why"}) + "\n")
    status = read_status(running)
    assert status["state"] == kind
    assert ("E: why" in shown(status).splitlines()[0]) == (kind == "failed")


def test_a_campaign_without_any_update_has_a_screen(running: Path) -> None:
    (running / "metrics.jsonl").unlink()
    status = read_status(running)
    assert status["update"] == 0 and "bottleneck" not in status
    assert "update 0/100" in shown(status)


def test_what_waits_for_each_stage_is_that_of_the_newest_update(running: Path) -> None:
    rows = [json.loads(line) for line in (running / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= {"queue_sample": 3, "queue_sampling": 1234, "queue_score": 0, "queue_train": 7}
    (running / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = read_status(running)
    assert status["queues"] == {"sample": 3, "sampling": 1234, "score": 0, "train": 7}
    assert "sampling 1,234" in shown(status)
    RunRecords(running).event("finished", step=25)
    ended = read_status(running)
    assert ended["queues"] == {} and "queues" not in shown(ended), "nothing waits for a process that has ended"


def test_what_limits_a_campaign_that_was_scaled_is_judged_by_the_actors_that_it_has(running: Path) -> None:
    more = [{"name": f"rollout-{i}", "alive": True, "restarts": 0, "under_way": 0, "version": 1} for i in (2, 3)]
    two = read_status(running)
    write_status(running, {**LIVE, "actors": [*LIVE["actors"], *more]})
    four = read_status(running)
    assert four["utilisation"]["rollout"] == pytest.approx(two["utilisation"]["rollout"] / 2, abs=1e-3)
    assert "a third rollout actor" in two["bottleneck"] and "a third rollout actor" not in four["bottleneck"]


def test_engines_that_wait_for_environments_are_told_from_idle_ones(running: Path) -> None:
    rows = [json.loads(line) for line in (running / "metrics.jsonl").read_text().splitlines()]
    waits = {"environment_seconds_mean": 30.0, "environment_idle_seconds": 0.3}  # of two engines, in half a second
    (running / "metrics.jsonl").write_text("".join(json.dumps(row | waits) + "\n" for row in rows))
    status = read_status(running)
    assert status["waits_for_environments"] == pytest.approx(0.3, abs=0.01)
    assert status["bottleneck"].startswith("environment-bound")
    assert "30% waiting for environments" in shown(status)


def test_rewards_and_turns_of_training_are_told_where_a_campaign_has_them(running: Path) -> None:
    assert "responses" not in shown(read_status(running)) and "turns" not in status_line(read_status(running))
    rows = [json.loads(line) for line in (running / "metrics.jsonl").read_text().splitlines()]
    more = {"reward_mean": 12.625, "turns_mean": 2.03125}
    (running / "metrics.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    status = read_status(running)
    lines = shown(status, width=80).splitlines()
    assert "responses    reward 12.62   turns 2.03" in [line.strip() for line in lines]
    assert all(len(line) <= 80 for line in lines) and "  reward 12.62  turns 2.03" in status_line(status)


def test_what_was_lost_is_named_and_dropped_trajectories_stand_beside_it_with_their_reasons(running: Path) -> None:
    assert "1 actor lost; 2 trajectories dropped" in shown(read_status(running)), "an earlier release gave no reasons"
    write_status(running, {**LIVE, "dropped_because": {"environment": 1, "rolled_back": 1, "stale": 0}})
    told = "1 actor lost; 2 trajectories dropped (environment 1, rolled back 1)"
    assert told in shown(read_status(running))
    summary = {"faults": 1, "ledger": {"dropped": 2}, "dropped_because": {"environment": 1, "rolled_back": 1}}
    assert summary_table(summary).splitlines()[-1] == told
    assert "lost" not in summary_table({**summary, "faults": 0, "ledger": {"dropped": 0}, "dropped_because": {}})


def test_news_are_shown_and_ordinary_events_are_not(running: Path) -> None:
    with (running / "events.jsonl").open("a") as file:
        for kind, cause in (("actor_died", "killed by the kernel"), ("checkpoint", "")):
            file.write(json.dumps({"time": 0, "wall_seconds": 30, "kind": kind, "cause": cause, "step": 9}) + "\n")
    status = read_status(running)
    assert [event["kind"] for event in status["news"]][-1] == "actor_died"
    assert "killed by the kernel" in shown(status)
    with (running / "events.jsonl").open("a") as file:
        event = {"kind": "scaled", "role": "rollout", "before": 1, "after": 2}
        file.write(json.dumps({"time": 0, "wall_seconds": 31, **event}) + "\n")
    assert "rollout: 1 -> 2 actors" in shown(read_status(running))
    assert status["checkpoints"]["step"] == 9


def test_a_run_is_found_by_path_or_by_name_and_a_misspelt_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    run = make_fake_run(home / "understudy-runs" / "quickstart")
    monkeypatch.setenv("HOME", str(home))
    assert find_run("quickstart") == run == find_run(str(run))
    with pytest.raises(UserError, match=r"RUN: found quickstrat.*did you mean 'quickstart'"):
        find_run("quickstrat")


def test_the_live_part_is_kept_fresh(tmp_path: Path) -> None:
    reads: list[int] = []

    async def some_time() -> None:
        task = asyncio.create_task(keep_status(tmp_path, lambda: {"reads": reads.append(1) or len(reads)}))
        while not reads:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(some_time())
    assert json.loads((tmp_path / "status.json").read_text())["reads"] == len(reads)


def test_a_reader_that_follows_a_run_sees_what_a_new_one_sees_also_after_a_rollback(running: Path) -> None:
    reader, now = StatusReader(running), time.time()
    assert reader.read(now=now) == read_status(running, now)
    lines = (running / "metrics.jsonl").read_text().splitlines(keepends=True)
    with (running / "metrics.jsonl").open("a") as file:
        file.write(lines[-1].replace('"step": 25', '"step": 26').rstrip("\n"))  # no newline: still being written
    assert reader.read(now=now)["update"] == 25
    with (running / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert reader.read(now=now)["update"] == 26 and reader.read(now=now) == read_status(running, now)
    RunRecords(running).set_aside_after(20, [])
    for kind in ("actor_died", "checkpoint", "scaled"):
        RunRecords(running).event(kind, actor="rollout-0", step=20, path="p", role="rollout", before=1, after=2)
    found = reader.read(now=now)
    assert found["update"] == 20 and found == read_status(running, now)
    assert found["faults"] == 2 and found["checkpoints"] == {"step": 20, "path": "p"}


class _Steps:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def add(self, row: dict) -> None:
        self.steps.append(row["step"])


def test_a_file_that_was_replaced_twice_may_have_the_inode_and_more_than_the_length_of_the_first(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = JsonlTail(path, _Steps)
    for lines in ([0, 1, 2], [0, 10, 20, 30], [0], [5, 6, 7], []):  # written in place: the inode stays
        path.write_text("".join(json.dumps({"step": step}) + "\n" for step in lines))
        assert reader.read().steps == lines


def test_status_as_json_is_what_is_read(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["status", str(running), "--json"])
    assert status.value.code == 0
    told, read = json.loads(capsys.readouterr().out), read_status(running)
    assert told.keys() == read.keys()
    assert told["ledger"] == read["ledger"]


def test_tokens_are_coloured_by_how_far_student_and_teacher_disagree() -> None:
    row = {
        **{"step": 3, "id": "-1/0/0", "prompt": "p", "finish_reason": "stop", "reference": "x", "reward": 1.0},
        **{"tokens": ["a", "b", "[red]", "d"], "student_logprobs": [-0.1, -0.1, -0.1, -0.1]},
        "teacher_logprobs": [-0.1, -9.0, -0.5, None],
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(trajectory_text(row))
    assert "ab[red]d" in console.export_text(clear=False)
    styles = {
        segment.text: str(segment.style) for segment in console.render(trajectory_text(row)) if segment.text.strip()
    }
    assert "red3" in styles["b"] and "yellow" in styles["[red]"]
    assert styles["a"] != styles["b"] and "dim" in styles["d"]
    told = trajectory_text({**row, "trained": [True, False, True, True]})
    others = {segment.text.strip(): str(segment.style) for segment in console.render(told)}
    assert "italic" in others["b"] and all(others[token] == styles[token] for token in ("[red]", "d"))


def test_tail_says_who_wrote_which_part_of_several_turns() -> None:
    tokens, trained = ["ask", "ing", "4", "2", "again", "so", "done"], [True, True, False, False, False, False, True]
    row = {"step": 3, "id": "0/0/0", "prompt": "p", "finish_reason": "stop", "tokens": tokens, "trained": trained,
           "student_logprobs": [-0.1] * 7, "teacher_logprobs": [-0.1] * 7}  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(trajectory_text(row))
    console.print(trajectory_text({**row, "begins": [4]}))
    lines = [line.split() for line in console.export_text().splitlines()]
    turns = [["turn", "1", "asking"], ["others", "42againso"], ["turn", "2", "done"]]
    assert lines[2:5] == turns
    assert lines[8:12] == [turns[0], ["others", "42"], ["conversation", "2", "againso"], turns[2]]


@pytest.mark.parametrize(
    ("reward", "told"),
    [(None, "unjudged"), (1.0, "right"), (0.0, "wrong"), (0.125, "wrong  reward 0.125"),
     (-1.0, "wrong  reward -1"), (2.5, "right  reward 2.5")],
)  # fmt: skip
def test_a_reward_below_1_is_not_right(reward: float | None, told: str) -> None:
    row = {"step": 3, "id": "0/0/0", "prompt": "p", "finish_reason": "stop", "reward": reward, "tokens": ["a"],
           "student_logprobs": [-0.1], "teacher_logprobs": [-0.1]}  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(trajectory_text(row))
    assert f"update 3  0/0/0  {told}\n" in console.export_text()


def test_tail_shows_the_newest_trajectories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_fake_run(tmp_path / "run")
    newest = max(trajectory_files(run))
    with pytest.raises(SystemExit) as status:
        main(["tail", str(run), "--rows", "2"])
    assert status.value.code == 0
    assert capsys.readouterr().out.count(f"update {newest} ") == 2
