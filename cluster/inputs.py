"""Reads what the campaign process needs before the start: prompts, held-out prompts, tokenizer, verifier."""

from dataclasses import dataclass
from typing import Any

from actors.config import PromptsConfig
from actors.data.models import context_length, find_model, load_config
from actors.data.prompts import PromptSet, load_prompts
from actors.data.tokenizer import load_tokenizer, stop_token_ids, template_token_ids
from actors.data.verifiers import Verifier, make_verifier, try_verifier
from actors.errors import UserError
from actors.teacher.backends import backend_of
from cluster.config import CampaignConfig
from cluster.loop.teachers import PromptRoutes, routes


@dataclass
class Inputs:
    """What was read. Prompts are rendered with the student's chat template and tokenised; all is checked."""

    prompts: PromptSet
    prompt_routes: PromptRoutes
    held_out: PromptSet | None
    held_out_routes: PromptRoutes | None
    tokenizer: Any
    verifier: Verifier
    stop_token_ids: list[int]
    masked_role_token_ids: list[int]
    """The tokens of `learner.objective.masked_token_roles`."""
    vocabulary: int
    """Rows of the student's output layer."""


def max_prompt_tokens(config: CampaignConfig) -> int:
    """Tokens that a prompt may have: the student's context minus the longest response. UserError: none are left."""
    context = context_length(load_config(config.student.model, config.student.trust_remote_code, "student.model"))
    return _room(config, min(context, int(config.rollout.engine.get("max_model_len") or context)))


def read_inputs(config: CampaignConfig) -> Inputs:
    """Reads everything. UserError: a file, a field or a token that is missing or wrong, or a verifier that fails."""
    student = config.student
    tokenizer = load_tokenizer(student.model, student.trust_remote_code, "student.model")
    directory = find_model(student.model, "student.model", weights=False, code=student.trust_remote_code)
    stop = sorted({*stop_token_ids(directory, tokenizer), *config.sampling.stop_token_ids})
    if not stop:
        raise UserError(
            "sampling.stop_token_ids", "none", "at least one, since the student has no end-of-sequence token"
        )
    model_config = load_config(student.model, student.trust_remote_code, "student.model")
    vocabulary = model_config.get_text_config().vocab_size
    for key, ids in (
        ("sampling.stop_token_ids", config.sampling.stop_token_ids),
        ("learner.objective.masked_token_ids", config.learner.objective.masked_token_ids),
    ):
        if unknown := [token for token in ids if not 0 <= token < vocabulary]:
            raise UserError(key, unknown[0], f"ids of the student's tokens, 0 to {vocabulary - 1}")
    prompts, prompt_routes = _read(config, config.prompts, tokenizer, "prompts")
    prompt_routes = prompt_routes._replace(stop_token_ids=stop)
    if (reference := config.learner.objective.reference_teacher) is not None:
        prompt_routes = prompt_routes._replace(routes=[{**route, reference: 0.0} for route in prompt_routes.routes])
    if config.gives_rewards:
        _demand_references(config.prompts, prompts, "prompts")
    held_out, held_out_routes = None, None
    if config.evaluation.prompts is not None:
        held_out, held_out_routes = _read(config, config.evaluation.prompts, tokenizer, "evaluation.prompts")
        _demand_references(config.evaluation.prompts, held_out, "evaluation.prompts")
    if judged := held_out or (prompts if config.gives_rewards else None):
        try_verifier(config.evaluation.verifier, judged.references[0], "evaluation.verifier")
    return Inputs(
        prompts,
        prompt_routes,
        held_out,
        held_out_routes,
        tokenizer,
        make_verifier(config.evaluation.verifier, "evaluation.verifier"),
        stop,
        _masked_role_token_ids(config, tokenizer, stop),
        vocabulary,
    )


def _read(config: CampaignConfig, source: PromptsConfig, tokenizer: Any, key: str) -> tuple[PromptSet, PromptRoutes]:
    """The prompts as the student reads them, and the routes: the teachers of each prompt, and their view of it."""
    prompts = load_prompts(source, tokenizer, max_prompt_tokens(config), key)
    own = {
        name: load_tokenizer(teacher.tokenizer, teacher.trust_remote_code, f"teachers.{name}.tokenizer")
        for name, teacher in config.teachers.items()
        if teacher.tokenizer is not None
    }
    read_otherwise = {
        name: load_prompts(source, own.get(name, tokenizer), _teacher_room(config, name), key, teacher.prompt_template)
        for name, teacher in config.teachers.items()
        if teacher.prompt_template is not None or name in own
    }
    reference = config.learner.objective.reference_teacher
    teaching = {name: teacher for name, teacher in config.teachers.items() if name != reference}
    return prompts, PromptRoutes(routes(prompts.domains, teaching, source.path), read_otherwise)


def _demand_references(source: PromptsConfig, prompts: PromptSet, key: str) -> None:
    if None in prompts.references:
        raise UserError(
            f"{source.path}, prompt {prompts.references.index(None) + 1}",
            f"no {source.reference_field}",
            f"a reference answer for every prompt that is judged ({key}.reference_field)",
        )


def _masked_role_token_ids(config: CampaignConfig, tokenizer: Any, stop: list[int]) -> list[int]:
    roles = config.learner.objective.masked_token_roles
    template = [token for token in template_token_ids(tokenizer) if token not in stop]
    if "template" in roles and not template:
        raise UserError(
            "learner.objective.masked_token_roles", "template", "a chat template that writes special tokens of its own"
        )
    return sorted([*(stop if "end_of_sequence" in roles else []), *(template if "template" in roles else [])])


def _teacher_room(config: CampaignConfig, name: str) -> int:
    teacher = config.teachers[name]
    if not backend_of(teacher).has_model_files:  # its context length is not known here; the student's is a good guess
        return max_prompt_tokens(config)
    return _room(
        config, context_length(load_config(teacher.model, teacher.trust_remote_code, f"teachers.{name}.model"))
    )


def _room(config: CampaignConfig, context: int) -> int:
    room = context - config.sampling.max_response_tokens
    if room < 1:
        raise UserError(
            "sampling.max_response_tokens",
            config.sampling.max_response_tokens,
            f"less than the context of {context} tokens",
        )
    return room
