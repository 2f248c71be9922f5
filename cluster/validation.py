"""Configurations that no single key can be blamed for: what one key asks and another does not allow. Pure."""

import math
import re

from actors.config import RolloutConfig, TeacherConfig, publishes_adapter
from actors.errors import UserError
from actors.import_path import is_import_path
from actors.teacher.backends import BACKENDS, OWN_SETTINGS, backend_of
from cluster.config import CampaignConfig
from cluster.guards import check_guards
from cluster.records.metric_table import guardable
from learner.config import LearnerConfig
from learner.validation import refuse_contradictions

LARGEST_ADAPTER = 512
"""The highest rank that vLLM takes."""


def refuse(config: CampaignConfig) -> None:
    """UserError for the first contradiction."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise UserError("name", repr(config.name), "letters, digits, '.', '_' and '-': it names a directory")
    _objective(config)
    for name, teacher in config.teachers.items():
        _backend(config, f"teachers.{name}", teacher)
    _student(config)
    _pipeline(config)
    for role, actors in _roles(config).items():
        _resources(role, actors)
    _rewards(config)


def _objective(config: CampaignConfig) -> None:
    """Teachers, the objective, and guards that watch what these measure."""
    if not config.teachers:
        raise UserError("teachers", "none", "at least one, for example teachers.default.model")
    if any(t.domains for t in config.teachers.values()) and config.prompts.domain_field is None:
        raise UserError("prompts.domain_field", "null", "the field that teachers.<name>.domains speaks of")
    refuse_contradictions(
        config.learner.objective, config.teachers, config.student.model, config.pipeline.samples_per_prompt
    )
    teaching = [name for name in config.teachers if name != config.learner.objective.reference_teacher]
    domains = {domain for teacher in config.teachers.values() for domain in teacher.domains}
    metrics = guardable(next(iter(config.teachers.values())).signal, teaching if len(teaching) > 1 else (), domains)
    check_guards(config.guards, metrics, config.checkpoint.every_updates * config.checkpoint.keep_last)


def _student(config: CampaignConfig) -> None:
    """Adapters and ranks."""
    following = [name for name, teacher in config.teachers.items() if teacher.ema_decay is not None]
    if config.student.lora is not None and following:
        raise UserError("student.lora", "adapters", f"null where teachers.{following[0]}.ema_decay is given")
    if publishes_adapter(config.student) and config.weights.encoding == "delta":
        raise UserError("weights.encoding", "delta", "dense where student.lora.publish is adapter: all of it changes")
    lora = config.student.lora
    if lora is not None and lora.publish == "adapter" and lora.rank > LARGEST_ADAPTER:
        raise UserError("student.lora.rank", lora.rank, f"at most {LARGEST_ADAPTER}, or publish: merged")
    if lora is not None and lora.publish == "adapter" and lora.dora:
        raise UserError("student.lora.dora", "true", "false with publish: adapter, since vLLM has no such adapters")
    gpus = config.learner.gpus_per_replica
    if config.learner.replicas > 1 and gpus is not None and gpus not in (0.0, 1.0):
        raise UserError("learner.gpus_per_replica", gpus, "1, or 0: each of several ranks has one GPU of its own")


def _pipeline(config: CampaignConfig) -> None:
    """The engine, and what is under way when weights change."""
    backend = config.rollout.backend
    if backend != "vllm" and not is_import_path(backend):
        raise UserError("rollout.backend", repr(backend), "vllm, or package.module:Class of your own", ["vllm"])
    if config.pipeline.oversample and not config.pipeline.max_staleness:
        raise UserError(
            "pipeline.oversample",
            config.pipeline.oversample,
            "0 where max_staleness is 0: who is slow is not repeatable",
        )
    if not config.rollout.recompute_kv and config.rollout.on_new_weights == "wait":
        raise UserError("rollout.recompute_kv", "false", "true where on_new_weights is wait: nothing runs then")


def _resources(role: str, actors: RolloutConfig | TeacherConfig | LearnerConfig) -> None:
    """Of an actor's own resources."""
    for name, amount in actors.resources.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise UserError(f"{role}.resources", name, "a name of your own; cpus_per_replica and gpus_per_replica")
        if not (math.isfinite(amount) and amount > 0):
            raise UserError(f"{role}.resources.{name}", amount, "a number > 0")


def _rewards(config: CampaignConfig) -> None:
    """References and verifiers, of evaluations and of rewards."""
    if config.evaluation.prompts is not None and config.evaluation.prompts.reference_field is None:
        raise UserError("evaluation.prompts.reference_field", "null", "the field with the reference answer")
    if config.gives_rewards and config.evaluation.verifier.name == "math":
        expected = "numeric, regex, or a function of your own: rollout actors cannot bound the time of math-verify"
        raise UserError("evaluation.verifier.name", "math", expected)
    if config.gives_rewards and config.prompts.reference_field is None:
        raise UserError("prompts.reference_field", "null", "the field with the reference answer, for rewards")


def _backend(config: CampaignConfig, key: str, teacher: TeacherConfig) -> None:
    """Refuses what the backend of a teacher cannot do, and settings that it would ignore."""
    row = backend_of(teacher, key)
    if teacher.signal not in row.signals:
        expected = f"{' or '.join(row.signals)} from the backend {teacher.backend}"
        raise UserError(f"{key}.signal", teacher.signal, expected)
    if "urls" in row.settings and not teacher.urls:
        raise UserError(f"{key}.urls", "none", f"at least one server for the backend {teacher.backend}")
    for url in teacher.urls:
        if not re.fullmatch(r"https?://[^/@\s]+(/\S*)?", url):
            raise UserError(
                f"{key}.urls", url, "http://host:port/v1 (a key goes into the environment, api_key_variable)"
            )
    if teacher.tensor_parallel_size > 1 and (not row.tensor_parallel or teacher.ema_decay is not None):
        other = "ema_decay" if teacher.ema_decay is not None else f"backend: {teacher.backend}"
        raise UserError(f"{key}.tensor_parallel_size", teacher.tensor_parallel_size, f"1 with {other}")
    for name in OWN_SETTINGS:
        if getattr(teacher, name) and name not in row.settings:
            readers = " or ".join(other for other, its in BACKENDS.items() if name in its.settings)
            raise UserError(f"{key}.{name}", getattr(teacher, name), f"nothing, or backend: {readers}")
    if not row.generates and config.evaluation.prompts is not None and config.evaluation.teacher:
        expected = f"false: the backend {teacher.backend} of {key} does not generate"
        raise UserError("evaluation.teacher", "true", expected)


def _roles(config: CampaignConfig) -> dict[str, RolloutConfig | TeacherConfig | LearnerConfig]:
    teachers = {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    return {"rollout": config.rollout, **teachers, "learner": config.learner}
