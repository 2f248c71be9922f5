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
from actors.data.judge import Judge
from actors.data.models import vocabulary_rows
from actors.data.tokenizer import load_tokenizer
from actors.errors import UserError
from actors.import_path import is_import_path
from actors.prompts.columns import Coded, Picked
from actors.prompts.filters import Dropped, overlap
from actors.prompts.prompt_set import PromptSet
from actors.prompts.responses import odd_tokens
from actors.teacher.turn_ends import TurnEnds
from cluster.config import CampaignConfig, prompt_sources
from cluster.loop.teachers import PromptRoutes
from cluster.prompt_reading import read_prompts
from cluster.special_tokens import masked_role_token_ids, refuse_unknown, response_ends, student_stop_tokens, turn_ends
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
    rows = vocabulary_rows(student.source, student.trust_remote_code, "student.model")
    refuse_unknown(config.learner.objective.masked_token_ids, rows, "learner.objective.masked_token_ids")
    ends = {name: ends for name in reading if (ends := turn_ends(replace(config, teachers=reading), name)) is not None}
    if ends and config.environment is not None:
        found = f"{', '.join(ends)}, which ends its turns with another token than the student"
        raise UserError("teachers", found, "teachers with the student's end of a turn, where an environment answers")
    trained: dict[str, Any] = {}
    if config.text_by == "data":  # nothing of it is scored
        trained = {"bounded": False, "ends": response_ends(config, tokenizer, stop)}
    prompts, prompt_routes, left_out = read_prompts(config, config.prompts, tokenizer, "prompts", judge, **trained)
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
            held_out, held_out_routes, more = read_prompts(
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
        masked_role_token_ids(config, tokenizer, stop),
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
    # Exact, as the order is (actors/prompts/order.py): the sum of two large weights is no float.
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
    """Schedules of limits that say nothing of the first updates."""
    sampling, environment, notes = config.sampling, config.environment, []
    if (begins := _begins(sampling.response_tokens_schedule)) > 1:
        until = f"before update {begins}, with which sampling.response_tokens_schedule begins"
        notes.append(
            f"note: {until}, responses have up to {sampling.max_response_tokens:,} tokens (max_response_tokens)"
        )
    if environment is not None and (begins := _begins(environment.turns_schedule)) > 1:
        until = f"before update {begins}, with which environment.turns_schedule begins"
        notes.append(f"note: {until}, episodes have up to {environment.max_turns} turns (max_turns)")
    return notes


def _begins(schedule: list[list[int]]) -> int:
    return min((pair[0] for pair in schedule), default=1)


def read_set_inputs(config: CampaignConfig) -> Inputs:
    """Reads what `understudy evaluate` needs: the evaluation sets alone, without the prompts of training. UserError: as
    `read_inputs`."""
    student = config.student
    tokenizer = load_tokenizer(student.source, student.trust_remote_code, "student.model")
    stop = student_stop_tokens(config)
    rows = vocabulary_rows(student.source, student.trust_remote_code, "student.model")
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
        prompts, routed, left_out = read_prompts(
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


def _cut(config: CampaignConfig, prompts: PromptSet) -> list[str]:
    """What is to be said of responses of a data set that are cut."""
    most = config.sampling.max_response_tokens
    longer = 0 if prompts.responses is None else int((np.diff(prompts.responses.offsets) > most).sum())
    told = f"note: {longer:,} of {len(prompts):,} responses are cut at {most} tokens (sampling.max_response_tokens)"
    return [told] if longer else []


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
