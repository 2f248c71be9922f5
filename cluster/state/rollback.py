"""What guards do to a campaign: warnings, an end with an error, and the way back to a checkpoint.

A campaign that is rolled back goes on with the weights of an earlier update, with other prompts and a lower learning
rate. What was trained on since is dropped in the ledger, `rolled_back` being the reason, so that every trajectory is in
the weights once or accounted for; the metrics of the updates that were undone are kept in undone.jsonl.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.errors import GuardError
from cluster.config import CampaignConfig
from cluster.guards import Finding
from cluster.records.event_table import GUARD_EVENTS
from cluster.records.writer import RunRecords
from cluster.state.campaign_state import STATE_FILE, CampaignState, read_state, write_state
from cluster.state.resume import fit_records
from learner.student.checkpoint import checkpoint_steps, prune, step_directory


class RollBack(Exception):
    """A guard wants the campaign to go on from an earlier checkpoint; `cluster/run.py` does it."""

    def __init__(self, finding: Finding):
        super().__init__(finding.reason)
        self.finding = finding


def act(findings: Iterable[Finding], rate_scale: float, config: CampaignConfig, tell: Callable[..., None]) -> None:
    """Tells of what the guards found in one update. GuardError: the campaign ends. RollBack: it goes on from before."""
    worst = sorted(findings, key=lambda finding: list(GUARD_EVENTS).index(finding.action))
    for finding in worst:
        if finding.action in ("warn", "lower_rate"):
            scaled = {"rate_scale": rate_scale} if finding.action == "lower_rate" else {}
            tell(GUARD_EVENTS[finding.action], **fields(finding), **scaled)
    if worst and worst[-1].action == "roll_back":
        raise RollBack(worst[-1])
    if worst and worst[-1].action == "stop":
        finding = worst[-1]
        tell(GUARD_EVENTS["stop"], **fields(finding))
        checkpoint = last_good(config, finding)
        good = f"{checkpoint} is from before that" if checkpoint else "there is no checkpoint from before that"
        raise GuardError(f"guards.{finding.guard}: update {finding.step}: {finding.reason}; {good}")


def fields(finding: Finding) -> dict[str, Any]:
    """What an event says of a finding."""
    told = {"step": finding.step, "guard": finding.guard, "metric": finding.metric}
    return {**told, "value": finding.value, "bound": finding.bound, "cause": finding.reason}


def last_good(config: CampaignConfig, finding: Finding) -> Path | None:
    """The newest checkpoint from before the weights that made the metric go out of bounds.

    An update's metrics are of responses that the weights before it have written, or with staleness older ones: those are
    the suspects, whatever the update itself was like.
    """
    checkpoints = config.run_dir / "checkpoints"
    suspect = finding.since - 1 - config.pipeline.max_staleness
    steps = [step for step in checkpoint_steps(checkpoints) if step < suspect]
    return step_directory(checkpoints, steps[-1]) if steps else None


def roll_back(
    config: CampaignConfig, now: CampaignState, finding: Finding, records: RunRecords, tell: Callable[..., None]
) -> tuple[CampaignState, Path | None]:
    """The state to go on from, and its checkpoint; None: the untrained student. No checkpoint may be under way.

    The checkpoint's own record of the campaign is replaced: a campaign that is killed from here on goes on from the
    rolled back state. Killed before, it takes the same updates again, and the guard acts again.
    """
    checkpoint = last_good(config, finding)
    then = read_state(checkpoint) if checkpoint else CampaignState()
    state = replace(
        now,
        step=then.step,
        ledger=now.ledger.rolled_back(then.ledger),
        guards=now.guards.rolled_back(then.guards),
        pending=[record for record in now.pending if record["step"] <= then.step],
        evaluations={step: found for step, found in now.evaluations.items() if step <= then.step},
    )
    records.set_aside_after(then.step, now.pending)
    if checkpoint:
        write_state(state, checkpoint / STATE_FILE)
    checkpoints = config.run_dir / "checkpoints"
    if checkpoints.is_dir():
        prune(checkpoints, [step for step in checkpoint_steps(checkpoints) if step <= then.step])
    fit_records(config, records, state)
    dropped = now.ledger.trained - state.ledger.trained
    tell(
        GUARD_EVENTS["roll_back"],
        **fields(finding),
        to_step=state.step,
        dropped=dropped,
        rate_scale=state.guards.rate_scale,
    )
    return state, checkpoint
