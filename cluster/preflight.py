"""Checks a campaign before it starts, in a few seconds: models, tokenizers, prompts, verifier, mirror, cluster."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from actors.accelerator import Card, card_here
from actors.config import RolloutConfig, StudentConfig, TeacherConfig
from actors.data.judge import Judge
from actors.data.models import check_fit, find_model, load_config, looks_local, tensor_parallel_plan
from actors.data.tokenizer import check_tokenizers_agree, load_tokenizer, template_difference
from actors.data.weight_files import opened
from actors.environment.actor import environment_maker
from actors.environment.trial import try_environment
from actors.errors import UserError
from actors.gpu_share import LARGEST_CARD_BYTES
from actors.import_path import is_import_path
from actors.prompts.files import is_pattern
from actors.rollout.engine import engine_class
from actors.teacher.alignment import make_reader
from actors.teacher.backends import backend_of, needs_plan, refuse_full, refuse_without_gpu
from actors.vllm_options import check_options
from cluster.config import CampaignConfig, prompt_sources
from cluster.fleet.gpu_division import division, refuse_overdrawn
from cluster.fleet.ray_cluster import check_gpus, connected, refuse_relative_output, room_to_begin, transfer_rate
from cluster.inputs import Inputs, read_inputs
from cluster.lengths import episode_limits
from cluster.pins import pin, places, refuse_revisions
from cluster.planning.memory import LARGE_VERSION, Role, roles, student_numbers, version_bytes, versions_sentence
from cluster.planning.record_size import record_bytes, record_sentence
from cluster.prompt_reading import max_prompt_tokens
from cluster.special_tokens import student_stop_tokens, turn_ends
from cluster.state.mirror import mirror_of
from cluster.state.recorded import replayed
from cluster.state.resume import refuse_output
from cluster.state.same_inputs import fingerprints
from cluster.tracking.alerts import check_alerts
from learner.config import LearnerConfig
from learner.objective.estimator_table import own_functions
from learner.student.checkpoint import MOMENTS_FILE
from learner.validation import starts_at_learner


def checks(config: CampaignConfig, *, offline: bool) -> Iterator[tuple[str, Callable[[], str] | None]]:
    """Yields (name, check). A check returns a description of what it found, or raises UserError. None: cannot run here.

    offline: check only files on this machine, skip hub names and paths that do not exist here, and ask no cluster.
    """

    def here(*paths: str) -> bool:
        return not offline or all(Path(path).expanduser().exists() for path in paths)

    def named(name: str, *paths: str) -> str:
        """With the path that keeps a check from being run: it may be misspelt, or be one of the cluster's."""
        missing = [path for path in paths if (path == config.replay or looks_local(path)) and not here(path)]
        return f"{name} ({missing[0]} is not on this machine)" if missing else name

    refuse_revisions(config)
    if not offline:
        refuse_output(config)
    if not offline and any(place.on_hub for place in places(config)):
        yield "hub", lambda: pin(config)
    student = config.student
    yield named("student", student.model), (lambda: _student(config)) if here(student.model) else None
    for name, teacher in config.started_teachers.items():
        its = [student.model, *([teacher.model] if backend_of(teacher).has_model_files else [])]
        check = (lambda name=name: _teacher(config, name)) if here(*its) else None
        yield named(f"teacher {name}", *its), check
    yield "engine", lambda: _engine(config)
    shares = division({role: (count, gpus or 0) for role, (count, gpus) in _configured(config).items()})
    if shares:
        yield "shares of GPUs", lambda: shares
    models = [student.model, *(t.model for t in config.started_teachers.values() if backend_of(t).has_model_files)]
    memory = cache(lambda: {role.name: role for role in roles(config)})
    teachers = [f"teachers.{name}" for name in config.teachers] if config.started_teachers else []
    for name in ["learner", *(["rollout"] if config.needs_rollout else []), *teachers]:
        yield f"memory of {name}", (partial(_memory, name, memory)) if here(*models) else None
    if own_functions(config.learner.objective):
        yield "objective", lambda: _objective(config)
    evaluation = config.evaluation.prompts
    sources = [source.path for source in prompt_sources(config).values() if source.path is not None]
    files = [path for path in sources if not is_pattern(path)]
    read = (*models, *files)  # the models too: a prompt has to fit into the contexts of all
    inputs = cache(lambda: read_inputs(config))
    yield named("prompts", *read), (lambda: _prompts(inputs())) if here(*read) else None
    own = any(is_import_path(one.name) for one in (config.evaluation.verifier, *config.evaluation.verifiers.values()))
    if config.environment is not None:
        tried = (student.model, *files)
        yield (
            named("environment", *tried),
            (lambda: _environment(config, inputs() if here(*read) else None)) if here(*tried) else None,
        )
    elif (evaluation is not None and (evaluation.has_references or own)) or config.gives_rewards:
        yield "verifier", lambda: _verifier(config)
    if config.record:
        yield "record", (lambda: record_sentence(config)) if here(*models) else None
    if config.replay is not None:
        read = (config.replay, *read)
        yield named("replay", *read), (lambda: _replay(config)) if here(*read) else None
    if config.checkpoint.mirror is not None:
        yield "mirror", None if offline else lambda: _mirror(config)
    if config.alerts.command or config.alerts.webhook:
        yield "alerts", lambda: check_alerts(config.alerts)
    yield "cluster", None if offline else lambda: _cluster(config)


DOING = {
    "hub": "asking the hub for commits",
    "student": "reading its configuration, the headers of its weights and its tokenizer",
    "teacher": "reading its configuration, the headers of its weights and its tokenizer",
    "engine": "looking for the engine and its options",
    "memory": "adding up what one actor holds",
    "objective": "calling your own functions on a small example",
    "prompts": "reading and rendering all prompts",
    "environment": "beginning an episode with the first record",
    "verifier": "starting it and judging an answer",
    "record": "reckoning its size",
    "replay": "reading all shards for their checksums",
    "mirror": "writing a file and reading it",
    "alerts": "looking for what they call",
    "cluster": "asking the cluster for its nodes; without an address, starting a private one",
}
"""First word of a check's name -> what it does."""


def doing(name: str) -> str:
    """What a check does, in a few words."""
    return DOING.get(name.partition(" ")[0], "looking")


def check_models(config: CampaignConfig) -> None:
    """UserError unless all model files are complete, the tokenizers agree, and the engine's class can be imported."""
    check_alerts(config.alerts)
    _engine(config)
    if config.environment is not None:
        environment_maker(config.environment, config.sampling, os.getcwd())
    _student(config)
    for name in config.started_teachers:
        _teacher(config, name)
    if config.record:
        record_bytes(config)


def _environment(config: CampaignConfig, inputs: Inputs | None) -> str:
    assert config.environment is not None
    student = config.student
    tokenizer = load_tokenizer(student.source, student.trust_remote_code, "student.model")
    room = None if inputs is None else episode_limits(config, inputs).tokens - config.sampling.max_response_tokens
    return try_environment(
        config.environment, config.prompts, tokenizer, student_stop_tokens(config), config.sampling, room
    )


def _memory(name: str, all_roles: Callable[[], Mapping[str, Role]]) -> str:
    """What one actor of a role holds, item by item. UserError: more than the card of this machine, if it has one."""
    known = all_roles()
    if name not in known:
        return "on its servers"
    gpus = known[name].gpus
    card = card_here() if gpus != 0 else None
    if card is not None:
        card = card.share(1 if gpus is None else gpus)
        known[name].demand_room(card)
    elif gpus:  # which GPU it will be is not known here
        known[name].demand_room(
            Card(f"the largest GPU of {LARGEST_CARD_BYTES / 1e9:.0f} GB", LARGEST_CARD_BYTES).share(gpus)
        )
    return known[name].sentence(card)


def _mirror(config: CampaignConfig) -> str:
    mirror = mirror_of(config)
    if mirror:
        mirror.try_out()
    steps = mirror.steps() if mirror else []
    return f"{config.checkpoint.mirror}, " + (f"with step {steps[-1]}" if steps else "with no copy yet")


def _engine(config: CampaignConfig) -> str:
    engine_class(config.rollout.backend)
    if config.rollout.backend == "vllm":
        check_options(config.rollout.engine, "rollout.engine")
    for name, teacher in config.teachers.items():
        if teacher.backend == "vllm":
            check_options(teacher.engine, f"teachers.{name}.engine")
    refuse_overdrawn(config, {role: gpus for role, (_, gpus) in _configured(config).items()})
    for name, teacher in config.teachers.items():
        if teacher.gpus_per_replica == 0:
            refuse_without_gpu(teacher, f"teachers.{name}", 0)
    objective, dtypes = config.learner.objective, (config.rollout.dtype, config.learner.compute_dtype)
    clips = starts_at_learner(replace(objective, mismatch=replace(objective.mismatch, pi_old="learner")))
    if set(dtypes) != {"float32"} and clips and not starts_at_learner(objective, *dtypes):
        key = "learner.objective.mismatch.pi_old"
        return f"{config.rollout.backend}; note: with {key}: engine the clip also acts on the rounding of 16 bits"
    return config.rollout.backend


def _configured(config: CampaignConfig) -> dict[str, tuple[int, float | None]]:
    """Role -> (actors, GPUs of one) as configured; None: as the cluster has them."""
    teachers = {f"teacher.{name}": teacher for name, teacher in config.teachers.items()}
    roles_of: dict[str, RolloutConfig | TeacherConfig | LearnerConfig] = {
        "rollout": config.rollout,
        **teachers,
        "learner": config.learner,
    }
    return {
        role: (
            one.replicas
            if (config.needs_rollout if role == "rollout" else role == "learner" or config.started_teachers)
            else 0,
            one.gpus_per_replica,
        )
        for role, one in roles_of.items()
    }


def _objective(config: CampaignConfig) -> str:
    from learner.costs import check_own_functions  # imports torch, which only these need here

    check_own_functions(config.learner.objective)
    return f"{', '.join(own_functions(config.learner.objective))}, tried on a small example"


def _student(config: CampaignConfig) -> str:
    student = config.student
    if student.lora is not None and find_spec("peft") is None:
        raise UserError("student.lora", "no library peft", "pip install peft accelerate")
    check_fit(student.source, student.trust_remote_code, "student.model", quantised="refused")
    if config.learner.sequence_parallel > 1:
        from actors.forward.slices import check_slices  # imports torch.distributed, which only this needs here

        found = load_config(student.source, student.trust_remote_code, "student.model")
        check_slices(found, config.learner.sequence_parallel)
    if student.optimizer == "keep":
        _demand_moments(student)
    tokenizer = load_tokenizer(student.source, student.trust_remote_code, "student.model")
    student_stop_tokens(config)
    return f"{len(tokenizer)} tokens, prompts of at most {max_prompt_tokens(config)}"


def _demand_moments(student: StudentConfig) -> None:
    """UserError: `student.model` holds no moments of AdamW for all of its weights."""
    file = find_model(student.source, "student.model", code=student.trust_remote_code) / MOMENTS_FILE
    found = f"keep, and no {MOMENTS_FILE} in {student.model}"
    names: list[str] = []
    if file.exists():
        from safetensors import SafetensorError

        try:
            with opened(file, "numpy") as moments:
                names = list(moments.keys())
        except (OSError, SafetensorError) as error:
            found = f"keep, and {file} cannot be read ({error})"
        else:
            found = f"keep, and the moments of {'adapters' if names else 'nothing'} in {student.model}"
    if not names or any(".lora_" in name for name in names):
        raise UserError("student.optimizer", found, "new, or a checkpoint of a campaign that trained all weights")


def _teacher(config: CampaignConfig, name: str) -> str:
    student, teacher, key = config.student, config.teachers[name], f"teachers.{name}.model"
    ours = load_tokenizer(student.source, student.trust_remote_code, "student.model")
    reading = ""
    if (source := teacher.tokenizer_source) is not None:
        theirs = load_tokenizer(source, teacher.trust_remote_code, f"teachers.{name}.tokenizer")
        prompts = config.prompts
        make_reader(ours, theirs, f"teachers.{name}.tokenizer", prompts.chat, prompts.chat_template_arguments)
        reading = f"a tokenizer of its own with {len(theirs)} tokens"
    # A teacher on other servers has no files here; its own self-test runs when the campaign starts.
    if not backend_of(teacher).has_model_files:
        return f"{', '.join(teacher.urls) or teacher.backend}, asked when the campaign starts" + (
            reading and f"; {reading}"
        )
    reader: Literal["transformers", "elsewhere"] = "transformers" if teacher.backend == "transformers" else "elsewhere"
    check_fit(teacher.source, teacher.trust_remote_code, key, quantised=reader)
    if needs_plan(teacher):
        tensor_parallel_plan(teacher.source, teacher.trust_remote_code, key)
    # With its own tokenizer the vocabularies need not agree: it sends the log-probs of the student's tokens only.
    if reading:
        return reading
    tokenizers = (ours, load_tokenizer(teacher.source, teacher.trust_remote_code, key))
    configs = (
        load_config(student.source, student.trust_remote_code, "student.model"),
        load_config(teacher.source, teacher.trust_remote_code, key),
    )
    rows = configs[1].get_text_config().vocab_size
    refuse_full(teacher, f"teachers.{name}", rows, config.longest_scored)
    remarks = check_tokenizers_agree(*tokenizers, *configs, key)
    if (ends := turn_ends(config, name)) is not None:
        own, its = (
            tokenizers[0].convert_ids_to_tokens(ends.student),
            tokenizers[1].convert_ids_to_tokens(ends.teacher),
        )
        remarks.append(
            f"it ends its turns with {its!r}, the student with {own!r}: where one ends, the other's end is scored"
        )
    # Output layers are often padded beyond the tokenizer; a support can hold only tokens that both models have.
    vocabulary = min(c.get_text_config().vocab_size for c in configs)
    if "topk" in teacher.signal and teacher.top_k > vocabulary:
        raise UserError(f"teachers.{name}.top_k", teacher.top_k, f"at most {vocabulary}, the vocabulary of the models")
    remarks += [
        remark for remark in [template_difference(*tokenizers, config.prompts.chat_template_arguments)] if remark
    ]
    return "the student's tokenizer" + "".join(f"; note: {remark}" for remark in remarks)


def _prompts(inputs: Inputs) -> str:
    held_out = f", {len(inputs.held_out)} held out" if inputs.held_out else ""
    held_out += "".join(f", {len(one.prompts)} in the set {name}" for name, one in inputs.sets.items())
    reference = inputs.prompts.references[0]
    answer = "" if reference is None else f" -> {reference[:40]!r}"
    remarks = "".join(f"; {remark}" for remark in inputs.remarks)
    return f"{len(inputs.prompts)} prompts{held_out}; first: {inputs.prompts.texts[0][:80]!r}{answer}{remarks}"


def _replay(config: CampaignConfig) -> str:
    assert config.replay is not None
    inputs = read_inputs(config)
    inputs.close()
    sets = {name: one.prompts for name, one in inputs.sets.items()}
    told: list[str] = []
    own = fingerprints(config, inputs.prompts, inputs.held_out, sets)
    record = replayed(config, own, inputs.tokenizer, lambda _, **fields: told.append(fields["cause"]))
    assert record is not None
    epochs = f"{config.pipeline.updates / record.updates:.3g} times"
    return f"{record.updates} updates of {record.origin.trajectories_per_update} trajectories, {epochs}{told[0]}"


def _verifier(config: CampaignConfig) -> str:
    judge = Judge(config.evaluation.verifier, by_domain=config.evaluation.verifiers)
    try:
        judge.start()
    finally:
        judge.end()
    others = [f"{domain}: {one.name}" for domain, one in config.evaluation.verifiers.items()]
    return "; ".join([config.evaluation.verifier.name, *others])


def _cluster(config: CampaignConfig) -> str:
    refuse_relative_output(config)
    with connected(config) as private:
        needed, _, short = room_to_begin(config, private)
        if short:
            raise short
        gpus, card_bytes = check_gpus(needed)
        nbytes = version_bytes(config, *student_numbers(config))
        versions = "weight versions " + versions_sentence(nbytes, transfer_rate() if nbytes > LARGE_VERSION else None)
    for role in roles(config) if card_bytes else ():
        own = needed[role.name.replace("teachers.", "teacher.")][1].gpus
        if own:
            role.demand_room(Card("the smallest GPU", card_bytes).share(own))
    refuse_overdrawn(config, {role: one.gpus for role, (_, one) in needed.items()}, card_bytes)
    actors = [f"{role} {n} x ({r.cpus:g} CPUs, {r.gpus:g} GPUs)" for role, (n, r) in needed.items()]
    shared = division({role: (n, r.gpus) for role, (n, r) in needed.items()}, card_bytes) if card_bytes else ""
    return "; ".join(part for part in (", ".join(actors), gpus, shared, versions) if part)
