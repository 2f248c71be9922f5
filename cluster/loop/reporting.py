"""What the loop measures and reports: its clock, the line of each update, evaluations, events, and the terminal."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import LostObjectError
from cluster.config import CampaignConfig
from cluster.console.screen import Progress
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.evaluation_sets import Evaluations
from cluster.loop.prompt_choice import passed_over
from cluster.loop.staleness import staleness_histogram
from cluster.loop.weight_sync import Published, WeightTransport
from cluster.loop.work import Sampled, Scored
from cluster.phases import START
from cluster.records.disk import Disk
from cluster.records.event_table import describe
from cluster.records.utilisation import TRACE_FILE, Utilisation, add_up
from cluster.records.writer import RunRecords
from cluster.state.campaign_state import CampaignState

PREEMPTED_SHARE = 0.1
"""Preemptions for each trajectory of an update above which they are told: their keys and values are computed twice."""


class LoopClock:
    """Adds the loop's wall-clock seconds, and what each actor did in them, to the campaign's state."""

    def __init__(self, state: CampaignState):
        self.utilisation = Utilisation({})
        self._state, self._seconds_before = state, state.actor_seconds
        self._counted: float | None = None

    def start(self, fleets: Iterable[Fleet]) -> None:
        """Starts counting: the first prompts are about to be issued."""
        self.utilisation = Utilisation({r.name: fleet.role for fleet in fleets for r in fleet.replicas})
        for fleet in fleets:
            fleet.utilisation = self.utilisation
        self._counted = time.perf_counter()

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._counted is not None

    def count(self) -> None:
        """Adds the time since the last call. Does nothing before `start`."""
        if self._counted is not None:
            now = time.perf_counter()
            self._state.loop_seconds += now - self._counted
            self._counted = now
            self._state.actor_seconds = add_up(self._seconds_before, self.utilisation.seconds())

    def write_trace(self, run_dir: Path) -> None:
        """Writes trace.json, with the time since `start`."""
        if self.started:
            self.utilisation.write_trace(run_dir / TRACE_FILE)


class Reporter:
    """Evaluates weight versions, writes metrics and events, and shows them on the terminal."""

    def __init__(
        self,
        config: CampaignConfig,
        state: CampaignState,
        *,
        evaluator: Evaluations | None,
        rollout: Fleet,
        versions: WeightTransport,
        records: RunRecords,
        progress: Progress,
    ):
        self.disk = Disk(records, self.event)
        self.clock = LoopClock(state)
        self._config, self._state = config, state
        self._evaluator, self._rollout, self._versions = evaluator, rollout, versions
        self._records, self._progress = records, progress
        self._unjudged: list[str] = []
        self._preempted, self._seats, self._told_of_preemptions = 0, 0, False
        self._waited = 0.0
        self._doing = {"rollout": "idle", "teacher": "idle", "learner": "idle"}
        self._end_first: Callable[[], None] | None = None
        """Ends the phase of the first update, once the loop has started."""

    async def begin(self) -> None:
        """Evaluates the untrained student and the teacher, and finishes updates that an earlier process left unwritten.

        These are updates whose checkpoint was written before their line of metrics.jsonl.
        """
        if self._state.step == 0 and self._evaluator is not None and not self._state.start:
            with START.phase("evaluating the untrained student, and its teacher"):
                self._state.baselines = {}
                record = await self._evaluate(0)
            self._state.start = record
            self._write({"step": 0, "policy_version": 0, **record})
        for record in list(self._state.pending):
            # The earlier process may have written the line after the checkpoint that still lists it as pending.
            if record["step"] > self._records.last_step:
                await self.finish_update(record)

    def loop_started(self) -> None:
        """The first prompts are about to be issued: the last phase of the start begins."""
        self._end_first = START.opened(f"update {self._state.step + 1}")

    async def finish_update(self, record: dict[str, Any]) -> None:
        """Evaluates the update's weights where an evaluation is due, and writes the update's line of metrics.jsonl."""
        step = record["step"]
        if causes := self._unjudged:
            self._unjudged = []
            self.event("unjudged", count=len(causes), cause=causes[0], step=step)
        self._tell_preemptions(record)
        if self._config.environment is not None:
            record["environment_idle_seconds"], self._waited = self._waited, 0.0
        newest = self._versions.newest
        # An update that an earlier process left unwritten is not evaluated: the actors no longer hold its weights.
        if newest is not None and newest.version == step:
            record |= await self._evaluate(step)
        self.clock.count()
        self._state.pending = [other for other in self._state.pending if other["step"] > step]
        self._write(record)
        if self._end_first is not None and not START.over:
            self._end_first()
            START.over = True
            self.event("first_update", step=step, seconds=round(START.seconds, 2), phases=START.rows())

    def event(self, kind: str, **fields: Any) -> None:
        """Writes an event to events.jsonl and describes it on the terminal."""
        self._records.event(kind, **fields)
        self._progress.note(describe(kind, fields), self._records.last_event_seconds)

    def lost(self, trajectories: int, error: LostObjectError, **fields: Any) -> None:
        """Records that trajectories were lost with the node that held them. The caller samples them again."""
        self.event("lost_objects", cause=str(error), trajectories=trajectories, step=self._state.step, **fields)

    def unjudged(self, causes: Sequence[str]) -> None:
        """Responses were left without a verdict. They are recorded with the next line of metrics.jsonl, in one event."""
        self._unjudged += causes

    def preempted(self, count: int, seats: int) -> None:
        """An engine with this many seats has taken the cache of so many responses for others, since it last said so."""
        self._preempted, self._seats = self._preempted + count, seats or self._seats

    def waited(self, seconds: float) -> None:
        """An engine had nothing to write for so many seconds, while environments were waited for."""
        self._waited += seconds

    def _tell_preemptions(self, record: dict[str, Any]) -> None:
        count, self._preempted = self._preempted, 0
        record["preempted"] = count
        if count > PREEMPTED_SHARE * self._config.trajectories_per_update and not self._told_of_preemptions:
            self._told_of_preemptions = True
            way_out = f"lower rollout.engine.max_num_seqs towards {self._seats}, or give the engines more memory"
            self.event("preempted", count=count, step=record["step"], cause=way_out)

    def doing(self, role: str, what: str) -> None:
        """Shows what a role is doing."""
        self._doing[role] = what
        self._progress.doing(self._doing)

    def _write(self, record: dict[str, Any]) -> None:
        self._records.metrics(record)
        self._progress.update(record, dict(self._doing))

    async def _evaluate(self, version: int) -> dict[str, Any]:
        if self._evaluator is None or not self._evaluator.due(version):
            return {}
        while True:
            try:
                metrics, rows, busy = await self._evaluator.student(self._rollout, version, self._state.baselines)
                break
            except LostObjectError as error:
                self.lost(self._evaluator.trajectories(version), error, evaluation=version)
        # The evaluation of the untrained student comes before the loop, so the loop's busy seconds do not include it.
        if self.clock.started:
            for role, seconds in busy.items():
                self._state.busy[role] += seconds
        kept = [{**row, "step": version} for row in rows]
        await self.disk.patiently(lambda: self._records.keep_trajectories(version, kept))
        self._state.evaluations[version] = metrics
        return dict(metrics)


def record_of_update(
    state: CampaignState,
    update: Sequence[Scored],
    metrics: Mapping[str, float],
    published: Published,
    *,
    wall_seconds: float,
    max_staleness: int,
    queues: Mapping[str, int],
) -> dict[str, Any]:
    """The line of metrics.jsonl of the update that was just taken on these trajectories; `state` already counts it.

    metrics: what the learner measured. queues: stage -> trajectories that wait for it.
    """
    sampled = [one.sampled for one in update]
    # The update started from the weights of the step before.
    staleness = state.step - 1 - np.array([one.oldest_version for one in sampled])
    busy, ledger = state.busy_since_last_step(), state.ledger
    return {
        "step": state.step,
        "policy_version": published.version,
        "wall_seconds": wall_seconds,
        "trajectories": ledger.trained,
        "tokens_generated": state.tokens_generated,
        # The learner tells turns where it has seen more than one: without a word of an environment there was one.
        **({"turns_mean": 1.0, "context_share": 0.0} if sampled[0].episode is not None else {}),
        **metrics,
        **reward_parts([one.parts for one in sampled]),
        **episode_metrics(sampled),
        "staleness_mean": float(staleness.mean()),
        "staleness_max": int(staleness.max()),
        "staleness_histogram": staleness_histogram(staleness.tolist(), max_staleness),
        "dropped": ledger.dropped.total(),
        **(passed_over(ledger.dropped) if state.prompts else {}),
        "dropped_share": ledger.dropped.total() / max(ledger.next_number, 1),
        "missing_scores": state.missing_scores,
        "truncated_fraction": float(np.mean([one.truncated for one in sampled])),
        "response_length_mean": float(np.mean([one.length - one.context for one in sampled])),
        **{f"queue_{name}": depth for name, depth in queues.items()},
        **{f"busy_{role}": seconds for role, seconds in busy.items()},
        "processor_seconds": state.processor_seconds,
        "publish_seconds": published.seconds,
        "publish_bytes": published.nbytes,
    }


def episode_metrics(sampled: Sequence[Sampled]) -> dict[str, float]:
    """Of the episodes of an update: the seconds that they and their environments took, how often one was begun again, and their
    conversations, where one had several; {} where no environment answers."""
    episodes = [one.episode for one in sampled if one.episode is not None]
    if not episodes:
        return {}
    conversations = [one.conversations for one in episodes]
    return {
        "episode_seconds_mean": float(np.mean([one.seconds for one in episodes])),
        "environment_seconds_mean": float(np.mean([one.waited_seconds for one in episodes])),
        "episode_retries": sum(one.retries for one in episodes),
        **({"conversations_mean": float(np.mean(conversations))} if max(conversations) > 1 else {}),
    }


def reward_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`reward/<part>_mean` for each named part of rewards, over the trajectories whose reward has it."""
    names = sorted({name for one in parts for name in one})
    return {f"reward/{name}_mean": float(np.mean([one[name] for one in parts if name in one])) for name in names}
