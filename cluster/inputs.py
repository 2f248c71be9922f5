"""Reads what the campaign process needs before the start: prompts, held-out prompts, tokenizer, verifier."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from operator import eq
from typing import Any, NamedTuple

import numpy as np

from actors.config import PromptsConfig
from actors.data.contexts import context_length, engine_context
from actors.data.judge import Judge
from actors.data.models import find_model, load_config
from actors.data.tokenizer import load_tokenizer, stop_token_ids, template_token_ids, turn_end
from actors.errors import UserError
from actors.import_path import is_import_path
from actors.prompts.columns import Coded, Picked
from actors.prompts.filters import Dropped, dropped, overlap, repeated, whole_texts
from actors.prompts.prompt_set import PromptSet, check_lengths, load_prompts
from actors.prompts.responses import Ends, odd_tokens
from actors.teacher.backends import backend_of
from actors.teacher.base import UNBOUNDED, context_of
from actors.teacher.turn_ends import TurnEnds
from cluster.config import CampaignConfig, prompt_sources
from cluster.loop.teachers import PromptRoutes, routes
from cluster.state.recorded import Record
from cluster.validation import MOST_TRAJECTORIES

TRIAL_SECONDS = 30.0
"""The longest that references are tried; it takes microseconds for each with the built-in verifiers, but for `math`."""


class HeldOut(NamedTuple):
    """An evaluation set as it was read."""

    prompts: PromptSet
    routes: PromptRoutes
    judge: Judge | None
    """None: nothing is judged."""
    left_out: Mapping[str, Dropped]
    """Configuration key of a source -> what is left out of it."""


@dataclass
class Inputs:
    """What was read. Prompts are rendered with the student's chat template and tokenised; all is checked."""

    prompts: PromptSet
    prompt_routes: PromptRoutes
    held_out: PromptSet | None
    held_out_routes: PromptRoutes | None
    tokenizer: Any
    judge: Judge
    stop_token_ids: list[int]
    masked_role_token_ids: list[int]
    """The tokens of `learner.objective.masked_token_roles`."""
    vocabulary: int
    """The student's token ids are below this: its output layer may have more rows, as padding, which are never sampled and
    are no part of any distribution."""
    turn_ends: dict[str, TurnEnds] = field(default_factory=dict)
    """Teacher -> what ends a turn, for those that end it with another token than the student."""
    remarks: list[str] = field(default_factory=list)
    """What `check` says besides: shares of sources, prompts that are left out, prompts without a reference answer."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """Configuration key of a source -> what is left out of it."""
    shared: str = ""
    """What is to be said of held-out prompts that are trained on."""
    sets: dict[str, HeldOut] = field(default_factory=dict)
    """The sets of `evaluation.sets`, by name."""
    record: Record | None = None
    """What `replay` names."""

    def counts(self) -> dict[str, dict[str, int]]:
        """What summary.json says of the prompts."""
        sets = {"prompts": self.prompts, "evaluation.prompts": self.held_out}
        return {
            name: {
                "prompts": len(prompts),
                "too_long": sum(one.too_long for key, one in self.dropped.items() if key.startswith(name)),
                "duplicates": sum(one.duplicates for key, one in self.dropped.items() if key.startswith(name)),
            }
            for name, prompts in sets.items()
            if prompts is not None
        }

    def tell(self, on_event: Callable[..., Any]) -> None:
        """Tells what is left out, held-out prompts that are trained on, and what is kept on the disk, as events."""
        for key, one in self.dropped.items():
            on_event("prompts_dropped", key=key, cause=str(one), **one._asdict())
        if self.shared:
            on_event("held_out_overlap", cause=self.shared)
        for key, prompts in self.read().items():
            if prompts.cached:
                on_event("prompts_cached", key=key, cause=prompts.cached)
            if prompts.uncached:
                on_event("prompts_uncached", key=key, cause=prompts.uncached)

    def read(self) -> dict[str, PromptSet]:
        """Configuration key -> the prompts that were read for it; of a teacher, those that it reads in its own way."""
        sets = {"prompts": self.prompts, "evaluation.prompts": self.held_out}
        sets |= {f"evaluation.sets.{name}.prompts": one.prompts for name, one in self.sets.items()}
        sets |= {f"teachers.{name}": prompts for name, prompts in self.prompt_routes.privileged.items()}
        return {key: prompts for key, prompts in sets.items() if prompts is not None}

    def close(self) -> None:
        """Ends the processes of all verifiers for good."""
        for judge in (self.judge, *(one.judge for one in self.sets.values())):
            if judge is not None:
                judge.close()


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


def read_inputs(config: CampaignConfig) -> Inputs:
    """Reads everything. UserError: a file, a field or a token that is missing or wrong, or a verifier that fails."""
    judge = Judge(config.evaluation.verifier, by_domain=config.evaluation.verifiers)
    try:
        inputs = _read_inputs(config, judge)
        inputs.remarks += [f"{key}: note: {own.uncached}" for key, own in inputs.read().items() if own.uncached]
        return inputs
    finally:
        judge.end()  # an evaluation starts it again, and those beside it


def _read_inputs(config: CampaignConfig, judge: Judge) -> Inputs:
    student, reading = config.student, config.teachers
    if (
        config.replay is not None and not config.started_teachers
    ):  # nobody scores; the learner may still have the head of one that sent hidden states
        reading = {name: teacher for name, teacher in config.teachers.items() if teacher.signal == "hidden"}
        config = replace(config, teachers={})
    tokenizer = load_tokenizer(student.source, student.trust_remote_code, "student.model")
    stop = student_stop_tokens(config)
    model_config = load_config(student.source, student.trust_remote_code, "student.model")
    rows = model_config.get_text_config().vocab_size
    _refuse_unknown(config.learner.objective.masked_token_ids, rows, "learner.objective.masked_token_ids")
    ends = {name: ends for name in reading if (ends := turn_ends(replace(config, teachers=reading), name)) is not None}
    if ends and config.environment is not None:
        found = f"{', '.join(ends)}, which ends its turns with another token than the student"
        raise UserError("teachers", found, "teachers with the student's end of a turn, where an environment answers")
    trained: dict[str, Any] = {}
    if config.text_by == "data":  # nothing of it is scored
        trained = {"bounded": False, "ends": _ends(config, tokenizer, stop)}
    prompts, prompt_routes, left_out = _read(config, config.prompts, tokenizer, "prompts", judge, **trained)
    prompt_routes = prompt_routes._replace(stop_token_ids=stop)
    if (reference := config.learner.objective.reference_teacher) is not None:
        assert isinstance(prompt_routes.routes, Coded)
        scored = prompt_routes.routes.each(lambda route: {**route, reference: 0.0})
        prompt_routes = prompt_routes._replace(routes=scored)
    if config.judges_training:
        _demand_references(config.prompts, prompts, "prompts")
    held_out, held_out_routes = None, None
    if config.evaluation.prompts is not None:
        with _limit_of("evaluation", config.evaluation.max_response_tokens):
            held_out, held_out_routes, more = _read(
                config.evaluated, config.evaluation.prompts, tokenizer, "evaluation.prompts", judge
            )
        left_out |= more
    sets = {name: read_set(config, tokenizer, name, stop, judge) for name in config.evaluation.sets}
    for routes_of in [held_out_routes, *(one.routes for one in sets.values())]:
        if routes_of is not None:
            longest = {name: max(most, routes_of.longest[name]) for name, most in prompt_routes.longest.items()}
            prompt_routes = prompt_routes._replace(longest=longest)
    left_out |= {key: own for one in sets.values() for key, own in one.left_out.items()}
    shared = overlap(held_out, prompts) if held_out is not None else ""
    remarks = [*mixture(config, prompts), *_cut(config, prompts), *_odd(prompts, tokenizer, stop), *_horizon(config)]
    remarks += [f"{key}: {one}" for key, one in left_out.items()] + ([f"note: {shared}"] if shared else [])
    remarks += [f"{name}: note: {found}" for name, one in sets.items() if (found := overlap(one.prompts, prompts))]
    if config.judges_training:
        remarks += try_references(config, judge, prompts)
    if held_out is not None and config.environment is None:
        remarks += try_references(config, judge, held_out)
    for name, one in sets.items():
        if one.judge is not None:
            remarks += [f"{name}: {remark}" for remark in try_references(config, one.judge, one.prompts)]
    return Inputs(
        prompts,
        prompt_routes,
        held_out,
        held_out_routes,
        tokenizer,
        judge,
        stop,
        _masked_role_token_ids(config, tokenizer, stop),
        min(rows, max(tokenizer.get_vocab().values()) + 1),
        ends,
        remarks,
        left_out,
        shared,
        sets,
    )


def mixture(config: CampaignConfig, prompts: PromptSet) -> list[str]:
    """For each of several sources: its prompts, its share, and how often the campaign goes through them."""
    sources, counts = config.prompts.sources, prompts.counts
    if len(counts) < 2:
        return []
    # Exact, as the order is (prompt_order.py): the sum of two large weights is no float.
    weights = [Fraction(str(source.weight or counts[f"prompts.sources.{name}"])) for name, source in sources.items()]
    issued = config.pipeline.updates * config.pipeline.prompts_per_update
    shares = {key: float(weight / sum(weights)) for key, weight in zip(counts, weights, strict=True)}
    return [
        f"{key}: {counts[key]:,} prompts, {share:.1%} of all that are drawn, {issued * share / counts[key]:.2g} times each"
        for key, share in shares.items()
    ]


def _odd(prompts: PromptSet, tokenizer: Any, stop: list[int]) -> list[str]:
    """Responses that hold tokens which no text should become."""
    if prompts.responses is None:
        return []
    return [
        f"note: {len(rows):,} of {len(prompts):,} responses hold {token} within a text, first {prompts.where(rows[0])}"
        for token, rows in odd_tokens(prompts.responses, tokenizer, stop).items()
    ]


def _horizon(config: CampaignConfig) -> list[str]:
    """A schedule of the length limit that says nothing of the first updates."""
    sampling = config.sampling
    begins = min((pair[0] for pair in sampling.response_tokens_schedule), default=1)
    if begins == 1:
        return []
    until = f"before update {begins}, with which sampling.response_tokens_schedule begins"
    return [f"note: {until}, responses have up to {sampling.max_response_tokens:,} tokens (max_response_tokens)"]


def read_set_inputs(config: CampaignConfig) -> Inputs:
    """Reads what `understudy evaluate` needs: the evaluation sets alone, without the prompts of training. UserError: as
    `read_inputs`."""
    student = config.student
    tokenizer = load_tokenizer(student.source, student.trust_remote_code, "student.model")
    stop = student_stop_tokens(config)
    rows = load_config(student.source, student.trust_remote_code, "student.model").get_text_config().vocab_size
    judge = Judge(config.evaluation.verifier, by_domain=config.evaluation.verifiers)
    try:
        sets = {name: read_set(config, tokenizer, name, stop, judge) for name in config.evaluation.sets}
    finally:
        judge.end()
    first = next(iter(sets.values()))
    ends = {name: ends for name in config.teachers if (ends := turn_ends(config, name)) is not None}
    vocabulary = min(rows, max(tokenizer.get_vocab().values()) + 1)
    return Inputs(first.prompts, first.routes, None, None, tokenizer, judge, stop, [], vocabulary, ends, sets=sets)


def read_set(config: CampaignConfig, tokenizer: Any, name: str, stop: list[int], of_all: Judge) -> HeldOut:
    """The prompts of `evaluation.sets.<name>`, with room for its own longest response. of_all: has the verifiers of domains."""
    one, key = config.evaluation.sets[name], f"evaluation.sets.{name}"
    longer = replace(config, sampling=config.sampling_of(one))
    judge = None if one.verifier is None else of_all.beside(one.verifier, f"{key}.verifier")
    asks_teachers = config.is_scored(one) or (one.verifier is not None and config.evaluation.teacher)
    with _limit_of(key, one.max_response_tokens):
        prompts, routed, left_out = _read(
            longer, one.prompts, tokenizer, f"{key}.prompts", judge, bounded=asks_teachers
        )
    if one.verifier is not None and not len(prompts.judged()):
        raise UserError(f"{key}.verifier", one.verifier.name, "a reference answer in a prompt, or null")
    if len(prompts) * one.samples > MOST_TRAJECTORIES:
        found = f"{one.samples:,} with {len(prompts):,} prompts"
        raise UserError(f"{key}.samples", found, f"at most {MOST_TRAJECTORIES:,} trajectories of a set")
    return HeldOut(prompts, routed._replace(stop_token_ids=stop), judge, left_out)


@contextmanager
def _limit_of(key: str, own: int | None) -> Iterator[None]:
    """Names the section's own length limit, where it has one, in the error of one that is too large."""
    try:
        yield
    except UserError as error:
        if error.where != "sampling.max_response_tokens" or own is None:
            raise
        raise UserError(f"{key}.max_response_tokens", error.found, error.expected) from error


def student_stop_tokens(config: CampaignConfig) -> list[int]:
    """The tokens at which a response ends: the student's, and the configured ones. UserError: none, or one without a row."""
    student, key, configured = config.student, "student.model", config.sampling.stop_token_ids
    rows = load_config(student.source, student.trust_remote_code, key).get_text_config().vocab_size
    directory = find_model(student.source, key, weights=False, code=student.trust_remote_code)
    its = stop_token_ids(directory, load_tokenizer(student.source, student.trust_remote_code, key), rows, key)
    _refuse_unknown(configured, rows, "sampling.stop_token_ids")
    if not its and not configured:
        raise UserError(
            "sampling.stop_token_ids", "none", "at least one, since the student has no end-of-sequence token"
        )
    return sorted({*its, *configured})


def _refuse_unknown(ids: list[int], rows: int, key: str) -> None:
    if unknown := [token for token in ids if not 0 <= token < rows]:
        raise UserError(key, unknown[0], f"ids of the student's tokens, 0 to {rows - 1}")


def turn_ends(config: CampaignConfig, name: str) -> TurnEnds | None:
    """What ends a turn of the student and of a teacher with its vocabulary. None: the same, or it is not known.

    UserError: the teacher has no row for the student's end token, and sends its whole vocabulary.
    """
    student, teacher, key = config.student, config.teachers[name], f"teachers.{name}.model"
    if not backend_of(teacher).has_model_files or teacher.tokenizer is not None:
        return None  # unknown; or its own tokenizer translates the end
    found = [
        turn_end(
            find_model(model.source, where, weights=False, code=model.trust_remote_code),
            load_tokenizer(model.source, model.trust_remote_code, where),
            config.prompts.chat,
            config.prompts.chat_template_arguments,
            rows=load_config(model.source, model.trust_remote_code, where).get_text_config().vocab_size,
            key=where,
        )
        for model, where in ((student, "student.model"), (teacher, key))
    ]
    if None in found or found[0] == found[1]:
        return None
    ends = TurnEnds(*(token for token in found if token is not None))
    rows = load_config(teacher.source, teacher.trust_remote_code, key).get_text_config().vocab_size
    if ends.student >= rows and teacher.signal in ("full", "hidden"):
        expected = (
            "sampled, topk or student_topk where the teacher has no row for the token that ends the student's turn"
        )
        raise UserError(f"teachers.{name}.signal", teacher.signal, expected)
    return ends


def _read(
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


def _ends(config: CampaignConfig, tokenizer: Any, stop: list[int]) -> Ends:
    """How the responses of a data set end: with the token that ends the student's turns."""
    student, prompts = config.student, config.prompts
    directory = find_model(student.source, "student.model", weights=False, code=student.trust_remote_code)
    rows = load_config(student.source, student.trust_remote_code, "student.model").get_text_config().vocab_size
    arguments = prompts.chat_template_arguments
    return Ends(stop, turn_end(directory, tokenizer, prompts.chat, arguments, rows=rows) or stop[0])


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


def _cut(config: CampaignConfig, prompts: PromptSet) -> list[str]:
    """What is to be said of responses of a data set that are cut."""
    most = config.sampling.max_response_tokens
    longer = 0 if prompts.responses is None else int((np.diff(prompts.responses.offsets) > most).sum())
    told = f"note: {longer:,} of {len(prompts):,} responses are cut at {most} tokens (sampling.max_response_tokens)"
    return [told] if longer else []


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


def _demand_references(source: PromptsConfig, prompts: PromptSet, key: str) -> None:
    judged = prompts.judged()
    if len(judged) < len(prompts):
        # The judged ones ascend: the first place where they are ahead of their number is the first that is left out.
        prompt = int(np.argmax(np.append(judged, len(prompts)) != np.arange(len(judged) + 1)))
        its = prompts.origin_of(prompt).key
        raise UserError(
            prompts.where(prompt),
            f"no {source.each_source(key)[its].reference_field or 'reference answer'}",
            f"a reference answer for every prompt that is judged ({its}.reference_field)",
        )


def try_references(config: CampaignConfig, judge: Judge, prompts: PromptSet) -> list[str]:
    """Tries the reference answers of the prompts, the first one at least, for TRIAL_SECONDS at most; returns remarks.

    UserError: the verifier fails, or cannot use a reference. It names the first such prompt.
    """
    judged, verifiers, remarks = prompts.judged(), config.evaluation.verifiers, []
    if not len(judged):
        return ["no reference answers, so the reverse KL is measured, and no accuracy"]
    if len(judged) < len(prompts):
        remarks.append(f"accuracy over {len(judged)} of {len(prompts)} prompts, which have a reference answer")
    for own in (None, *verifiers):
        its = prompts.domains.each(lambda domain: domain if domain in verifiers else None).where(partial(eq, own))
        numbers = judged[its[judged]]
        remarks += _try(config, judge.of(own), prompts, numbers) if len(numbers) else []
    return remarks


def _try(config: CampaignConfig, judge: Judge, prompts: PromptSet, numbers: np.ndarray) -> list[str]:
    """Tries one verifier with the prompts that have these numbers, as `try_references` says."""
    references, asides = prompts.references.picked(numbers), Picked(prompts.aside, numbers)
    tried, error = judge.try_references(references, TRIAL_SECONDS, asides)
    if error is not None:
        if is_import_path(judge.name) and tried == 0:
            raise error  # it fails from the start: most likely a fault of the function, not of a reference
        key = prompts.origin_of(numbers[tried]).key
        found = f"{prompt_sources(config)[key].reference_field} = {str(prompts.references[numbers[tried]])[:60]!r}"
        expected = f"a reference that the verifier {judge.name} can use ({error})"
        raise UserError(prompts.where(numbers[tried]), found, expected)
    untried = tried < len(numbers)
    return [f"{tried} of {len(numbers)} reference answers tried in {TRIAL_SECONDS:g} s"] if untried else []


def _masked_role_token_ids(config: CampaignConfig, tokenizer: Any, stop: list[int]) -> list[int]:
    roles = config.learner.objective.masked_token_roles
    template = []
    if "template" in roles:
        written = template_token_ids(tokenizer, "student.model", config.prompts.chat_template_arguments)
        template = [token for token in written if token not in stop]
    if "template" in roles and not template:
        raise UserError(
            "learner.objective.masked_token_roles", "template", "a chat template that writes special tokens of its own"
        )
    return sorted([*(stop if "end_of_sequence" in roles else []), *template])


def _with_room(config: CampaignConfig, limit: Limit) -> Limit:
    response = config.sampling.max_response_tokens
    if response >= limit.tokens:
        raise UserError("sampling.max_response_tokens", response, f"less than {limit.whose}, {limit.tokens} tokens")
    return limit
