"""Reads one set of prompts: as the student reads them, as each of its teachers does, and which are too long for one of them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from actors.config import PromptsConfig
from actors.data.contexts import context_length, engine_context
from actors.data.judge import Judge
from actors.data.models import load_config
from actors.data.tokenizer import load_tokenizer
from actors.errors import UserError
from actors.import_path import is_import_path
from actors.prompts.filters import Dropped, dropped, repeated, whole_texts
from actors.prompts.prompt_set import PromptSet, check_lengths, load_prompts
from actors.prompts.responses import Ends
from actors.teacher.backends import backend_of
from actors.teacher.base import UNBOUNDED, context_of
from cluster.config import CampaignConfig
from cluster.loop.teachers import PromptRoutes, routes


class Limit(NamedTuple):
    """The longest text that one of the models reads."""

    tokens: int
    whose: str
    """Where it comes from, for messages."""


def student_limit(config: CampaignConfig) -> Limit:
    """What the student, and the engine that samples from it, can read. UserError: no room for a response."""
    student, engine = config.student, config.rollout.engine
    network = load_config(student.source, student.trust_remote_code, "student.model")
    if config.rollout.backend == "vllm" or "max_model_len" in engine:
        return _with_room(config, Limit(engine_context(network, engine, "rollout.engine"), "the student's context"))
    return _with_room(config, Limit(context_length(network), "the student's context"))


def teacher_limits(config: CampaignConfig) -> dict[str, Limit]:
    """Teacher -> what it can read, for those whose files are known here. UserError: no room for a response."""
    found = {
        name: Limit(context_of(teacher, f"teachers.{name}"), f"the context of teachers.{name}")
        for name, teacher in config.started_teachers.items()
        if backend_of(teacher).has_model_files
    }
    return {name: _with_room(config, limit) for name, limit in found.items()}


def max_prompt_tokens(config: CampaignConfig) -> int:
    """Tokens that a prompt may have if all teachers read it as the student does: the smallest context minus the longest
    response. UserError: see `student_limit`."""
    views = {name for name, t in config.teachers.items() if t.tokenizer is not None or t.prompt_template is not None}
    teachers = [limit for name, limit in teacher_limits(config).items() if name not in views]
    return min(limit.tokens for limit in (student_limit(config), *teachers)) - config.sampling.max_response_tokens


def _with_room(config: CampaignConfig, limit: Limit) -> Limit:
    response = config.sampling.max_response_tokens
    if response >= limit.tokens:
        raise UserError("sampling.max_response_tokens", response, f"less than {limit.whose}, {limit.tokens} tokens")
    return limit


def read_prompts(
    config: CampaignConfig,
    source: PromptsConfig,
    tokenizer: Any,
    key: str,
    judge: Judge | None,
    *,
    bounded: bool = True,
    ends: Ends | None = None,
) -> tuple[PromptSet, PromptRoutes, dict[str, Dropped]]:
    """The prompts as the student reads them, the routes (the teachers of each prompt, and their view of it), and what was
    left out of each source.

    bounded: teachers read the responses too, so that these must fit into their contexts. ends: the prompts come with
    responses, which end so.
    """
    prompts, room = _as_the_student_reads(config, source, tokenizer, key, judge, ends)
    response, reading = config.sampling.max_response_tokens, config.teachers if ends is None else {}
    own = {
        name: load_tokenizer(its, teacher.trust_remote_code, f"teachers.{name}.tokenizer")
        for name, teacher in reading.items()
        if (its := teacher.tokenizer_source) is not None
    }
    read_otherwise = {
        name: load_prompts(source, own.get(name, tokenizer), None, key, teacher.prompt_template)
        for name, teacher in reading.items()
        if teacher.prompt_template is not None or name in own
    }
    reference = config.learner.objective.reference_teacher
    teaching = {name: teacher for name, teacher in reading.items() if name != reference}
    # Without teachers, as where only accuracy is evaluated, nothing is scored; nor are responses of a data set.
    routed = routes(prompts.domains, teaching, prompts.where) if teaching else prompts.domains.each(lambda _: {})
    # Which of the prompts a teacher reads, and how: with other words, or in other tokens.
    readers = {name: np.flatnonzero(routed.where(partial(_is_asked, name, reference))) for name in config.teachers}
    too_long = np.diff(prompts.offsets) > np.minimum(room, source.max_prompt_tokens or UNBOUNDED)
    if bounded:
        too_long |= _unreadable(config, source, prompts, read_otherwise, readers)
    repeats = repeated(whole_texts(prompts), ~too_long) if source.duplicates == "drop" else np.zeros(len(prompts), bool)
    left_out = dropped(prompts, too_long, repeats)
    if left_out:
        rows = np.flatnonzero(~(too_long | repeats))
        prompts, routed = prompts.take(rows), routed.take(rows)
        read_otherwise = {name: its.take(rows) for name, its in read_otherwise.items()}
        readers = {name: np.flatnonzero(np.isin(rows, its)) for name, its in readers.items()}
    longest = {
        name: int(read_otherwise.get(name, prompts).lengths_of(rows).max(initial=0)) + response if bounded else 0
        for name, rows in readers.items()
        if backend_of(config.teachers[name]).tries_length
    }
    return prompts, PromptRoutes(routed, read_otherwise, longest=longest), left_out


def _is_asked(name: str, reference: str | None, teachers: Mapping[str, float]) -> bool:
    """Whether a teacher scores a prompt with these teachers."""
    return name == reference or name in teachers


def _as_the_student_reads(
    config: CampaignConfig, source: PromptsConfig, tokenizer: Any, key: str, judge: Judge | None, ends: Ends | None
) -> tuple[PromptSet, Any]:
    """(the prompts, tokens that each may have, or all may). UserError: one is too long, and none is dropped."""
    if source.chat and not tokenizer.chat_template:
        raise UserError(f"{key}.chat", "true, and a student without a chat template", _templates(config))
    if source.chat:
        _refuse_unnamed(source, tokenizer, key)
    context = student_limit(config).tokens
    if ends is None:
        room = context - config.sampling.max_response_tokens
        return _prompts(config, source, tokenizer, key, room, judge), room
    prompts = load_prompts(source, tokenizer, None, key, ends=ends)
    return prompts, context - _demand_fit(config, source, prompts, key)


def _refuse_unnamed(source: PromptsConfig, tokenizer: Any, key: str) -> None:
    """UserError: the student has several named templates, none of them the one that is taken unasked."""
    names = tokenizer.chat_template
    if not isinstance(names, dict) or names.keys() & {"default", "tool_use"}:
        return
    if "chat_template" not in source.chat_template_arguments:
        expected = f"chat_template: {' or '.join(map(str, names))}, since the student has no default template"
        raise UserError(f"{key}.chat_template_arguments", "no chat_template", expected)


def _templates(config: CampaignConfig) -> str:
    """What to do about a student without a chat template, as base models are."""
    having = [
        f"teachers.{name}"
        for name, teacher in config.teachers.items()
        if backend_of(teacher).has_model_files
        and load_tokenizer(teacher.source, teacher.trust_remote_code, f"teachers.{name}.model").chat_template
    ]
    example = f", for example that of {having[0]}" if having else ""
    return (
        f"false, for plain text, or a template in {config.student.model}/chat_template.jinja{example} (the student "
        "learns to answer in it, and checkpoints keep it)"
    )


def _prompts(
    config: CampaignConfig, source: PromptsConfig, tokenizer: Any, key: str, room: int, judge: Judge | None
) -> PromptSet:
    """The prompts as the student reads them, with the records where a verifier or an environment asks for them. room: tokens."""
    if config.environment is not None:
        return replace(load_prompts(source, tokenizer, room, key, records=True), played=True)
    judges = key != "prompts" or config.gives_rewards
    verifiers = {own: judge.of(own) for own in (None, *config.evaluation.verifiers)} if judge and judges else {}
    asked = {domain: its.asks for domain, its in verifiers.items()}
    prompts = load_prompts(source, tokenizer, room, key, records=any("record" in names for names in asked.values()))
    # A function of the user's own may do without references: where it reads something else, or where a set has none.
    set_without = key.startswith("evaluation.sets.") and not source.has_references
    free = {own for own, its in verifiers.items() if asked[own] or (set_without and is_import_path(its.name))}
    without = {domain for domain in prompts.domains.values if (domain if domain in verifiers else None) in free}
    return replace(prompts, judged_without_reference=frozenset(without))


def _demand_fit(config: CampaignConfig, source: PromptsConfig, prompts: PromptSet, key: str) -> np.ndarray:
    """[M] tokens of the responses, cut where they are. UserError: one with its prompt is too long, and none is dropped."""
    assert prompts.responses is not None
    responses, limit = prompts.responses.lengths(config.sampling.max_response_tokens), student_limit(config)
    lengths = np.diff(prompts.offsets)
    if source.too_long == "refuse":
        check_lengths(prompts, source.max_prompt_tokens, f"{key}.max_prompt_tokens")
        if len(wrong := np.flatnonzero(lengths + responses > limit.tokens)):
            found = f"a prompt of {lengths[wrong[0]]} tokens with a response of {responses[wrong[0]]}"
            many = f"({len(wrong)} of {len(lengths)} are too long)"
            way_out = f"{key}.too_long: drop leaves them out, a smaller sampling.max_response_tokens cuts the responses"
            raise UserError(
                prompts.where(wrong[0]),
                f"{found} {many}",
                f"at most {limit.tokens} together, {limit.whose} ({way_out})",
            )
    return responses


def _unreadable(
    config: CampaignConfig,
    source: PromptsConfig,
    prompts: PromptSet,
    read_otherwise: Mapping[str, PromptSet],
    readers: Mapping[str, np.ndarray],
) -> np.ndarray:
    """[M] bool: prompts that with a response are too long for one of their teachers. UserError: one is, and none is dropped."""
    found, response = np.zeros(len(prompts), bool), config.sampling.max_response_tokens
    for name, limit in teacher_limits(config).items():
        rows = readers[name]
        lengths = read_otherwise.get(name, prompts).lengths_of(rows)
        wrong = np.flatnonzero(lengths + response > limit.tokens)
        if len(wrong) and source.too_long == "refuse":
            told = f"{lengths[wrong[0]]} tokens as teachers.{name} reads it ({len(wrong)} of {len(rows)} are too long)"
            room = f"at most {limit.tokens - response}: {limit.whose}, {limit.tokens} tokens, less the longest response"
            raise UserError(prompts.where(rows[wrong[0]]), told, f"{room} (sampling.max_response_tokens)")
        found[rows[wrong]] = True
    return found
