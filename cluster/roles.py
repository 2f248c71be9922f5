"""Which role gets what: the class, the arguments and the resources of the rollout actors, the teachers and the learner.

Nothing is started here. Paths become absolute, since actors may have another working directory.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.config import StudentConfig, TeacherConfig, publishes_adapter
from actors.data.contexts import engine_context
from actors.data.models import load_config
from actors.gpu_share import is_share
from actors.rollout.actor import RolloutActor
from actors.rollout.saved_model import SavedModel
from actors.teacher.backends import backend_of, teacher_class
from actors.teacher.cross_tokenizer import CrossTokenizerTeacher
from actors.teacher.turn_ends import TurnEndTeacher
from cluster.config import CampaignConfig
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_environments import RESTARTS, EnvironmentFleet, RayEnvironmentActor
from cluster.fleet.ray_fleet import Fleet
from cluster.fleet.ray_learner import LearnerGroup
from cluster.inputs import Inputs
from cluster.lengths import episode_limits, longest_written, prompt_lengths
from cluster.loop.evaluation import Evaluator
from cluster.loop.evaluation_sets import Evaluations, SetEvaluator
from cluster.loop.teachers import Teachers
from learner.learner import Learner
from learner.schedule import Plan

SPARE_TOKENS = 128
"""Room in a teacher's context for its self-test, for the end of a turn, and for the token that vLLM writes."""


def build_fleets(
    config: CampaignConfig,
    inputs: Inputs,
    needed: dict[str, tuple[int, Resources]],
    begin: dict[str, int],
    on_event: Callable[..., None],
    turn: asyncio.Lock,
) -> dict[str, Fleet]:
    """The fleets `rollout` and `teacher.<name>`, not started.

    needed: role -> (actors, resources of one actor). begin: role -> actors to start with; fewer than `needed` where the
    cluster has no room for all yet. turn: held by each actor that starts on a share of a GPU.
    """

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
            turn=turn if is_share(resources.gpus) else None,
        )

    rollout = fleet(
        "rollout",
        RolloutActor,
        _local(config.student.source),
        replace(config.rollout, gpus_per_replica=needed["rollout"][1].gpus),
        config.sampling,
        inputs.stop_token_ids,
        config.seed,
        support_size=config.student_support_size,
        keep_weights=config.weights.encoding == "delta",  # the base of the next one
        verifier=config.evaluation.verifier if config.judges_training else None,
        verifiers=config.evaluation.verifiers,
        adapter=config.student.lora if publishes_adapter(config.student) else None,
        vocabulary=inputs.vocabulary,
        prompts=prompt_lengths(config, inputs),
        environment=config.environment,
        limits=episode_limits(config, inputs),
        template_arguments=config.prompts.chat_template_arguments,
        trust_remote_code=config.student.trust_remote_code,
    )
    fleets = {"rollout": rollout}
    if config.environment is not None:
        role = "environment"
        fleets[role] = _environments(config, begin[role], needed[role][1], on_event, rollout)
    for name, teacher in _as_actors_need(config).items():
        role, key = f"teacher.{name}", f"teachers.{name}"
        engine, gpus = _teacher_engine(config, inputs, name, teacher), needed[role][1].gpus
        teacher = replace(teacher, gpus_per_replica=gpus, engine=engine)
        actor = teacher_class(teacher, key)
        if name in inputs.turn_ends:
            fleets[role] = fleet(role, TurnEndTeacher, actor, teacher, key, inputs.vocabulary, inputs.turn_ends[name])
        elif teacher.tokenizer is None:
            fleets[role] = fleet(role, actor, teacher, key, vocabulary=inputs.vocabulary)
        else:
            prompts = (config.prompts.chat, config.prompts.chat_template_arguments)
            fleets[role] = fleet(role, CrossTokenizerTeacher, actor, teacher, key, _local_student(config), *prompts)
    return fleets


def _environments(
    config: CampaignConfig, replicas: int, resources: Resources, on_event: Callable[..., None], rollout: Fleet
) -> Fleet:
    """The environment actors, which rollout actors call."""
    found = EnvironmentFleet(
        "environment",
        RayEnvironmentActor,
        (config.environment, config.sampling, os.getcwd()),
        {},
        replicas=replicas,
        resources=resources,
        max_restarts=RESTARTS * config.ray.max_restarts,
        start_timeout_seconds=config.ray.start_timeout_seconds,
        hang_timeout_seconds=config.ray.hang_timeout_seconds,
        on_event=on_event,
    )
    found.serve(rollout)
    return found


def build_learner(
    config: CampaignConfig,
    inputs: Inputs,
    checkpoint: Path | None,
    plans: Sequence[Plan],
    needed: dict[str, tuple[int, Resources]],
    on_event: Callable[..., None],
    turn: asyncio.Lock,
) -> Fleet:
    """The learner, not started. checkpoint: where it takes its state from; None at the start of a campaign. plans: of a
    learning rate that was planned anew. turn: see `build_fleets`.

    The fleet does not replace a learner that has died: its weights are lost, so the campaign goes back to a checkpoint.
    """
    replicas, resources = needed["learner"]
    kind = LearnerGroup if replicas > 1 else Fleet
    return kind(
        "learner",
        Learner,
        (_local_student(config), config.learner),
        {
            "total_updates": config.pipeline.updates,
            "temperature": config.sampling.temperature,
            "publish_dtype": config.rollout.dtype,
            "bucket_bytes": config.weights.bucket_mebibytes << 20,
            "keep_published": config.weights.encoding == "delta",
            "checkpoint": str(checkpoint.resolve()) if checkpoint else None,
            "teachers": {} if config.text_by == "data" else _as_actors_need(config),
            "masked_role_token_ids": inputs.masked_role_token_ids,
            "turn_ends": inputs.turn_ends,
            "vocabulary": inputs.vocabulary,
            "plans": tuple(plans),
            "records": config.record,
            "of_data": config.text_by == "data",
        },
        replicas=replicas,
        resources=resources,
        max_restarts=None,
        start_timeout_seconds=config.ray.start_timeout_seconds,
        hang_timeout_seconds=config.ray.hang_timeout_seconds,
        on_event=on_event,
        turn=turn if is_share(resources.gpus) else None,
    )


def build_saved_model(
    config: CampaignConfig,
    needed: dict[str, tuple[int, Resources]],
    on_event: Callable[..., None],
    turn: asyncio.Lock,
) -> Fleet:
    """One actor that publishes the weights of `student.model`, in the place of a learner; not started."""
    student = config.student
    return Fleet(
        "weights",
        SavedModel,
        (
            _local(student.source),
            config.rollout.dtype,
            config.weights.bucket_mebibytes << 20,
            student.trust_remote_code,
            "student.model",
        ),
        {},
        replicas=1,
        resources=needed["learner"][1],
        max_restarts=config.ray.max_restarts,
        start_timeout_seconds=config.ray.start_timeout_seconds,
        hang_timeout_seconds=config.ray.hang_timeout_seconds,
        on_event=on_event,
        turn=turn if is_share(needed["learner"][1].gpus) else None,
    )


def build_evaluator(
    config: CampaignConfig, inputs: Inputs, teachers: dict[str, Fleet], on_event: Callable[..., None]
) -> Evaluations | None:
    """The evaluations of the held-out prompts and of all sets; None if the configuration has none."""
    of_prompts = None
    share = 1 + len(inputs.sets) if inputs.held_out is not None else max(len(inputs.sets), 1)
    keep = -(-config.evaluation.keep_trajectories // share)
    if inputs.held_out is not None and inputs.held_out_routes is not None:
        of_prompts = Evaluator(
            inputs.held_out,
            inputs.tokenizer,
            inputs.judge,
            Teachers(teachers, inputs.held_out_routes),
            seed=config.seed,
            sampling=config.evaluated.sampling,
            stop_token_ids=inputs.stop_token_ids,
            keep_trajectories=keep,
            on_event=on_event,
        )
    sets = build_sets(config, inputs, teachers, on_event, keep)
    return Evaluations(config, of_prompts, sets) if of_prompts or sets else None


def build_sets(
    config: CampaignConfig, inputs: Inputs, teachers: dict[str, Fleet], on_event: Callable[..., None], keep: int
) -> dict[str, SetEvaluator]:
    """The evaluators of `evaluation.sets`. teachers: {} where no teacher is asked. keep: trajectories kept of each set."""
    return {
        name: SetEvaluator(
            name,
            one.prompts,
            inputs.tokenizer,
            one.judge,
            Teachers(teachers, one.routes),
            config=config,
            stop_token_ids=inputs.stop_token_ids,
            keep_trajectories=keep,
            on_event=on_event,
        )
        for name, one in inputs.sets.items()
    }


def starts_last(config: CampaignConfig) -> set[str]:
    """Roles whose engines size themselves by the free memory of their GPU, which must not change meanwhile."""
    teachers = {
        f"teacher.{name}" for name, t in config.teachers.items() if backend_of(t, f"teachers.{name}").measures_gpu
    }
    return {"rollout", *teachers}


def _teacher_engine(config: CampaignConfig, inputs: Inputs, name: str, teacher: TeacherConfig) -> dict[str, Any]:
    """The options of a teacher's engine, with the length of the longest text that it reads as `max_model_len`.

    By default vLLM wants room in its cache for one text of the model's whole context, which few GPUs have beside a large
    model. A teacher with its own tokenizer reads as many tokens as its tokenizer makes: it keeps the default.
    """
    if (
        not backend_of(teacher, f"teachers.{name}").measures_gpu
        or teacher.tokenizer
        or "max_model_len" in teacher.engine
    ):
        return teacher.engine
    response = config.sampling.max_response_tokens
    evaluated = config.evaluated.sampling.max_response_tokens
    sets = [(inputs.prompts, inputs.prompt_routes, response), (inputs.held_out, inputs.held_out_routes, evaluated)]
    sets += [
        (one.prompts, one.routes, config.sampling_of(config.evaluation.sets[key]).max_response_tokens)
        for key, one in inputs.sets.items()
    ]
    most = max(
        int(np.diff(routes.privileged.get(name, prompts).offsets).max()) + length
        for prompts, routes, length in sets
        if prompts is not None and routes is not None
    )
    most = max(most, longest_written(config) + response)
    network = load_config(teacher.model, teacher.trust_remote_code, f"teachers.{name}.model")
    context = engine_context(network, {}, f"teachers.{name}.engine")
    return {"max_model_len": min(most + SPARE_TOKENS, context), **teacher.engine}


def _local_student(config: CampaignConfig) -> StudentConfig:
    return replace(config.student, model=_local(config.student.source), revision=None)


def _as_actors_need(config: CampaignConfig) -> dict[str, TeacherConfig]:
    """The teachers with absolute paths, and with the student's temperature where they have none of their own."""
    return {
        name: replace(
            teacher,
            model=_local(teacher.source) if backend_of(teacher, f"teachers.{name}").has_model_files else teacher.model,
            revision=None,
            tokenizer=None if teacher.tokenizer_source is None else _local(teacher.tokenizer_source),
            tokenizer_revision=None,
            temperature=config.sampling.temperature if teacher.temperature is None else teacher.temperature,
        )
        for name, teacher in config.teachers.items()
    }


def _local(model: str) -> str:
    """The absolute path of a model that is a path here; a hub name unchanged."""
    return str(Path(model).resolve()) if Path(model).exists() else model
