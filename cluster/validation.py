"""Refuses settings that are valid each by itself but contradict each other. Pure; standard library only."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from actors.config import EnvironmentConfig, RolloutConfig, TeacherConfig, VerifierConfig, publishes_adapter
from actors.errors import UserError
from actors.import_path import is_import_path
from actors.teacher.backends import BACKENDS, OWN_SETTINGS, backend_of
from cluster.config import CampaignConfig, EvaluationSetConfig
from cluster.guards import check_guards
from cluster.prompt_validation import refuse_sources
from cluster.records.metric_table import guardable
from learner.config import LearnerConfig
from learner.validation import Contradiction, refuse_contradictions

MOST_TRAJECTORIES = 10_000_000
"""More trajectories of an update, or of an evaluation set, than this are a slip of the keyboard: the loop holds a few bytes for each."""
OF_PROMPTS = ("greedy", "sampled")
"""The sets that `understudy evaluate` makes of `evaluation.prompts`."""
LONGEST_NAME = 200
"""Characters of a name. A file's has 255 bytes, and some names of files and jobs have more than the campaign's in them."""
VLLM_TEMPERATURES = 2
"""vLLM samples at most at this many times the temperature that its logits have been divided by."""
LARGEST_ADAPTER = 512
"""The highest rank of an adapter that vLLM accepts."""


def refuse(config: CampaignConfig) -> None:
    """UserError for the first contradiction."""
    refuse_sources(config)
    _objective(config)
    for wrong, key, found, expected in (
        *(row for name, teacher in config.teachers.items() for row in _backend(config, f"teachers.{name}", teacher)),
        *_student(config),
        *_pipeline(config),
        *(row for role, actors in _roles(config).items() for row in _resources(role, actors)),
        *_record(config),
        *_horizon(config),
        *_rewards(config),
        *_evaluation(config),
        *_environment(config),
        *_alerts(config),
    ):
        if wrong:
            raise UserError(key, found, expected)


def _objective(config: CampaignConfig) -> None:
    """The name, the teachers, the objective, and the guards on its metrics."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise UserError("name", repr(config.name), "letters, digits, '.', '_' and '-': it names a directory")
    if len(config.name) > LONGEST_NAME:
        raise UserError("name", f"{len(config.name)} characters", f"at most {LONGEST_NAME}: it names a directory")
    if not config.teachers and config.text_by != "data":
        expected = "at least one, for example teachers.default.model"
        if config.learner.objective.estimator == "sft":
            expected += "; or responses to train on (prompts.response_field)"
        raise UserError("teachers", "none", expected)
    if any(t.domains for t in config.teachers.values()) and not config.prompts.has_domains:
        raise UserError("prompts.domain_field", "null", "the field that teachers.<name>.domains refers to")
    objective, samples = config.learner.objective, config.pipeline.samples_per_prompt
    refuse_contradictions(objective, config.teachers, config.student.model, samples, text_by=config.text_by)
    teaching = [name for name in config.teachers if name != objective.reference_teacher]
    domains = {domain for teacher in config.teachers.values() for domain in teacher.domains}
    domains |= {source.domain for source in config.prompts.sources.values() if source.domain is not None}
    signal = next((teacher.signal for teacher in config.teachers.values()), "sampled")
    metrics = guardable(signal, teaching if len(teaching) > 1 else (), domains)
    check_guards(config.guards, metrics, config.checkpoint.every_updates * config.checkpoint.keep_last)


def _student(config: CampaignConfig) -> Iterator[Contradiction]:
    """Adapters and ranks."""
    lora, adapter = config.student.lora, publishes_adapter(config.student)
    following = next((name for name, teacher in config.teachers.items() if teacher.ema_decay is not None), None)
    expected = f"null where teachers.{following}.ema_decay is given"
    yield lora is not None and following is not None, "student.lora", "adapters", expected
    expected = "dense where student.lora.publish is adapter: an adapter changes completely"
    yield adapter and config.weights.encoding == "delta", "weights.encoding", "delta", expected
    kept = lora is not None and config.student.optimizer == "keep"
    expected = "new: with student.lora, new adapters are trained, and the checkpoint has no moments of them"
    yield kept, "student.optimizer", "keep", expected
    if lora is not None and adapter:
        expected = f"at most {LARGEST_ADAPTER}, or publish: merged"
        yield lora.rank > LARGEST_ADAPTER, "student.lora.rank", lora.rank, expected
        yield lora.dora, "student.lora.dora", "true", "false with publish: adapter, because vLLM has no DoRA"
    gpus, ranks, together = config.learner.gpus_per_replica, config.learner.replicas, config.learner.sequence_parallel
    expected = f"a divisor of learner.replicas, {ranks}"
    yield ranks % together != 0, "learner.sequence_parallel", together, expected
    expected = "1, or 0: each of several ranks has one GPU of its own"
    yield ranks > 1 and gpus not in (None, 0, 1), "learner.gpus_per_replica", gpus, expected


def _pipeline(config: CampaignConfig) -> Iterator[Contradiction]:
    """The engine, the work in flight when weights change, and the trajectories of an update."""
    rollout, pipeline = config.rollout, config.pipeline
    size, parts = config.trajectories_per_update, config.learner.minibatches_per_update
    expected = f"at most {size}, the trajectories of an update (prompts_per_update x samples_per_prompt)"
    yield parts > size, "learner.minibatches_per_update", parts, expected
    lonely = config.learner.objective.baseline == "batch_mean" and size < 2
    expected = "none or exact_kl: an update of one trajectory has no others to take the mean of"
    yield lonely, "learner.objective.baseline", "batch_mean", expected
    known = rollout.backend == "vllm" or is_import_path(rollout.backend)
    yield not known, "rollout.backend", repr(rollout.backend), "vllm, or package.module:Class of your own"
    expected = "0 where max_staleness is 0: which responses are slow is not repeatable"
    yield bool(pipeline.oversample) and not pipeline.max_staleness, "pipeline.oversample", pipeline.oversample, expected
    too_many = config.trajectories_per_update > MOST_TRAJECTORIES
    found = f"{pipeline.prompts_per_update:,} with {pipeline.samples_per_prompt:,} samples each"
    yield too_many, "pipeline.prompts_per_update", found, f"at most {MOST_TRAJECTORIES:,} trajectories an update"
    idle = not rollout.recompute_kv and rollout.on_new_weights == "wait"
    yield idle, "rollout.recompute_kv", "false", "true where on_new_weights is wait: no response runs then"


def _resources(
    role: str, actors: RolloutConfig | TeacherConfig | LearnerConfig | EnvironmentConfig
) -> Iterator[Contradiction]:
    """Custom resources of an actor."""
    for name, amount in actors.resources.items():
        reserved = name in ("CPU", "GPU", "memory", "object_store_memory")
        expected = "a name of your own; cpus_per_replica and gpus_per_replica"
        yield reserved, f"{role}.resources", name, expected
        yield not (math.isfinite(amount) and amount > 0), f"{role}.resources.{name}", amount, "a number > 0"


def _record(config: CampaignConfig) -> Iterator[Contradiction]:
    """What is recorded once need not be recorded again."""
    expected = "false with replay: the record is there already"
    yield config.record and config.replay is not None, "record", "true", expected
    own = config.replay is not None and Path(config.replay).expanduser().absolute().is_relative_to(
        config.run_dir.absolute()
    )
    yield own, "replay", config.replay, "the record of another run: this one has the same name"


def _horizon(config: CampaignConfig) -> Iterator[Contradiction]:
    """The schedules of the length limit and of the limit of turns."""
    sampling, environment, last = config.sampling, config.environment, config.pipeline.updates
    schedules = [
        ("sampling", "response_tokens_schedule", "tokens", "max_response_tokens", sampling),
        *([("environment", "turns_schedule", "turns", "max_turns", environment)] if environment else []),
    ]
    for section, name, unit, limit, own in schedules:
        most, before = getattr(own, limit), 0
        for place, pair in enumerate(getattr(own, name)):
            key = f"{section}.{name}[{place}]"
            yield len(pair) != 2, key, pair, f"two numbers: the update that it begins with, and a number of {unit}"
            update, count = (*pair, 0, 0)[:2]
            yield update <= before, key, f"update {update}", f"an update above {before}, in ascending order"
            yield not 1 <= count <= most, key, f"{count} {unit}", f"1 to {most} ({section}.{limit})"
            yield update > last, key, f"update {update}", f"at most {last}, the last one (pipeline.updates)"
            before = update


def _rewards(config: CampaignConfig) -> Iterator[Contradiction]:
    """References for rewards."""
    hang = config.ray.hang_timeout_seconds
    verifiers = {"verifier": config.evaluation.verifier}
    verifiers |= {f"verifiers.{domain}": one for domain, one in config.evaluation.verifiers.items()}
    expected = f"less than ray.hang_timeout_seconds ({hang:g}), where rollout actors give rewards"
    for name, one in verifiers.items():
        verdict = one.timeout_seconds
        yield config.judges_training and verdict >= hang, f"evaluation.{name}.timeout_seconds", verdict, expected
    # Functions of the user's own may do without; `read_inputs` knows whether they do.
    own = any(is_import_path(one.name) for one in verifiers.values())
    for key, source in config.prompts.each_source("prompts").items():
        missing = config.judges_training and source.reference_field is None and not own
        yield missing, f"{key}.reference_field", "null", "the field with the reference answer, for rewards"


def _evaluation(config: CampaignConfig) -> Iterator[Contradiction]:
    """Evaluation sets: their names, and what each can measure."""
    sets = config.evaluation.sets
    expected = f"null, or one of evaluation.sets ({', '.join(sets) or 'there is none'})"
    unknown = config.checkpoint.best_by is not None and config.checkpoint.best_by not in sets
    yield unknown, "checkpoint.best_by", config.checkpoint.best_by, expected
    for name, one in sets.items():
        key = f"evaluation.sets.{name}"
        named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None and len(name) <= LONGEST_NAME
        yield (
            not named,
            "evaluation.sets",
            repr(name),
            "letters, digits, '.', '_' and '-': it is in the names of metrics",
        )
        of_prompts = name in OF_PROMPTS and config.evaluation.prompts is not None
        expected = "another name: understudy evaluate calls evaluation.prompts so"
        yield of_prompts, "evaluation.sets", name, expected
        expected = f"at most {MOST_TRAJECTORIES:,} trajectories of a set"
        yield one.samples > MOST_TRAJECTORIES, f"{key}.samples", f"{one.samples:,}", expected
        expected = "1 with temperature: 0: greedy answers to a prompt are all the same"
        yield one.temperature == 0 and one.samples > 1, f"{key}.samples", one.samples, expected
        highest = VLLM_TEMPERATURES * config.sampling.temperature
        expected = f"at most {highest:g}, {VLLM_TEMPERATURES} times sampling.temperature, which is as far as vLLM goes"
        hot = config.rollout.backend == "vllm" and (one.temperature or 0) > highest
        yield hot, f"{key}.temperature", one.temperature, expected
        scored = config.is_scored(one)
        expected = "a verifier; or temperature, top_p and top_k of null, since the reverse KL is of the policy that training samples"
        unmeasured = one.verifier is None and not scored and config.environment is None
        yield unmeasured, f"{key}.verifier", "null", expected
        needs = one.verifier is not None and not one.prompts.has_references
        verifiers = [] if one.verifier is None else [one.verifier, *config.evaluation.verifiers.values()]
        own = any(is_import_path(its.name) for its in verifiers)
        expected = "the field with the reference answer that the verifier reads"
        yield needs and not own, f"{key}.prompts.reference_field", "null", expected
        yield from _exposure(config, key, one)


def _exposure(config: CampaignConfig, key: str, one: EvaluationSetConfig) -> Iterator[Contradiction]:
    """Whether the teacher can write texts for the student to continue."""
    expected = (
        "false with temperature, top_p or top_k of its own: the reverse KL is of the policy that training samples"
    )
    yield one.exposure and not config.is_scored(one), f"{key}.exposure", "true", expected
    alone = one.exposure and not config.teachers
    yield alone, f"{key}.exposure", "true", "false without a teacher, which writes the prefixes"
    several = one.exposure and len(config.teachers) > 1
    yield several, f"{key}.exposure", "true", "false with several teachers: one of them writes the prefixes"
    for name, teacher in config.teachers.items():
        expected = f"false: the backend {teacher.backend} of teachers.{name} does not sample"
        yield one.exposure and not backend_of(teacher).samples, f"{key}.exposure", "true", expected
        other = teacher.tokenizer is not None or teacher.prompt_template is not None
        expected = f"false: teachers.{name} reads other tokens than the student (tokenizer, prompt_template)"
        yield one.exposure and other, f"{key}.exposure", "true", expected


def _environment(config: CampaignConfig) -> Iterator[Contradiction]:
    """What goes with an environment."""
    own = config.environment
    if own is None:
        return
    both = own.name is not None and bool(own.command)
    yield both, "environment.command", "a program, and a class in environment.name", "one of the two"
    neither = not own.name and not own.command
    expected = "a class of your own (environment.name: package.module:Class), or a program (environment.command)"
    yield neither, "environment", "neither a class nor a program", expected
    wrong = bool(own.name and not is_import_path(own.name))
    yield wrong, "environment.name", repr(own.name), "the import path of a class of your own, package.module:Class"
    nameless = bool(own.command and not own.command[0].strip())
    yield nameless, "environment.command", own.command, "a program and its arguments, [python, agent.py]"
    expected = "nothing where a program plays: its arguments are part of environment.command"
    yield bool(own.command and own.arguments), "environment.arguments", own.arguments, expected
    held_out = config.evaluation.prompts
    sections = {"prompts": config.prompts, **({"evaluation.prompts": held_out} if held_out is not None else {})}
    sections |= {f"evaluation.sets.{name}.prompts": one.prompts for name, one in config.evaluation.sets.items()}
    for key, section in sections.items():
        yield not section.chat, f"{key}.chat", "false", "true where an environment answers: turns are chat messages"
        continued = bool(section.chat_template_arguments.get("continue_final_message"))
        expected = "nothing where an environment answers: each turn is a message of its own"
        yield continued, f"{key}.chat_template_arguments.continue_final_message", "true", expected
        other = section.chat_template_arguments != config.prompts.chat_template_arguments
        expected = "those of prompts.chat_template_arguments where an environment answers"
        yield other, f"{key}.chat_template_arguments", section.chat_template_arguments, expected
    expected = "nothing where an environment answers: it gives the rewards"
    named = config.evaluation.verifier != VerifierConfig()
    yield named, "evaluation.verifier", config.evaluation.verifier.name, expected
    yield bool(config.evaluation.verifiers), "evaluation.verifiers", ", ".join(config.evaluation.verifiers), expected
    for name, one in config.evaluation.sets.items():
        expected = "null where an environment answers: it gives the rewards"
        yield one.verifier is not None, f"evaluation.sets.{name}.verifier", "a verifier", expected
        expected = "false where an environment answers: the teacher plays no episode"
        yield one.exposure, f"evaluation.sets.{name}.exposure", "true", expected
    sft = config.learner.objective.estimator == "sft"
    expected = "an estimator on the student's own samples, where an environment answers: the teacher plays no episode"
    yield sft, "learner.objective.estimator", "sft", expected
    for name, teacher in config.teachers.items():
        expected = "null where an environment answers: what it writes between the turns is in the student's tokens"
        yield teacher.tokenizer is not None, f"teachers.{name}.tokenizer", teacher.tokenizer, expected
        expected = "null where a program plays: it writes the prompt, and this one is made of the record"
        own_prompt = bool(own.command) and teacher.prompt_template is not None
        yield own_prompt, f"teachers.{name}.prompt_template", teacher.prompt_template, expected


def _alerts(config: CampaignConfig) -> Iterator[Contradiction]:
    """The URL that alerts are sent to. It may be a secret, so it is in no message."""
    url = config.alerts.webhook
    wrong = url is not None and not url.startswith("$") and not _is_server(url)
    yield wrong, "alerts.webhook", "something else", "http://host/path or https://host/path"


def _is_server(url: str) -> bool:
    """Whether the url can be one of a server; it holds no user or key."""
    try:
        port = urlsplit(url).port  # ValueError: beyond 65535, or no number
    except ValueError:
        return False
    return port != 0 and re.fullmatch(r"https?://[^/@\s]+(/\S*)?", url) is not None


def _backend(config: CampaignConfig, key: str, teacher: TeacherConfig) -> Iterator[Contradiction]:
    """What the backend of a teacher cannot do, and settings that it would ignore."""
    row, backend = backend_of(teacher, key), teacher.backend
    expected = f"{' or '.join(row.signals)} from the backend {backend}"
    yield teacher.signal not in row.signals, f"{key}.signal", teacher.signal, expected
    expected = f"at least one server for the backend {backend}"
    yield "urls" in row.settings and not teacher.urls, f"{key}.urls", "none", expected
    for url in teacher.urls:
        expected = "http://host:port/v1 (a key goes into the environment, api_key_variable)"
        yield not _is_server(url), f"{key}.urls", url, expected
    size, follows = teacher.tensor_parallel_size, teacher.ema_decay is not None
    expected = f"1 with {'ema_decay' if follows else f'backend: {backend}'}"
    yield size > 1 and (follows or not row.tensor_parallel), f"{key}.tensor_parallel_size", size, expected
    temperature = teacher.temperature if teacher.temperature is not None else config.sampling.temperature
    found = temperature if teacher.temperature is not None else f"null, so sampling.temperature, {temperature:g}"
    expected = f"1: the backend {backend} sends log-probs at temperature 1 only"
    yield temperature != 1 and not row.tempers, f"{key}.temperature", found, expected
    for name in OWN_SETTINGS:
        ignored = bool(getattr(teacher, name)) and name not in row.settings
        readers = " or ".join(other for other, its in BACKENDS.items() if name in its.settings)
        yield ignored, f"{key}.{name}", getattr(teacher, name), f"nothing, or backend: {readers}"
    held_out, sets = config.evaluation.prompts, config.evaluation.sets.values()
    judged = (held_out is not None and held_out.has_references) or any(one.verifier for one in sets)
    measured = judged and config.evaluation.teacher
    expected = f"false: the backend {backend} of {key} does not generate"
    yield measured and not row.generates, "evaluation.teacher", "true", expected


def _roles(config: CampaignConfig) -> dict[str, RolloutConfig | TeacherConfig | LearnerConfig | EnvironmentConfig]:
    teachers = {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    environment = {"environment": config.environment} if config.environment is not None else {}
    return {"rollout": config.rollout, **teachers, "learner": config.learner, **environment}
