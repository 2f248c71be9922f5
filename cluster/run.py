"""Runs a campaign: from a configuration to a finished run directory.

run_campaign      locks the run directory, reads the inputs, connects to the cluster
Running           starts the actors, runs the loop (loop/campaign.py), writes the summary and the report
Running._train    starts the loop again from a checkpoint after a lost learner or a rollback
"""

import asyncio
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from actors.errors import CampaignError, LearnerLostError, UserError
from actors.gpu_share import is_share
from actors.json_files import DamagedError
from cluster.config import CampaignConfig
from cluster.console.control import handlers, obey
from cluster.console.screen import Progress
from cluster.console.status import keep_status, live_actors, persistently, write_beginning, write_status
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_cluster import connected, refuse_relative_output, room_to_begin
from cluster.fleet.ray_control_store import control_store_lost
from cluster.fleet.ray_fleet import Fleet
from cluster.fleet.restarts import Repeated, Restarts
from cluster.inputs import Inputs, read_inputs
from cluster.interrupts import INTERRUPTS
from cluster.loop.campaign import Campaign
from cluster.loop.samples import TrainingSamples
from cluster.loop.teachers import Teachers
from cluster.phases import START
from cluster.pins import pin
from cluster.planning.memory import shares_version, student_numbers, version_bytes
from cluster.preflight import check_models
from cluster.records.disk import Disk
from cluster.records.event_table import describe
from cluster.records.writer import METRICS_FILE, REPORT_FILE, SUMMARY_FILE, RunRecords, read_summary
from cluster.report.page import write_report
from cluster.roles import build_evaluator, build_fleets, build_learner, starts_last
from cluster.state.campaign_state import CampaignState
from cluster.state.changes import Changed
from cluster.state.checkpoints import what_is_good
from cluster.state.recorded import begin, replayed
from cluster.state.resume import claimed, take_up
from cluster.state.rollback import RollBack, roll_back
from cluster.state.same_inputs import demand_same, demand_same_architecture, fingerprints
from cluster.state.soundness import Found, newest_sound
from cluster.state.summary import summarise
from cluster.tracking.alerts import Alerts
from cluster.tracking.outbox import Trackers
from cluster.tracking.ray_prometheus import Prometheus
from cluster.tracking.trackers import make_trackers
from cluster.trial import try_out
from learner.student.checkpoint import checkpoint_steps

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run_campaign(
    config: CampaignConfig, resume_from: str | None = None, allow_change: Sequence[str] = ()
) -> tuple[dict[str, Any], bool]:
    """Runs a campaign, or resumes the one in its run directory; a finished one is not run again.

    resume_from: the step or directory of the checkpoint to resume from; by default the newest that is sound.
    allow_change: keys that may be others than the campaign ran with, and prompts and models whose contents may be others.

    Returns the summary, and whether the campaign is complete (False: it was interrupted). UserError: the configuration,
    an input or the run directory is at fault. CampaignError: it broke while it ran.
    """
    INTERRUPTS.starts()
    START.of_a_campaign()
    refuse_relative_output(config)
    with START.phase("looking at models and tokenizers"):
        commits = pin(config)
        check_models(config)
    with claimed(config, allow_change) as taken:
        # Within the lock: it repairs files that another process might be writing.
        records = RunRecords(config.run_dir, began=START.began)

        def told(kind: str, **fields: Any) -> None:
            records.event(kind, **fields)
            print(f"understudy: {describe(kind, fields)}", file=sys.stderr)

        if commits:
            records.event("pinned", commits=commits)
            print(f"understudy: {commits}", file=sys.stderr)
        with START.phase("looking for a checkpoint"):
            found = newest_sound(config, told, resume_from)
        done = _summary(config.run_dir, told)
        ended = found.state.step >= config.pipeline.updates and done.get("updates") == found.state.step
        if ended and not any(one.change == "same contents" for one in taken.changed):
            _nothing_done(config, taken.changed)
            return done, True
        with contextlib.suppress(OSError):  # a full disk: the records say so
            write_beginning(config.run_dir)
        with START.phase("reading prompts"):
            inputs = read_inputs(config)
            inputs.tell(told)
            sets = {name: one.prompts for name, one in inputs.sets.items()}
            now = fingerprints(config, inputs.prompts, inputs.held_out, sets)
        if config.replay is not None:
            with START.phase("checking the record"):
                inputs.record = replayed(config, now, inputs.tokenizer, told)
        here: dict[str, Any] = {"step": found.state.step, "tokens_generated": found.state.tokens_generated}
        contents = demand_same(found.state.inputs, now, allow_change, partial(told, **here), taken.changed)
        if ended:
            _nothing_done(config, [*(one for one in taken.changed if one.change != "same contents"), *contents])
            return done, True
        if contents and found.checkpoint:
            demand_same_architecture(config, found.checkpoint)
        taken.planned(found.state.step)  # refuses before records are cut back
        take_up(config, records, told, found)
        found.state.inputs = now
        taken.accept(found.state, contents, told)
        return _run_connected(config, records, inputs, found)


def _nothing_done(config: CampaignConfig, changed: Sequence[Changed]) -> None:
    """Says that the campaign had finished. UserError: with changes, which would have no effect."""
    if changed:
        keys = ", ".join(one.key for one in changed)
        raise UserError(
            str(config.run_dir),
            f"a campaign that has finished, and no effect of another {keys}",
            "a larger pipeline.updates to go on with this, or the same configuration",
        )
    print(f"understudy: the campaign in {config.run_dir} had finished; nothing was done", file=sys.stderr)


def _summary(run_dir: Path, on_event: Callable[..., None]) -> dict[str, Any]:
    """The summary of a campaign that has ended; a damaged one counts for nothing, and is written again at the end."""
    try:
        return read_summary(run_dir)
    except DamagedError as error:
        on_event("damaged_summary", cause=str(error), path=str(run_dir / SUMMARY_FILE))
        return {}


def _run_connected(
    config: CampaignConfig, records: RunRecords, inputs: Inputs, found: Found
) -> tuple[dict[str, Any], bool]:
    state, checkpoint = found.state, found.checkpoint
    progress = Progress(config.run_dir, wall_seconds=lambda: records.wall_seconds)
    START.tell(progress.note)
    INTERRUPTS.last_acts.append(progress.leave)

    async def run(private: bool) -> tuple[dict[str, Any], bool]:
        return await Running(config, state, checkpoint, inputs, records, progress, private).to_the_end()

    try:
        if config.record:
            begin(config, state.inputs, inputs.tokenizer, state.step)
        with ExitStack() as stack:
            with START.phase("starting Ray"):
                private = stack.enter_context(connected(config))
            return asyncio.run(run(private))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or config.run_dir
        raise CampaignError(f"{where}: {error.strerror}; {what_is_good(config.run_dir / 'checkpoints')}") from error
    finally:
        progress.close()


class Running:
    """A campaign in this process: its actors, its loop, and the tasks beside it (status file, control commands)."""

    def __init__(
        self,
        config: CampaignConfig,
        state: CampaignState,
        checkpoint: Path | None,
        inputs: Inputs,
        records: RunRecords,
        progress: Progress,
        private: bool,
    ):
        """checkpoint: what the learner loads; None: the untrained student. private: the cluster was started for this run."""
        self.config, self.state, self.inputs, self.records, self.progress = config, state, inputs, records, progress
        state.faults = records.faults  # the checkpoint does not know those after it
        progress.read_live = self._live_status
        self.needed, begin, self.short = room_to_begin(config, private)
        records.event("resumed" if checkpoint else "started", step=state.step, process=os.getpid())
        if self.short:
            self.on_event("short_of_resources", cause=str(self.short))
        INTERRUPTS.last_acts.append(self._ended_now)
        self.turn = asyncio.Lock()
        self.fleets = build_fleets(config, inputs, self.needed, begin, self.on_event, self.turn)
        if config.needs_rollout and shares_version(config):
            size, nbytes = config.rollout.tensor_parallel_size, version_bytes(config, *student_numbers(config))
            self.on_event("version_shared", role="rollout", ranks=size, gigabytes=nbytes / 1e9)
        self.learner = build_learner(config, inputs, checkpoint, state.plans, self.needed, self.on_event, self.turn)
        exported = {"prometheus": lambda _: Prometheus(config.name)} if config.tracking.prometheus else {}
        self.trackers = Trackers(
            make_trackers(config, exported),
            self.on_event,
            next_step=state.step + 1,
            metrics_file=config.run_dir / METRICS_FILE,
        )
        self.alerts = Alerts(config, self.on_event)
        records.on_event = self.alerts.event
        (self.trackers.wait if checkpoint else self.trackers.require)()
        records.on_metrics = lambda row: self.trackers.log(
            {**row, "faults": records.faults, "guard_actions": records.guard_actions}
        )
        self.disk = Disk(records, self.on_event)
        self.gate = asyncio.Event()
        self.gate.set()
        self.interrupted = asyncio.Event()
        """Set for good by the first signal, or by `understudy stop`: it outlives the loop, which may begin again."""

    def on_event(self, kind: str, **fields: Any) -> None:
        """Writes an event to events.jsonl and to the screen, and counts it if it is a fault."""
        self.records.event(kind, **fields)
        self.progress.note(describe(kind, fields), self.records.last_event_seconds)
        self.state.faults = self.records.faults

    def told(self, kind: str, **fields: Any) -> None:
        """`on_event`, for a call in another thread."""
        self.loop.call_soon_threadsafe(partial(self.on_event, kind, **fields))

    async def to_the_end(self) -> tuple[dict[str, Any], bool]:
        """Runs the campaign; see run_campaign. No actor is left when it ends, by an error too."""
        self.loop = asyncio.get_running_loop()
        self.progress.doing(dict.fromkeys(("rollout", "teacher", "learner"), "starting"))
        # From the beginning, since loading models takes minutes; commands only once there are actors to scale.
        status = partial(keep_status, self.config.run_dir, self._refresh)
        watching = [asyncio.create_task(persistently("status.json", status, self.on_event))]
        try:
            with START.phase("starting actors"):
                await _while_the_cluster_lives(self._start())
            with START.phase("trying a checkpoint, summary and report"):
                await try_out(self.config, self.state, self.learner, self.records, self.needed, self.on_event)
            working = {role: fleet for role, fleet in self.fleets.items() if fleet.replicas}
            orders = handlers(working, self.needed, self.gate, self.on_event, self.interrupted)
            commands = partial(obey, self.config.run_dir, orders)
            watching.append(asyncio.create_task(persistently("commands", commands, self.on_event)))
            loop = asyncio.get_running_loop()
            with INTERRUPTS.runs(lambda: self._interrupt(loop)):
                complete = await self._train()
            self.records.event("finished" if complete else "stopped", step=self.state.step)
            summary = summarise(self.config, self.state, self.records.wall_seconds, self.needed)
            summary["prompts"] = self.inputs.counts()
            summary["start"] = START.rows()
            await self.disk.lines_written()
            await self.disk.patiently(lambda: self.records.write_summary(summary))
            await self.disk.patiently(lambda: write_report([self.config.run_dir], self.config.run_dir / REPORT_FILE))
            return summary, complete
        except BaseException as error:
            details = "".join(traceback.format_exception(error))
            cause = f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # on a full disk this fails too, and must not hide the first error
                self.records.event("failed", cause=cause, step=self.state.step, traceback=details)
            raise
        finally:
            for task in watching:
                task.cancel()
            self.progress.doing(dict.fromkeys(self.progress.roles, "ended"))
            with contextlib.suppress(OSError):  # status.json then shows the last seconds before the end
                write_status(self.config.run_dir, self.progress.refresh())
            self.inputs.close()
            self.trackers.close()
            self.alerts.close()
            for fleet in (self.learner, *self.fleets.values()):
                fleet.close()

    async def _start(self) -> None:
        # The engines first, whose processes take longest: Ray has the first worker processes ready.
        for fleets in in_order([*self.fleets.values(), self.learner], starts_last(self.config), self.needed):
            await asyncio.gather(*(fleet.start() for fleet in fleets))
        if self.short:  # the missing actors join when the cluster has room
            for role, fleet in self.fleets.items():
                fleet.resize(self.needed[role][0])

    async def _train(self) -> bool:
        """Runs the loop, again from a checkpoint after a lost learner or a rollback; whether the campaign is complete."""
        teachers = {
            name: self.fleets[f"teacher.{name}"] for name in self.config.teachers if self.config.started_teachers
        }
        panel = Teachers(teachers, self.inputs.prompt_routes, each=self.config.learner.replicas > 1)
        with START.phase("trying the teachers"):
            await panel.compare_replicas()
            await panel.try_longest()
            if self.config.text_by == "teacher" and teachers:
                await panel.try_writing(self.inputs.prompts, self.config.sampling)
        parts: dict[str, Any] = {
            "prompts": self.inputs.prompts,
            "evaluator": build_evaluator(self.config, self.inputs, teachers, self.on_event),
            "rollout": self.fleets["rollout"],
            "teachers": panel,
            "records": self.records,
            "progress": self.progress,
            "record": self.inputs.record,
            "samples": None if self.inputs.record else self._samples(),
            "gate": self.gate,
            "interrupted": self.interrupted,
            "neighbours": {
                "Ray's control store": control_store_lost,
                **{role: self.fleets[role].watched for role in ("environment",) if role in self.fleets},
            },
        }
        most, budget, again = self.config.ray.max_restarts, Restarts(self.config.ray.max_restarts), Repeated()
        while True:
            try:
                return await Campaign(self.config, self.state, learner=self.learner, **parts).run()
            except LearnerLostError as error:
                if budget.spent():
                    replaced = f"it was replaced {most} times within an hour (ray.max_restarts)"
                    raise CampaignError(f"{error}; {replaced}") from error
                await asyncio.sleep(budget.pause())
                budget.count()
                failed_at, before = self.state.step, self.state
                await self.disk.lines_written()
                take = partial(asyncio.to_thread, take_up, self.config, self.records, self.told)
                self.state, checkpoint = await self.disk.patiently(take)
                self.state.keep_of(before)
                if again.seen(self.state.step, failed_at, error):
                    raise CampaignError(f"{error}; {again.told(self.state.step)}") from error
            except RollBack as wanted:
                await self.disk.lines_written()
                back = partial(roll_back, self.config, self.state, wanted.finding, self.records, self.on_event)
                self.state, checkpoint = await self.disk.patiently(back)
            if not await self._unless_interrupted(_while_the_cluster_lives(self._replace_learner(checkpoint))):
                return False  # there is no learner to save: the last checkpoint is what there is

    def _samples(self) -> TrainingSamples:
        return TrainingSamples(self.config, self.inputs.prompts, self.inputs.tokenizer, self.records)

    async def _replace_learner(self, checkpoint: Path | None) -> None:
        lost = self.learner
        self.learner = build_learner(
            self.config, self.inputs, checkpoint, self.state.plans, self.needed, self.on_event, self.turn
        )
        self.learner.inherit(lost)  # first: another job could take the place while the new learner starts
        await self.learner.start(patient=True)
        self.on_event("learner_restored", step=self.state.step, checkpoint=str(checkpoint or "the untrained student"))

    async def _unless_interrupted(self, work: Coroutine[Any, Any, None]) -> bool:
        """Waits for `work`, or until the campaign is interrupted; whether it has ended."""
        working, asked = asyncio.create_task(work), asyncio.create_task(self.interrupted.wait())
        await asyncio.wait((working, asked), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            return False
        working.result()
        return True

    def _interrupt(self, loop: asyncio.AbstractEventLoop) -> str:
        """A signal asks for the end: tells the loop, and returns what the end waits for."""
        loop.call_soon_threadsafe(self.interrupted.set)
        doing, first = self.progress.roles.get("learner", "idle"), ""
        if doing.startswith("update"):
            several = self.config.learner.epochs_per_update * self.config.learner.minibatches_per_update > 1
            or_not = " (or finished and saved, if it has taken an optimiser step)" if several else ""
            first = f"{doing} is given up{or_not}, "
        if not self.state.step:
            return f"{first}{'and ' * bool(first)}before the first update there is nothing to save"
        last = f"the last one is of update {saved}" if (saved := self._saved_step()) else "the first one"
        return f"{first}{'then ' * bool(first)}a checkpoint is written ({last})"

    def _ended_now(self) -> None:
        """This process ends at once: says so in the records."""
        self.records.event("stopped", step=self._saved_step(), cause=f"ended at once in update {self.state.step + 1}")

    def _saved_step(self) -> int:
        return max(checkpoint_steps(self.config.run_dir / "checkpoints"), default=0)

    def _refresh(self) -> dict[str, Any]:
        self.trackers.report()
        self.alerts.report()
        return self.progress.refresh()

    def _live_status(self) -> dict[str, Any]:
        """The part of status.json that only this process knows (cluster/console/status.py)."""
        return {
            "roles": self.progress.roles,
            "start": [] if START.over else START.rows(),
            "actors": live_actors(
                replica for fleet in (*self.fleets.values(), self.learner) for replica in fleet.replicas
            ),
            "ledger": self.state.ledger.counts(),
            "dropped_because": dict(self.state.ledger.dropped),
            "state": "running" if self.gate.is_set() else "paused",
            "last_update_seconds_ago": self.records.last_update_seconds_ago,
            "waits_for": self.records.full.told() if self.records.full else "",
            "gpus": {role: resources.gpus for role, (_, resources) in self.needed.items()},
        }


def in_order(fleets: Sequence[Fleet], last: set[str], needed: dict[str, tuple[int, Resources]]) -> list[list[Fleet]]:
    """The fleets in the groups that start one after the other: where roles share GPUs, engines (`last`) after the others."""
    shared = any(is_share(resources.gpus) for _, resources in needed.values())
    early = [fleet for fleet in fleets if not shared or fleet.role not in last]
    return [early, [fleet for fleet in fleets if fleet not in early]]


async def _while_the_cluster_lives(work: Coroutine[Any, Any, None]) -> None:
    """Waits for `work`. CampaignError: Ray's control store was lost meanwhile, so that it would never end."""
    working, lost = asyncio.create_task(work), asyncio.create_task(control_store_lost())
    try:
        done, _ = await asyncio.wait((working, lost), return_when=asyncio.FIRST_COMPLETED)
        (working if working in done else lost).result()
    finally:
        working.cancel()
        lost.cancel()
