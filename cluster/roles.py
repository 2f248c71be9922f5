"""The actors that a configuration asks for, not started: fleets of rollout actors and of teachers, and the learner."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.config import TeacherConfig, publishes_adapter
from actors.rollout.actor import RolloutActor
from actors.teacher.cross_tokenizer import ForeignTeacher
from actors.teacher.http import HttpTeacher
from actors.teacher.local import TeacherActor
from actors.teacher.tensor_parallel import ShardedTeacher
from actors.teacher.vllm_teacher import VllmTeacher
from cluster.config import CampaignConfig
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_fleet import Fleet
from cluster.fleet.ray_learner import LearnerGroup
from cluster.inputs import Inputs
from learner.learner import Learner

TEACHER_ACTORS: dict[str, type] = {"transformers": TeacherActor, "vllm": VllmTeacher, "http": HttpTeacher}
"""By `teachers.<name>.backend`."""


def teacher_actor(teacher: TeacherConfig) -> type:
    """What runs this teacher."""
    several = teacher.backend == "transformers" and teacher.tensor_parallel_size > 1
    return ShardedTeacher if several else TEACHER_ACTORS[teacher.backend]


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
