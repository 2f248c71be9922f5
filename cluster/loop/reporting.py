"""What a campaign tells of itself while its loop runs: evaluations, the line of each update, what each role is doing."""

from typing import Any

from actors.errors import LostObjectError
from cluster.config import CampaignConfig
from cluster.console.progress import Progress
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.evaluation import Evaluator
from cluster.loop.measure import LoopClock
from cluster.loop.weight_sync import WeightTransport
from cluster.records.event_table import describe
from cluster.records.writer import RunRecords
from cluster.state.campaign_state import CampaignState


class Account:
    """Evaluates, writes down, and shows."""

    def __init__(
        self,
        config: CampaignConfig,
        state: CampaignState,
        *,
        evaluator: Evaluator | None,
        rollout: Fleet,
        versions: WeightTransport,
        records: RunRecords,
        progress: Progress,
    ):
        self.clock = LoopClock(state)
        self._config, self._state = config, state
        self._evaluator, self._rollout, self._versions = evaluator, rollout, versions
        self._records, self._progress = records, progress
        self._doing = {"rollout": "idle", "teacher": "idle", "learner": "idle"}

    async def begin(self) -> None:
        """Measures the untrained student and the teacher, and concludes what an earlier run had taken and not written."""
        if self._state.step == 0 and self._evaluator is not None and not self._state.start:
            record = await self._evaluate(0)
            if self._config.evaluation.teacher:
                record["eval/accuracy_teacher"] = await self._evaluator.teacher()
            self._state.start = record
            self._write({"step": 0, "policy_version": 0, **record})
        for record in list(self._state.pending):
            if record["step"] > self._records.last_step:
                await self.conclude(record)

    async def conclude(self, record: dict[str, Any]) -> None:
        """Evaluates the version that an update has made, where that is due, and writes the update's line."""
        step = record["step"]
        due = step == self._config.pipeline.updates or step % self._config.evaluation.every_updates == 0
        newest = self._versions.newest
        if due and newest is not None and newest.version == step:  # else killed before, and it is gone
            record |= await self._evaluate(step)
        self.clock.count()
        self._state.pending = [other for other in self._state.pending if other["step"] > step]
        self._write(record)

    def event(self, kind: str, **fields: Any) -> None:
        """Writes an event to events.jsonl and describes it on the terminal."""
        self._records.event(kind, **fields)
        self._progress.note(describe(kind, fields))

    def lost(self, trajectories: int, error: LostObjectError) -> None:
        """Records that trajectories were lost with the node that held them. The caller samples them again."""
        self.event("lost_objects", cause=str(error), trajectories=trajectories, step=self._state.step)

    def doing(self, role: str, what: str) -> None:
        """For the screen."""
        self._doing[role] = what
        self._progress.doing(self._doing)

    def _write(self, record: dict[str, Any]) -> None:
        self._records.metrics(record)
        self._progress.update(record, dict(self._doing))

    async def _evaluate(self, version: int) -> dict[str, Any]:
        if self._evaluator is None:
            return {}
        while True:
            try:
                metrics, rows, busy = await self._evaluator.student(self._rollout)
                break
            except LostObjectError as error:
                self._records.event("lost_objects", str(error), evaluation=version)
        if self.clock.started:
            for role, seconds in busy.items():
                self._state.busy[role] += seconds
        self._records.keep_trajectories(version, [{**row, "step": version} for row in rows])
        self._state.evaluations[version] = metrics
        return dict(metrics)
