"""Campaigns with an environment: episodes of several turns, each trained exactly once or dropped with its reason."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.data.trajectory_shards import opened, shards_in
from actors.errors import UserError
from actors.trajectory import Trajectories
from cluster.config_file import load_config
from cluster.fleet.ray_actor import Resources
from cluster.records.writer import read_jsonl
from cluster.state.campaign_state import CampaignState, read_state
from cluster.state.summary import summarise
from tests.documented import ROOT, python_examples
from tests.light_campaign import assert_ledger_adds_up, configuration, fingerprint, finish, make_folder, start
from tests.tiny_models import make_tiny_model

__all__ = ["ROOT", "UPDATES", "campaign"]
GUESS = "tests.guessing:Guess"
STOPS = list(range(7, 60))
"""Half of the tokens end a turn: an untrained model stops after one or two."""
UPDATES, SHORT = 3, 2


def campaign(folder: Path, name: str, environment: dict[str, Any], **changes: Any) -> Path:
    own = {"name": GUESS, "step_timeout_seconds": 100, **environment}
    common: dict[str, Any] = {
        "environment": own,
        "sampling": {"max_response_tokens": 44, "stop_token_ids": STOPS},
        "pipeline": {"updates": UPDATES, "prompts_per_update": 4, "samples_per_prompt": 2},
        "checkpoint": {"every_updates": 1},
    }
    for section, values in changes.items():
        common[section] = {**common.get(section, {}), **values}
    return configuration(folder, name, **common)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("environments"))


def test_a_campaign_with_episodes_that_fail_repeats_to_the_bit(folder: Path) -> None:
    """Attempts that raise, hang or return nonsense, and a kill in the middle, change nothing but the retries."""
    faults = {"calm": {}, "faulty": {"fails": "all", "each": 1}}
    # A busy machine makes some attempts late, too: each is begun again until it is in time.
    limits = {"calm": {}, "faulty": {"step_timeout_seconds": 1.0, "attempts": 50}}
    short = {"pipeline": {"updates": SHORT}}
    files = {
        name: campaign(
            folder, name, {"arguments": {**own, "log": str(folder / f"{name}.episodes")}, **limits[name]}, **short
        )
        for name, own in faults.items()
    }
    running = {name: start(file, 60 if name == "faulty" else None) for name, file in files.items()}
    running["faulty"].join()
    assert running["faulty"].exitcode == -9
    running["faulty"] = start(files["faulty"])
    for name, process in running.items():
        finish(process, files[name])
        assert_ledger_adds_up(folder / "runs" / name, SHORT, 8, 0)
    assert fingerprint(folder / "runs" / "faulty") == fingerprint(folder / "runs" / "calm")
    calm, faulty = (read_jsonl(folder / "runs" / name / "metrics.jsonl")[1:] for name in ("calm", "faulty"))
    assert sum(row["episode_retries"] for row in calm) == 0
    assert sum(row["episode_retries"] for row in faulty) >= 8 * SHORT
    for row in calm:
        assert 1 < row["turns_mean"] <= 3 and 0 < row["context_share"] < 1
        assert (
            0 < row["environment_seconds_mean"] < row["episode_seconds_mean"] and row["environment_idle_seconds"] >= 0
        )
    state = read_state(folder / "runs/faulty/checkpoints" / f"step_{SHORT:08d}")  # its times are those of two processes
    assert state.environment_seconds == pytest.approx(sum(row["environment_seconds_mean"] for row in faulty))
    # The ids and the seeds of a retry are those of the first attempt.
    attempts: dict[str, set[tuple[str, str]]] = {}
    for line in (folder / "faulty.episodes").read_text().splitlines():
        id_, attempt, seed, _ = line.split()
        attempts.setdefault(id_, set()).add((attempt, seed))
    assert all({attempt for attempt, _ in of} >= {"0", "1"} for of in attempts.values())
    assert all(len({seed for _, seed in of}) == 1 for of in attempts.values())


def test_a_schedule_limits_the_turns_of_training_alone(folder: Path) -> None:
    own = {"arguments": {"turns": 9}, "max_turns": 4, "turns_schedule": [[1, 1], [3, 2]]}
    file = campaign(folder, "turns", own, pipeline={"max_staleness": 1}, evaluation={"every_updates": UPDATES})
    first = start(file, 25)
    first.join()
    assert first.exitcode == -9
    finish(start(file), file)
    rows = read_jsonl(folder / "runs/turns/metrics.jsonl")[1:]
    assert [row["turns_mean"] for row in rows[:2]] == [1, 1] and 1 < rows[2]["turns_mean"] <= 2
    samples = [row for path in (folder / "runs/turns/trajectories").glob("*") for row in read_jsonl(path)]
    held_out = [row["response"] for row in samples if row["id"].startswith("-1/")]
    assert any("more2" in text for text in held_out)  # the answer to a second turn, which a third follows
    assert rows[-1]["eval/accuracy"] == 0  # all are cut before their reward


@pytest.mark.parametrize(("staleness", "expected"), [(0, 60 / 30), (2, 60 / (30 / 3)), (3, 60 / 8)])
def test_environments_are_a_stage_that_the_loop_is_compared_with(folder: Path, staleness: int, expected: float) -> None:
    config = load_config(campaign(folder, f"compared-{staleness}", {}, pipeline={"max_staleness": staleness}))
    state = CampaignState(loop_seconds=60.0, environment_seconds=30.0)
    state.busy |= {"rollout": 5.0, "teacher": 16.0, "learner": 1.0}
    needed = {role: (2 if role == "teacher.default" else 1, Resources(1.0, 0.0))
              for role in ("rollout", "environment", "teacher.default", "learner")}  # fmt: skip
    assert summarise(config, state, 0.0, needed)["wall_over_slowest_stage"] == pytest.approx(expected)


def test_an_episode_that_fails_in_all_attempts_is_dropped_with_its_reason_and_replaced(folder: Path) -> None:
    own = {"arguments": {"fails": "raises", "times": 9, "each": 3, "own_prompt": True}, "attempts": 2}
    more = {"prompts": {"max_prompt_tokens": 16}, "learner": {"objective": {"estimator": "reward"}}}
    running = {}
    for name, staleness in (("dropped", 0), ("dropped_later", 1)):
        file = campaign(folder, name, own, **more, pipeline={"max_staleness": staleness, "updates": SHORT})
        running[name] = (staleness, file, start(file))
    for name, (staleness, file, process) in running.items():
        finish(process, file)
        run = folder / "runs" / name
        assert_ledger_adds_up(run, SHORT, 8, staleness)
        dropped = [row for row in read_jsonl(run / "ledger.jsonl") if row.get("reason") == "environment"]
        assert dropped and all("ValueError: the game is broken (guessing.py, line" in row["cause"] for row in dropped)
        events, rows = read_jsonl(run / "events.jsonl"), read_jsonl(run / "metrics.jsonl")
        assert "trajectory_refused" in {row["kind"] for row in events}
        failed = [row["count"] for row in events if row["kind"] == "episodes_failed"]
        assert all(failed) and len(failed) == sum("eval/accuracy" in row for row in rows), "once for each evaluation"
        kept = [row for path in (run / "trajectories").iterdir() for row in read_jsonl(path)]
        shown = [row["prompt"] for row in kept if row["finish_reason"] != "abort"]
        assert shown and all(prompt.startswith("<user>Now ") for prompt in shown), (
            "what `reset` wrote, not the record's"
        )
        assert np.isfinite([row["reward_mean"] for row in rows[1:]]).all() and 0 <= rows[0]["eval/accuracy"] <= 1


def test_programs_that_fail_and_a_kill_change_nothing_and_their_keys_are_written_nowhere(folder: Path) -> None:
    agent, kills = str(ROOT / "tests/agent.py"), {"calm_programs": None, "programs": 60}
    arguments = {"calm_programs": [], "programs": ["--what", "raises", "--each", "2"]}
    files = {
        name: campaign(
            folder, name, {"name": None, "command": ["python", agent, *arguments[name]]}, pipeline={"updates": SHORT}
        )
        for name in kills
    }
    running = {name: start(file, kills[name]) for name, file in files.items()}
    running["programs"].join()
    assert running["programs"].exitcode == -9
    running["programs"] = start(files["programs"])
    for name, process in running.items():
        finish(process, files[name])
        run = folder / "runs" / name
        assert_ledger_adds_up(run, SHORT, 8, 0)
        written = [path.read_bytes() for path in [*run.rglob("*"), files[name].with_suffix(".log")] if path.is_file()]
        assert len(written) > 10 and not any(re.search(rb"sk-[0-9a-f]{8}", content) for content in written)
    assert fingerprint(folder / "runs" / "programs") == fingerprint(folder / "runs" / "calm_programs")
    rows = read_jsonl(folder / "runs" / "programs" / "metrics.jsonl")[1:]
    assert all(row["episode_retries"] and 1 < row["turns_mean"] <= 3 for row in rows)


def test_a_program_with_several_conversations_trains_each_of_its_turns_once_and_repeats_to_the_bit(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path)
    for seed, name in enumerate(("student", "teacher")):
        make_tiny_model(folder / name, hidden=32, layers=1, context=256, seed=seed)
    agent = ["python", str(ROOT / "tests/agent.py"), "--turns", "2", "--branches"]
    own = {"name": None, "command": agent, "episodes_per_replica": 3}
    more: dict[str, Any] = {
        "learner": {"objective": {"estimator": "reward"}},
        "sampling": {"max_response_tokens": 240},
        "pipeline": {"updates": SHORT},
    }
    files = {name: campaign(folder, name, own, **more) for name in ("branches", "branches_again")}
    for file in files.values():
        file.write_text(f"{file.read_text()}record: true\n")
    running = {name: start(file) for name, file in files.items()}
    for name, process in running.items():
        finish(process, files[name])
        assert_ledger_adds_up(folder / "runs" / name, SHORT, 8, 0)
    run = folder / "runs" / "branches"
    assert fingerprint(run) == fingerprint(folder / "runs" / "branches_again")
    rows = read_jsonl(run / "metrics.jsonl")[1:]
    assert all(row["conversations_mean"] > 4 and row["turns_mean"] > 5 and not row["episode_retries"] for row in rows)
    written = [
        one for shards in shards_in(run / "record").values() for one in opened(shards) if isinstance(one, Trajectories)
    ]
    over = [(one, row) for one in written for row in np.flatnonzero(~one.truncated)]
    # After each of two turns one of a sub-agent, and three that go on from it, of which the last is the next or the end.
    assert over and all(one.turn_counts[row] == 8 for one, row in over)
    assert all(one.begins[slice(*one.response_offsets[row : row + 2])].sum() == 5 for one, row in over)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"environment": {"command": ["true"]}}, "environment.command: found a program, and a class in environment.name"),
        ({"environment": {"name": None}}, "environment: found neither a class nor a program, expected"),
        ({"environment": {"name": None, "command": []}}, "environment: found neither a class nor a program, expected"),
        ({"environment": {"name": None, "command": [""]}}, "environment.command: found [''], expected a program and"),
        ({"environment": {"name": "guess"}}, "environment.name: found 'guess', expected the import path of a class"),
        ({"environment": {"name": None, "command": ["true"], "arguments": {"a": 1}}}, "environment.arguments: found"),
        ({"environment": {"name": None, "command": ["true"]},
          "teachers": {"default": {"model": "m", "prompt_template": "{prompt}"}}}, "teachers.default.prompt_template"),
    ],
)  # fmt: skip
def test_what_a_program_goes_with(folder: Path, changes: dict, told: str) -> None:
    file = configuration(folder, "wrong", **{**changes, "environment": {"name": GUESS, **changes["environment"]}})
    with pytest.raises(UserError, match=re.escape(told)):
        load_config(file)


def test_an_environment_that_never_works_ends_the_campaign_before_the_first_update(folder: Path) -> None:
    file = campaign(folder, "broken", {"arguments": {"fails": "raises", "times": 9, "each": 1}, "attempts": 1})
    process = start(file)
    process.join()
    assert process.exitcode == 1
    log = file.with_suffix(".log").read_text()
    assert "environment: all 8 episodes of an evaluation have failed" in log and "the game is broken" in log


def test_the_page_shows_the_game_and_the_agent_of_the_example() -> None:
    game, _, agent = python_examples("docs/environments.md")
    for shown, file in ((game, "game.py"), (agent, "agent.py")):
        assert (ROOT / "examples/guess" / file).read_text("utf-8").endswith(shown)
        assert len(shown.splitlines()) <= 25
