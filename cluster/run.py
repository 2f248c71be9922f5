"""From a configuration to a finished run directory: prepares everything, runs the loop, writes the summary."""

import asyncio
import contextlib
import errno
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.config import TeacherConfig, publishes_adapter
from actors.errors import CampaignError, LearnerLostError
from actors.foreign_teacher import ForeignTeacher
from actors.http_teacher import HttpTeacher
from actors.rollout import RolloutActor
from actors.sharded_teacher import ShardedTeacher
from actors.teacher import TeacherActor
from actors.vllm_teacher import VllmTeacher
from cluster.campaign import Campaign
from cluster.check import check_models
from cluster.checkpoints import what_is_good
from cluster.config import CampaignConfig
from cluster.control import obey
from cluster.cost import cost_of
from cluster.evaluate import Evaluator
from cluster.inputs import Inputs, read_inputs
from cluster.progress import Progress, in_words
from cluster.ray_actor import Resources
from cluster.ray_cluster import connected, refuse_relative_output, room_to_begin
from cluster.ray_fleet import Fleet
from cluster.ray_learner import LearnerGroup
from cluster.ray_metrics import Prometheus
from cluster.records import FAULTS, RunRecords, read_summary
from cluster.report import write_report
from cluster.restarts import Restarts
from cluster.resume import claimed, take_up
from cluster.rollback import RollBack, roll_back
from cluster.state import CampaignState, load_state
from cluster.status import keep_status
from cluster.steering import handlers
from cluster.teachers import Teachers
from cluster.trackers import Trackers, make_trackers
from cluster.utilisation import by_role, mean_actors, role_of
from learner.learner import Learner

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run_campaign(config: CampaignConfig) -> tuple[dict[str, Any], bool]:
    """Runs or takes up a campaign; returns its summary, and whether it is complete (False: it was interrupted)."""
    refuse_relative_output(config)
    check_models(config)
    with claimed(config) as changed:
        records = RunRecords(config.run_dir)
        if changed:
            records.event("configuration_changed", changed=changed)
        state, _ = load_state(config)
        done = read_summary(config.run_dir)
        if state.step >= config.pipeline.updates and done.get("updates") == state.step:
            return done, True
        return _run_connected(config, records)


def _run_connected(config: CampaignConfig, records: RunRecords) -> tuple[dict[str, Any], bool]:
    inputs = read_inputs(config)
    state, checkpoint = take_up(config, records)
    progress = Progress(config.pipeline.updates)
    try:
        with connected(config) as private:
            return asyncio.run(_run(config, state, checkpoint, inputs, records, progress, private))
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        where = error.filename or config.run_dir
        raise CampaignError(f"{where}: {error.strerror}; {what_is_good(config.run_dir / 'checkpoints')}") from error
    finally:
        progress.close()


TEACHER_ACTORS: dict[str, type] = {"transformers": TeacherActor, "vllm": VllmTeacher, "http": HttpTeacher}
"""By `teachers.<name>.backend`."""


def teacher_actor(teacher: TeacherConfig) -> type:
    """What runs this teacher."""
    several = teacher.backend == "transformers" and teacher.tensor_parallel_size > 1
    return ShardedTeacher if several else TEACHER_ACTORS[teacher.backend]


async def _run(
    config: CampaignConfig,
    state: CampaignState,
    checkpoint: Path | None,
    inputs: Inputs,
    records: RunRecords,
    progress: Progress,
    private: bool,
) -> tuple[dict[str, Any], bool]:
    def on_event(kind: str, **fields: Any) -> None:
        records.event(kind, **fields)
        progress.note(in_words(kind, fields))
        state.faults += kind in FAULTS

    needed, begin, short = room_to_begin(config, private)
    records.event("resumed" if checkpoint else "started", step=state.step, process=os.getpid())
    if short:
        on_event("short_of_resources", cause=str(short))
    fleets = build_fleets(config, inputs, needed, begin, on_event)
    learner = build_learner(config, inputs, checkpoint, needed, on_event)
    exported = [Prometheus(config.name)] if config.tracking.prometheus else []
    trackers = Trackers(make_trackers(config, state.step + 1, exported), on_event)
    records.on_metrics = trackers.log
    gate, steering = asyncio.Event(), None
    gate.set()

    def live() -> dict[str, Any]:
        return _live_status(state, progress, [*fleets.values(), learner], paused=not gate.is_set())

    status = asyncio.create_task(keep_status(config.run_dir, live))
    try:
        await asyncio.gather(*(fleet.start() for fleet in (learner, *fleets.values())))
        for role, fleet in fleets.items() if short else ():
            fleet.resize(needed[role][0])
        steering = asyncio.create_task(obey(config.run_dir, handlers(fleets, needed, gate, on_event)))
        teachers = {name: fleets[f"teacher.{name}"] for name in config.teachers}
        panel = Teachers(teachers, inputs.lessons, apart=config.scores_apart)
        await panel.compare_replicas()
        parts: dict[str, Any] = {
            "prompts": inputs.prompts,
            "evaluator": build_evaluator(config, inputs, teachers),
            "rollout": fleets["rollout"],
            "teachers": panel,
            "records": records,
            "progress": progress,
            "gate": gate,
        }
        budget = Restarts(config.ray.max_restarts)
        while True:
            try:
                complete = await Campaign(config, state, learner=learner, **parts).run()
                break
            except LearnerLostError as error:
                if budget.spent():
                    most = config.ray.max_restarts
                    raise CampaignError(
                        f"{error}; it was replaced {most} times within an hour (ray.max_restarts)"
                    ) from error
                await asyncio.sleep(budget.pause())
                budget.count()
                faults = state.faults
                state, checkpoint = take_up(config, records)
                state.faults = faults
            except RollBack as wanted:
                state, checkpoint = roll_back(config, state, wanted.finding, records, on_event)
            lost, learner = learner, build_learner(config, inputs, checkpoint, needed, on_event)
            learner.inherit(lost)
            await learner.start(patient=True)
            on_event("learner_restored", step=state.step, checkpoint=str(checkpoint))
        records.event("finished" if complete else "stopped", step=state.step)
        summary = summarise(config, state, records.wall_seconds, needed)
        records.write_summary(summary)
        write_report([config.run_dir], config.run_dir / "report.html")
        return summary, complete
    except BaseException as error:
        details = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # a disk that is full is told by what filled it first
            records.event("failed", cause=f"{type(error).__name__}: {error}", step=state.step, traceback=details)
        raise
    finally:
        status.cancel()
        if steering is not None:
            steering.cancel()
        trackers.close()
        for fleet in (learner, *fleets.values()):
            fleet.close()


def _live_status(state: CampaignState, progress: Progress, fleets: list[Fleet], *, paused: bool) -> dict[str, Any]:
    """What only this process knows: see cluster/status.py."""
    return {
        "roles": progress.roles,
        "actors": [
            {
                "name": replica.name,
                "alive": replica.alive,
                "restarts": replica.restarts,
                "under_way": replica.under_way,
                "version": replica.version,
            }
            for fleet in fleets
            for replica in fleet.replicas
        ],
        "ledger": state.ledger.counts(),
        "state": "paused" if paused else "running",
    }


def build_fleets(
    config: CampaignConfig,
    inputs: Inputs,
    needed: dict[str, tuple[int, Resources]],
    begin: dict[str, int],
    on_event: Callable[..., None],
) -> dict[str, Fleet]:
    """The fleets `rollout` and `teacher.<name>`, not started, with as many actors as are to begin."""

    def fleet(role: str, actor: type, *arguments: Any, **keywords: Any) -> Fleet:
        _, resources = needed[role]
        return Fleet(
            role,
            actor,
            arguments,
            keywords,
            replicas=begin[role],
            resources=resources,
            max_restarts=config.ray.max_restarts,
            start_timeout_seconds=config.ray.start_timeout_seconds,
            hang_timeout_seconds=config.ray.hang_timeout_seconds,
            on_event=on_event,
        )

    rollout = fleet(
        "rollout",
        RolloutActor,
        _local(config.student.model),
        config.rollout,
        config.sampling,
        inputs.stop_token_ids,
        config.seed,
        support_size=config.student_support_size,
        keep_weights=config.weights.encoding == "delta",
        verifier=config.evaluation.verifier if config.gives_rewards else None,
        adapter=config.student.lora if publishes_adapter(config.student) else None,
        trust_remote_code=config.student.trust_remote_code,
    )
    teachers = {
        f"teacher.{name}": fleet(
            f"teacher.{name}",
            teacher_actor(teacher),
            teacher,
            f"teachers.{name}",
            vocabulary=inputs.vocabulary,
        )
        if teacher.tokenizer is None
        else fleet(
            f"teacher.{name}",
            ForeignTeacher,
            teacher_actor(teacher),
            teacher,
            f"teachers.{name}",
            replace(config.student, model=_local(config.student.model)),
            config.prompts.chat,
        )
        for name, teacher in _with_local_models(config.teachers).items()
    }
    return {"rollout": rollout, **teachers}


def build_learner(
    config: CampaignConfig,
    inputs: Inputs,
    checkpoint: Path | None,
    needed: dict[str, tuple[int, Resources]],
    on_event: Callable[..., None],
) -> Fleet:
    """The learner, not started; with a checkpoint, as it was then. It is not replaced in place: its state is."""
    replicas, resources = needed["learner"]
    kind = LearnerGroup if replicas > 1 else Fleet
    return kind(
        "learner",
        Learner,
        (replace(config.student, model=_local(config.student.model)), config.learner),
        {
            "total_updates": config.pipeline.updates,
            "temperature": config.sampling.temperature,
            "publish_dtype": config.rollout.dtype,
            "bucket_bytes": config.weights.bucket_mebibytes << 20,
            "keep_published": config.weights.encoding == "delta",
            "checkpoint": str(checkpoint.resolve()) if checkpoint else None,
            "teachers": _with_local_models(config.teachers),
            "masked_role_token_ids": inputs.masked_role_token_ids,
        },
        replicas=replicas,
        resources=resources,
        max_restarts=None,
        start_timeout_seconds=config.ray.start_timeout_seconds,
        hang_timeout_seconds=config.ray.hang_timeout_seconds,
        on_event=on_event,
    )


def build_evaluator(config: CampaignConfig, inputs: Inputs, teachers: dict[str, Fleet]) -> Evaluator | None:
    """Of the held-out prompts, where there are any."""
    if inputs.held_out is None or inputs.held_out_lessons is None:
        return None
    return Evaluator(
        inputs.held_out,
        inputs.tokenizer,
        inputs.verifier,
        Teachers(teachers, inputs.held_out_lessons),
        seed=config.seed,
        max_response_tokens=config.sampling.max_response_tokens,
        stop_token_ids=inputs.stop_token_ids,
        keep_trajectories=config.evaluation.keep_trajectories,
    )


def summarise(
    config: CampaignConfig, state: CampaignState, wall_seconds: float, needed: dict[str, tuple[int, Resources]]
) -> dict[str, Any]:
    """The contents of summary.json."""
    end = state.evaluations[max(state.evaluations)] if state.evaluations else {}
    at_the_end: dict[str, int] = {}
    for role, (count, _) in needed.items():
        at_the_end[role_of(role)] = at_the_end.get(role_of(role), 0) + count
    mean = at_the_end | mean_actors(state.actor_seconds, state.loop_seconds)
    slowest = max((state.busy[role] / mean[role] for role in mean if mean[role]), default=0.0)
    return {
        "accuracy_start": state.start.get("eval/accuracy"),
        "accuracy_end": end.get("eval/accuracy"),
        "accuracy_teacher": state.start.get("eval/accuracy_teacher"),
        "accuracy_sampled_start": state.start.get("eval/accuracy_sampled"),
        "accuracy_sampled_end": end.get("eval/accuracy_sampled"),
        "reverse_kl_start": state.start.get("eval/reverse_kl"),
        "reverse_kl_end": end.get("eval/reverse_kl"),
        "updates": state.step,
        "trajectories": state.ledger.trained,
        "tokens_generated": state.tokens_generated,
        "wall_seconds": wall_seconds,
        "busy": state.busy,
        "actors": {"mean": mean, "end": at_the_end},
        "loop_seconds": state.loop_seconds,
        "wall_over_slowest_stage": state.loop_seconds / slowest if slowest else None,
        "utilisation": {"roles": by_role(state.actor_seconds), "actors": state.actor_seconds},
        "cost": cost_of(state.actor_seconds, {role: one for role, (_, one) in needed.items()}, state.tokens_generated),
        "faults": state.faults,
        "ledger": state.ledger.counts(),
        "dropped_because": dict(state.ledger.dropped),
    }


def _with_local_models(teachers: dict[str, TeacherConfig]) -> dict[str, TeacherConfig]:
    return {
        name: replace(
            teacher,
            model=teacher.model if teacher.backend == "http" else _local(teacher.model),
            tokenizer=None if teacher.tokenizer is None else _local(teacher.tokenizer),
        )
        for name, teacher in teachers.items()
    }


def _local(model: str) -> str:
    """Absolute where it is a path: actors may have another working directory."""
    return str(Path(model).resolve()) if Path(model).exists() else model
