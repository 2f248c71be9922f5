"""Campaigns that guards act in: with fake fleets, entropy rises; with a real learner, no token is left."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.errors import GuardError
from cluster.config import CampaignConfig
from cluster.guards import GuardConfig
from cluster.loop.campaign import Campaign
from cluster.records.writer import RunRecords, read_jsonl
from cluster.state.campaign_state import CampaignState
from cluster.state.resume import fit_records, take_up
from cluster.state.rollback import RollBack, roll_back
from learner.student.checkpoint import checkpoint_steps
from tests import light_campaign
from tests.states import load_state
from tests.unit.cluster.test_campaign import SIZE, FakeLearner, World, campaign, configuration, run

UPDATES, COLLAPSE = 12, 6


class Collapsing(FakeLearner):
    """Its entropy is 5 from update 6 on, unless the rate has been lowered."""

    rates: list[float]

    async def call(self, method: str, *arguments: Any, rate_scale: float = 1.0, **_: Any) -> Any:
        answer = await super().call(method, *arguments)
        if method == "update":
            self.rates.append(rate_scale)
            return answer | {"entropy": 5.0 if self.world.version >= COLLAPSE and rate_scale == 1 else 0.5}
        return answer


def made(config: CampaignConfig, world: World) -> Campaign:
    one = campaign(config, world)
    fit_records(config, RunRecords(config.run_dir), one.state)
    one.learner = Collapsing(world, 1)  # type: ignore[assignment]
    one.learner.rates = []  # type: ignore[attr-defined]
    return one


def settings(tmp_path: Path, bound: int = 0, **guard: Any) -> CampaignConfig:
    config = configuration(tmp_path, updates=UPDATES, bound=bound, save_every=2)
    config.guards = {"collapse": GuardConfig("entropy", above=1.0, **{"updates": 2, "action": "roll_back"} | guard)}
    return config


def collapse(config: CampaignConfig, world: World) -> tuple[Campaign, RollBack]:
    one = made(config, world)
    with pytest.raises(RollBack) as caught:
        run(one)
    return one, caught.value


def back(config: CampaignConfig, one: Campaign, wanted: RollBack) -> CampaignState:
    events: list[dict[str, Any]] = []
    records = RunRecords(config.run_dir)
    state, _ = roll_back(
        config, one.state, wanted.finding, records, lambda kind, **f: events.append({"kind": kind, **f})
    )
    (event,) = events
    assert event["kind"] == "guard_rolled_back" and event["to_step"] == state.step and event["step"] == 7
    assert event["cause"] == "entropy is 5, above 1, the 2nd update in a row"
    return state


@pytest.mark.parametrize(("bound", "to"), [(0, 4), (2, 2)])
def test_a_campaign_that_is_rolled_back_goes_on_and_every_trajectory_is_trained_once_or_accounted_for(
    tmp_path: Path, bound: int, to: int
) -> None:
    config, world = settings(tmp_path, bound), World(bound=bound, delay=0.003, seed=bound)
    one, wanted = collapse(config, world)
    assert wanted.finding.since == COLLAPSE and len(world.trained) == 7
    state = back(config, one, wanted)
    # The first bad update was the sixth: versions from 5 - bound wrote its responses, and an earlier one is gone back to.
    assert state.step == to < COLLAPSE - 1 - bound
    assert checkpoint_steps(config.run_dir / "checkpoints") == list(range(2, to + 1, 2))
    other = made(config, world)
    assert run(other) is True
    assert set(other.learner.rates) == {0.5} and len(other.learner.rates) == UPDATES - to  # type: ignore[attr-defined]
    trained = [row for update in world.trained for row in update]
    assert len(trained) == len(set(trained)) == (7 + UPDATES - to) * SIZE
    ledger = other.state.ledger
    assert ledger.dropped["rolled_back"] == (7 - to) * SIZE and ledger.trained == UPDATES * SIZE
    assert ledger.next_number == ledger.trained + ledger.dropped.total()
    rows = read_jsonl(config.run_dir / "ledger.jsonl")
    assert [row["step"] for row in rows if row.get("reason") == "rolled_back"] == list(range(to + 1, 8))
    take_up(config, RunRecords(config.run_dir))  # finds every closed trajectory in the file, once
    assert [row["step"] for row in read_jsonl(config.run_dir / "metrics.jsonl")] == list(range(1, UPDATES + 1))
    undone = read_jsonl(config.run_dir / "undone.jsonl")
    assert [(row["step"], row["entropy"]) for row in undone] == [
        (step, 0.5 if step < 6 else 5.0) for step in range(to + 1, 8)
    ]


def test_the_state_that_was_rolled_back_is_what_a_killed_campaign_goes_on_from(tmp_path: Path) -> None:
    config, world = settings(tmp_path), World(bound=0)
    state = back(config, *collapse(config, world))
    found, checkpoint = load_state(config)
    assert checkpoint == config.run_dir / "checkpoints" / "step_00000004"
    assert found.to_json() == json.loads(json.dumps(state.to_json() | {"evaluations": {}}))
    assert found.guards.rate_scale == 0.5 and found.guards.watches["collapse"].acted == 1


def test_a_campaign_that_is_killed_before_it_is_rolled_back_comes_to_the_same(tmp_path: Path) -> None:
    calm, stormy = settings(tmp_path / "calm"), settings(tmp_path / "stormy")
    worlds = World(bound=0), World(bound=0)
    for config, world in zip((calm, stormy), worlds, strict=True):
        one, wanted = collapse(config, world)
        if config is stormy:  # nothing is done about it: the process is gone, and step 6 is the newest checkpoint
            one, again = collapse(config, world)
            assert again.finding == wanted.finding
        back(config, one, wanted)
        assert run(made(config, world))
    assert worlds[0].trained[-8:] == worlds[1].trained[-8:]
    states = [load_state(config)[0].to_json() for config in (calm, stormy)]
    assert states[0]["ledger"] == states[1]["ledger"] and states[0]["guards"] == states[1]["guards"]


def test_without_a_checkpoint_from_before_the_campaign_begins_anew(tmp_path: Path) -> None:
    config, world = settings(tmp_path), World(bound=0)
    config.checkpoint.every_updates = 6
    one, wanted = collapse(config, world)
    state = back(config, one, wanted)
    assert state.step == 0 and not checkpoint_steps(config.run_dir / "checkpoints")
    assert state.ledger.dropped == {"rolled_back": 7 * SIZE} and state.ledger.next_number == 7 * SIZE


def test_a_guard_that_stops_says_why_and_which_checkpoint_is_good(tmp_path: Path) -> None:
    config, world = settings(tmp_path, action="stop"), World(bound=0)
    with pytest.raises(
        GuardError, match=r"guards.collapse: update 7: entropy is 5, above 1.*step_00000004 is from before"
    ):
        run(made(config, world))
    (event,) = (row for row in read_jsonl(config.run_dir / "events.jsonl") if row["kind"].startswith("guard"))
    assert (event["kind"], event["metric"], event["value"], event["bound"]) == ("guard_stopped", "entropy", 5.0, 1.0)


def test_a_guard_that_lowers_the_rate_does_so_from_the_next_update_on_and_also_after_a_restart(tmp_path: Path) -> None:
    config, world = settings(tmp_path, action="lower_rate"), World(bound=0)
    config.pipeline.updates = 8
    one = made(config, world)
    assert run(one)
    assert one.learner.rates == [1.0] * 7 + [0.5]  # type: ignore[attr-defined]
    config.pipeline.updates = 10
    again = made(config, world)
    assert run(again) and again.learner.rates == [0.5, 0.5]  # type: ignore[attr-defined]


def test_a_warning_is_an_event_and_changes_nothing(tmp_path: Path) -> None:
    config, world = settings(tmp_path, action="warn"), World(bound=0)
    one = made(config, world)
    assert run(one) and set(one.learner.rates) == {1.0}  # type: ignore[attr-defined]
    kinds = [row["kind"] for row in read_jsonl(config.run_dir / "events.jsonl")]
    assert kinds.count("guard_warned") == 1


def test_a_campaign_whose_updates_have_no_token_ends_with_the_reason(tmp_path: Path) -> None:
    objective = {"masked_token_ids": list(range(102))}  # all that the tiny tokenizer has
    learner = {"compute_dtype": "float32", "objective": {**objective, "masked_token_roles": ["end_of_sequence"]}}
    config = light_campaign.configuration(light_campaign.make_folder(tmp_path), "silent", learner=learner)
    process = light_campaign.start(config)
    process.join()
    run, log = tmp_path / "runs" / "silent", config.with_suffix(".log").read_text()
    rows, events = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "events.jsonl")
    assert process.exitcode == 1 and "tokens_trained is 0, below 1, the 10th update in a row" in log, log[-3000:]
    assert "scores are missing (is the teacher well?), or masks are too wide" in log
    assert [row["steps_skipped"] for row in rows if row["step"]] == [1] * len(rows[1:]) and len(rows) >= 9
    warned = [event["guard"] for event in events if event["kind"] == "guard_warned"]
    assert warned.count("skipped_steps") == 1 and warned.count("no_step") == 1
