"""Refuses settings of the objective that contradict each other or need data that the teachers do not send.

Each generator below checks one topic and yields a row for every rule, in the order in which errors are reported. Standard
library only.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from actors.config import TeacherConfig
from actors.errors import UserError
from actors.teacher.backends import backend_of
from learner.config import ObjectiveConfig
from learner.objective.estimator_table import DIVERGENCES, ESTIMATORS, KEY, estimator_row, own_function

Contradiction = tuple[bool, str, Any, str]
"""(whether the rule is broken, the key, its value, the expected value)."""


def refuse_contradictions(
    objective: ObjectiveConfig,
    teachers: Mapping[str, TeacherConfig],
    student_model: str,
    samples_per_prompt: int,
    *,
    text_by: str = "student",
) -> None:
    """Checks the objective against its teachers.

    text_by: who writes the responses, "student", "teacher" or "data". UserError: the first broken rule, or an estimator, divergence or cost that cannot be found.
    """
    estimator_row(objective.estimator)
    if objective.divergence not in DIVERGENCES:
        own_function(objective.divergence, f"{KEY}.divergence", DIVERGENCES)
    if objective.cost is not None:
        own_function(objective.cost, f"{KEY}.cost")
    for wrong, key, found, expected in (
        *_teachers(objective, teachers),
        *_ema_teachers(teachers, student_model),
        *_tokenizers(objective, teachers, writes=text_by == "teacher"),
        *_estimator(objective, samples_per_prompt),
        *_reward(objective, samples_per_prompt),
        *_sft(objective, teachers, text_by),
        *_cost(objective),
        *_step(objective),
    ):
        if wrong:
            raise UserError(key, found, expected)


def _teachers(objective: ObjectiveConfig, teachers: Mapping[str, TeacherConfig]) -> Iterator[Contradiction]:
    """Signals, domains, the reference teacher, and whether the objective's support is sent."""
    signals = sorted({teacher.signal for teacher in teachers.values()})
    supports = {(t.signal, t.top_k if "topk" in t.signal else 0) for t in teachers.values()}
    found = f"the signals {', '.join(signals)}"
    yield len(supports) > 1, "teachers", found, "one signal (and top_k) for all teachers"
    reference = objective.reference_teacher
    teaching = {name: teacher for name, teacher in teachers.items() if name != reference}
    # Teachers of one domain are mixed in probability space, which needs the same support for all: `topk` has its own each.
    keyed = [domain for teacher in teaching.values() for domain in teacher.domains or ("every other",)]
    shared = next((domain for domain in keyed if keyed.count(domain) > 1), None)
    found = f"several teachers with signal=topk for the domain {shared}"
    mixable = "student_topk, sampled, full or hidden, which can be mixed"
    yield shared is not None and "topk" in signals, "teachers", found, mixable
    if reference is not None:
        key = f"{KEY}.reference_teacher"
        yield reference not in teachers, key, reference, f"one of {', '.join(teachers)}"
        yield not teaching, key, reference, "another teacher beside it, to learn from"
        yield (
            "topk" in signals,
            f"teachers.{reference}.signal",
            "topk",
            "student_topk or another that names one support",
        )
        domains = teachers[reference].domains if reference in teachers else []
        yield bool(domains), f"teachers.{reference}.domains", domains, "none: the reference scores every prompt"
    needed = (reference is None) != (objective.extrapolation == 1)
    expected = f"a number other than 1, just when {KEY}.reference_teacher names the reference"
    yield needed, f"{KEY}.extrapolation", objective.extrapolation, expected
    for setting, asked in {
        f"estimator={objective.estimator}": estimator_row(objective.estimator).needs_distribution,
        "baseline=exact_kl": objective.baseline == "exact_kl",
    }.items():
        for name, teacher in teachers.items():
            expected = f"topk, student_topk, full or hidden: {KEY}.{setting} needs a distribution"
            yield asked and teacher.signal == "sampled", f"teachers.{name}.signal", "sampled", expected
    renormalised = objective.support == "renormalised" and not any("topk" in signal for signal in signals)
    yield renormalised, f"{KEY}.support", "renormalised", "tail, or a teacher whose signal is topk or student_topk"


def _ema_teachers(teachers: Mapping[str, TeacherConfig], student_model: str) -> Iterator[Contradiction]:
    """Teachers with `ema_decay`, whose weights are an average of the student's."""
    for name, teacher in teachers.items():
        key, follows = f"teachers.{name}", teacher.ema_decay is not None
        yield teacher.ema_decay == 1, f"{key}.ema_decay", 1, "a number < 1, or null for a teacher that stays as it is"
        expected = f"{student_model}, the student's, which a teacher with ema_decay follows"
        yield follows and teacher.model != student_model, f"{key}.model", teacher.model, expected
        expected = "transformers: the other backends cannot load new weights during the campaign (ema_decay)"
        yield follows and not backend_of(teacher, key).follows_student, f"{key}.backend", teacher.backend, expected
        expected = "another signal: the head of a teacher with ema_decay changes with every update"
        yield follows and teacher.signal == "hidden", f"{key}.signal", "hidden", expected


def _tokenizers(
    objective: ObjectiveConfig, teachers: Mapping[str, TeacherConfig], *, writes: bool
) -> Iterator[Contradiction]:
    """Teachers with a tokenizer of their own: they share only the text with the student, no token ids. writes: they write
    the responses."""
    for name, teacher in teachers.items():
        key, foreign = f"teachers.{name}", teacher.tokenizer is not None
        expected = "sampled: a teacher with its own tokenizer can only score the text, so it sends no other signal"
        yield foreign and teacher.signal != "sampled", f"{key}.signal", teacher.signal, expected
        expected = "null: a teacher with ema_decay has the student's tokenizer"
        yield foreign and teacher.ema_decay is not None, f"{key}.tokenizer", teacher.tokenizer, expected
        expected = "null: with estimator=sft the teacher writes in the student's tokens"
        yield foreign and writes, f"{key}.tokenizer", teacher.tokenizer, expected
        # Teachers of the same prompts. One without domains (None) teaches the prompts that no other teacher's domains name.
        rivals = [
            other
            for other, its in teachers.items()
            if other not in (name, objective.reference_teacher) and name != objective.reference_teacher
            if set(its.domains or (None,)) & set(teacher.domains or (None,))
        ]
        expected = (
            f"null, or no other teacher for its prompts (now {', '.join(rivals)}): tokens of two tokenizers do not mix"
        )
        yield foreign and bool(rivals), f"{key}.tokenizer", teacher.tokenizer, expected


def _estimator(objective: ObjectiveConfig, samples_per_prompt: int) -> Iterator[Contradiction]:
    """Baseline, divergence, discount and log-ratio that the estimator can use."""
    o, row = objective, estimator_row(objective.estimator)
    full = not row.samples_action
    lonely = o.baseline == "group_mean" and samples_per_prompt < 2
    expected = f"2 or more: {KEY}.baseline=group_mean is over a prompt's samples"
    yield lonely, "pipeline.samples_per_prompt", samples_per_prompt, expected
    no_action = "which samples no action" if full else ""
    for name, value, default in (
        ("baseline", o.baseline, "none"),
        ("dual_clip", o.dual_clip, None),
        ("through_log_ratio", o.through_log_ratio, False),
        ("position_weight", o.position_weight, 0),
    ):
        yield (
            full and value != default,
            f"{KEY}.{name}",
            value,
            f"{default}, or an estimator other than full, {no_action}",
        )
    other = o.divergence != "reverse_kl"
    yield other and not full, f"{KEY}.divergence", o.divergence, "reverse_kl, or estimator=full"
    yield o.gamma != 1 and not row.discounts, f"{KEY}.gamma", o.gamma, "1, or estimator=discounted or to_go_expected"
    by_turns = row.discounts and o.estimator in ESTIMATORS
    expected = "1, or estimator=discounted or to_go_expected"
    yield o.turn_discount != 1 and not by_turns, f"{KEY}.turn_discount", o.turn_discount, expected
    both = o.first_turns is not None and o.last_turns is not None
    yield both, f"{KEY}.last_turns", o.last_turns, f"null, or {KEY}.first_turns=null: one of the two"
    distribution = row.needs_distribution or o.baseline == "exact_kl"
    expected = "true: only the token's log-prob under the sampling distribution is known, not the distribution"
    yield distribution and not o.recompute_log_ratio, f"{KEY}.recompute_log_ratio", False, expected


def _reward(objective: ObjectiveConfig, samples_per_prompt: int) -> Iterator[Contradiction]:
    """Rewards, and the settings of a teacher's coefficient that the reward alone does not have."""
    o, row = objective, estimator_row(objective.estimator)
    alone = row.samples_action and not row.is_coefficient
    rewarded = gives_rewards(o)
    expected = "2 or more: a reward is compared with those of the prompt's other samples"
    yield rewarded and samples_per_prompt < 2, "pipeline.samples_per_prompt", samples_per_prompt, expected
    for name, value, default in (
        ("reward_weight", o.reward_weight, 0),
        ("baseline", o.baseline, "none"),
        ("position_weight", o.position_weight, 0),
        ("through_log_ratio", o.through_log_ratio, False),
        ("log_ratio_clip", o.log_ratio_clip, None),
        ("log_ratio_power", o.log_ratio_power, None),
        ("cost", o.cost, None),
        ("proximal_weight", o.proximal_weight, 1),
        ("reference_teacher", o.reference_teacher, None),
    ):
        expected = f"{default}, or an estimator that has a teacher's coefficient: {o.estimator} has none"
        yield alone and value != default, f"{KEY}.{name}", value, expected


def _sft(objective: ObjectiveConfig, teachers: Mapping[str, TeacherConfig], text_by: str) -> Iterator[Contradiction]:
    """Responses written by a teacher, or of a data set."""
    o, writes, sft = objective, text_by == "teacher", text_by != "student"
    expected = f"one teacher, which writes for {KEY}.estimator=sft"
    yield writes and len(teachers) > 1, "teachers", ", ".join(teachers), expected
    for name, teacher in teachers.items():
        other = writes and not backend_of(teacher, f"teachers.{name}").samples
        expected = f"a backend with `sample` (docs/extending.md): with {KEY}.estimator=sft the teacher writes"
        yield other, f"teachers.{name}.backend", teacher.backend, expected
        expected = "another signal: the student names no tokens for responses that the teacher wrote"
        yield writes and teacher.signal == "student_topk", f"teachers.{name}.signal", "student_topk", expected
    # pi_old is whoever wrote, so a trust region or a correction would act against that.
    region, never = o.trust_region, "the student's own samples, so another estimator than sft"
    for name, value, default in (
        ("mismatch.correction", o.mismatch.correction, "none"),
        ("trust_region.beta", region.beta, 0),
        ("trust_region.target_kl", region.target_kl, None),
        ("trust_region.max_kl", region.max_kl, None),
    ):
        yield sft and value != default, f"{KEY}.{name}", value, f"{default}, or {never}"


def _cost(objective: ObjectiveConfig) -> Iterator[Contradiction]:
    """Bounds of the log-ratio and costs of the user's own."""
    o, row = objective, estimator_row(objective.estimator)
    bounds = {
        "log_ratio_clip": o.log_ratio_clip,
        "log_ratio_power": o.log_ratio_power,
        "cost": o.cost,
        "proximal_weight": None if o.proximal_weight == 1 else o.proximal_weight,
    }
    bounded = o.divergence != "reverse_kl" and bool(o.log_ratio_clip or o.log_ratio_power or o.cost)
    yield bounded, f"{KEY}.divergence", o.divergence, "reverse_kl, where the log-ratio is bounded"
    for name, bound in bounds.items():
        mixed = bound is not None and row.is_coefficient and row.needs_distribution
        expected = "no bound: to_go_expected adds exact KLs, and would mix two different costs"
        yield mixed, f"{KEY}.{name}", bound, expected
    both = o.cost is not None and (o.log_ratio_clip is not None or o.log_ratio_power is not None)
    yield both, f"{KEY}.cost", o.cost, "null with log_ratio_clip or log_ratio_power: a cost of your own bounds itself"
    for name in ("log_ratio_power", "cost", "proximal_weight"):
        unnormalised = bounds[name] is not None and o.reference_teacher is not None and row.samples_action
        expected = "nothing, or estimator=full: at sampled tokens the extrapolated teacher is not normalised"
        yield unnormalised, f"{KEY}.{name}", bounds[name], expected
    yield o.divergence == "jsd" and o.mixture == 1, f"{KEY}.mixture", 1, "a number < 1 for jsd"


def _step(objective: ObjectiveConfig) -> Iterator[Contradiction]:
    """Aggregation, trust region and mismatch weights."""
    o, mismatch = objective, objective.mismatch
    constant = (o.aggregation == "constant") != (o.aggregation_constant is not None)
    expected = "a number, just when aggregation=constant"
    yield constant, f"{KEY}.aggregation_constant", o.aggregation_constant, expected
    region = o.trust_region
    expected = "a number > 0 to start from, where target_kl adapts it"
    yield region.target_kl is not None and region.beta == 0, f"{KEY}.trust_region.beta", 0, expected
    expected = f"at most high={mismatch.high:g}"
    yield mismatch.low > mismatch.high, f"{KEY}.mismatch.low", mismatch.low, expected
    corrected = mismatch.correction != "none"
    expected = "auto or learner: a correction is relative to the learner's own log-probs"
    yield corrected and mismatch.pi_old == "engine", f"{KEY}.mismatch.pi_old", "engine", expected
    weighed = (
        not estimator_row(o.estimator).samples_action and mismatch.correction != "none" and mismatch.level == "token"
    )
    expected = "prefix or sequence: the estimator full samples no action, and has no token to correct"
    yield weighed, f"{KEY}.mismatch.level", "token", expected


def starts_at_learner(objective: ObjectiveConfig, *dtypes: str) -> bool:
    """Whether the clipped ratio starts from the learner's own log-probs, though nothing is corrected (`mismatch.pi_old`).

    dtypes: those that the engine and the learner compute in.
    """
    mismatch, row = objective.mismatch, estimator_row(objective.estimator)
    clips = row.has_coefficient or (not row.samples_action and objective.reward_weight > 0)
    if mismatch.correction != "none" or not clips:
        return False
    return mismatch.pi_old == "learner" or (mismatch.pi_old == "auto" and set(dtypes) != {"float32"})


def gives_rewards(objective: ObjectiveConfig) -> bool:
    """Whether the objective uses rewards of the responses."""
    return estimator_row(objective.estimator).needs_reward or objective.reward_weight > 0
