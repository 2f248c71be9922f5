"""Campaigns with an environment: episodes of several turns, each trained exactly once or dropped with its reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.records.writer import read_jsonl
from tests.documented import ROOT
from tests.light_campaign import assert_ledger_adds_up, configuration, fingerprint, finish, make_folder, start

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
    # The ids and the seeds of a retry are those of the first attempt.
    attempts: dict[str, set[tuple[str, str]]] = {}
    for line in (folder / "faulty.episodes").read_text().splitlines():
        id_, attempt, seed, _ = line.split()
        attempts.setdefault(id_, set()).add((attempt, seed))
    assert all({attempt for attempt, _ in of} >= {"0", "1"} for of in attempts.values())
    assert all(len({seed for _, seed in of}) == 1 for of in attempts.values())


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
        events = {row["kind"] for row in read_jsonl(run / "events.jsonl")}
        assert {"trajectory_refused", "episodes_failed"} <= events
        rows = read_jsonl(run / "metrics.jsonl")
        assert np.isfinite([row["reward_mean"] for row in rows[1:]]).all() and 0 <= rows[0]["eval/accuracy"] <= 1


def test_an_environment_that_never_works_ends_the_campaign_before_the_first_update(folder: Path) -> None:
    file = campaign(folder, "broken", {"arguments": {"fails": "raises", "times": 9, "each": 1}, "attempts": 1})
    process = start(file)
    process.join()
    assert process.exitcode == 1
    log = file.with_suffix(".log").read_text()
    assert "environment.name: all 4 episodes of an evaluation have failed" in log and "the game is broken" in log


def test_the_page_shows_the_game_of_the_example() -> None:
    shown = (ROOT / "docs/environments.md").read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    assert (ROOT / "examples/guess/game.py").read_text("utf-8").endswith(shown)
    assert len(shown.splitlines()) <= 25
