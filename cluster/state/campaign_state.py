"""The campaign's state besides the weights: counts, ledger, guards. Every checkpoint holds it as `training/campaign.json`.

The names of the JSON keys are a file format: a run that an earlier release began is resumed from them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.guards import GuardState
from cluster.records.writer import write_atomically
from cluster.state.ledger import Ledger
from learner.schedule import Plan
from learner.student.checkpoint import read_json
from learner.student.checksums import with_checksum

ROLES = ("rollout", "teacher", "learner")
STATE_FILE = Path("training", "campaign.json")


@dataclass
class CampaignState:
    """Everything that a resumed campaign needs besides the learner's tensors."""

    step: int = 0
    """Updates taken."""
    ledger: Ledger = field(default_factory=Ledger)
    tokens_generated: int = 0
    """Response tokens sampled for training, or replayed."""
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ROLES, 0.0))
    """Role -> seconds of work, summed over the role's actors."""
    environment_seconds: float = 0.0
    """Seconds for which an update's mean episode has waited for its environment, summed over the updates."""
    processor_seconds: float = 0.0
    """Processor time of the actors, of work for training."""
    start: dict[str, Any] = field(default_factory=dict)
    """The evaluation of the untrained student, and the teacher's accuracy."""
    pending: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of updates that are taken and not written to metrics.jsonl yet, oldest first: an update's row is written
    when its weights are loaded and evaluated. A resumed campaign writes those that its predecessor could not."""
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> metrics of that evaluation."""
    baselines: dict[str, Any] = field(default_factory=dict)
    """"start" and "teacher" -> evaluation set -> their scores prompt by prompt, which later evaluations are compared with
    (evaluation_sets.py)."""
    prompts: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Prompt -> its running estimate of the reverse KL and the epoch of its last update (loop/prompt_choice.py); {} where all
    prompts are asked."""
    missing_scores: int = 0
    """Tokens without a finite teacher score, which were masked."""
    loop_seconds: float = 0.0
    """Wall-clock seconds of the loop, over all runs; start-up does not count."""
    guards: GuardState = field(default_factory=GuardState)
    actor_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """How the actors spent these seconds: actor -> state -> seconds (cluster/records/utilisation.py)."""
    faults: int = 0
    """Events that are faults (an actor died, hung ...), over all runs of the campaign."""
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    """The fingerprints of prompts and models (same_inputs.py)."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What has changed the mathematics while the campaign ran (taken_over.py)."""
    plans: list[Plan] = field(default_factory=list)
    """Of a learning rate that was planned anew."""
    software: dict[str, str] = field(default_factory=dict)
    """Name -> version of what runs now."""
    _busy_before: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ROLES, 0.0))
    """`busy` at the last call of `busy_since_last_step`."""
    _counted_before: tuple[int, int] = (0, 0)
    """`tokens_generated` and `missing_scores` at that call."""

    def busy_since_last_step(self) -> dict[str, float]:
        """Role -> seconds of work since the last call; called once an update."""
        since = {role: self.busy[role] - self._busy_before[role] for role in ROLES}
        self._busy_before = dict(self.busy)
        self._counted_before = self.tokens_generated, self.missing_scores
        return since

    def uncount_open(self) -> None:
        """Before the checkpoint of an interrupt: what was sampled since the last update is sampled again, and counts then."""
        self.tokens_generated, self.missing_scores = self._counted_before

    def keep_of(self, now: "CampaignState") -> None:
        """After going back to an earlier checkpoint: takes from the state before what is of this run and not of that step."""
        self.inputs, self.history, self.plans, self.software = now.inputs, now.history, now.plans, now.software
        self.faults = now.faults  # events stay on record, so their count does not go back either

    def to_json(self) -> dict[str, Any]:
        """The content of `training/campaign.json`."""
        return {
            "step": self.step,
            "ledger": self.ledger.to_json(),
            "tokens_generated": self.tokens_generated,
            "busy": self.busy,
            "environment_seconds": self.environment_seconds,
            "processor_seconds": self.processor_seconds,
            "start": self.start,
            "pending": self.pending,
            "evaluations": self.evaluations,
            "baselines": self.baselines,
            "prompts": [[prompt, *own] for prompt, own in self.prompts.items()],
            "missing_scores": self.missing_scores,
            "loop_seconds": self.loop_seconds,
            "guards": self.guards.to_json(),
            "actor_seconds": self.actor_seconds,
            "faults": self.faults,
            "inputs": self.inputs,
            "history": self.history,
            "plans": [plan.to_json() for plan in self.plans],
            "software": self.software,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "CampaignState":
        """The inverse of `to_json`."""
        return cls(
            step=content["step"],
            ledger=Ledger.from_json(content["ledger"]),
            tokens_generated=content["tokens_generated"],
            busy=dict(content["busy"]),
            environment_seconds=content.get("environment_seconds", 0.0),
            processor_seconds=content.get("processor_seconds", 0.0),
            start=content["start"],
            pending=content["pending"],
            # JSON has turned the keys into text.
            evaluations={int(step): metrics for step, metrics in content["evaluations"].items()},
            baselines=content.get("baselines", {}),
            prompts={prompt: (estimate, epoch) for prompt, estimate, epoch in content.get("prompts", [])},
            missing_scores=content["missing_scores"],
            loop_seconds=content["loop_seconds"],
            # Checkpoints of releases without guards, or without seconds for each actor, lack these keys.
            guards=GuardState.from_json(content.get("guards", {})),
            actor_seconds=content.get("actor_seconds", {}),
            faults=content["faults"],
            inputs=content.get("inputs", {}),
            history=content.get("history", []),
            plans=[Plan(**plan) for plan in content.get("plans", [])],
            software=content.get("software", {}),
            _busy_before=dict(content["busy"]),
            _counted_before=(content["tokens_generated"], content["missing_scores"]),
        )


def read_state(checkpoint: Path) -> CampaignState:
    """The state in a checkpoint directory."""
    return CampaignState.from_json(read_json(checkpoint / STATE_FILE))


def state_text(state: CampaignState) -> str:
    """The content of a checkpoint's state file, with its checksum."""
    return with_checksum(json.dumps(state.to_json()))


def write_state(state: CampaignState, path: Path) -> None:
    """Replaces a checkpoint's state file atomically."""
    write_atomically(path, state_text(state))
