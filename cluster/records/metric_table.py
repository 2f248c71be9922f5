"""The metrics of metrics.jsonl, one row each: what they mean, and who uses them. Standard library only.

The writer checks each line against it; guards, `status`, the report and docs/metrics.md take their metrics from it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.records.rewards import MEANS, told_as

Form = Literal["number", "percent", "seconds", "bytes", "histogram"]

DISTANCE, RESPONSES, STEP, PIPELINE = "Distance to the teacher", "Responses", "The step", "The pipeline"
SECTIONS = (DISTANCE, RESPONSES, STEP, PIPELINE)
"""Sections of docs/metrics.md and of the report, in this order."""

TOP_SIGNALS, MASS_SIGNALS = ("topk", "full", "hidden"), ("topk", "student_topk")
"""Signals of a teacher that allow to compare most likely tokens, and that have a top-k support."""


@dataclass(frozen=True)
class Metric:
    """One metric. Example: `METRICS["entropy"].unit == "nats per token"`."""

    section: str
    unit: str
    meaning: str
    bad_sign: str = ""
    """What a run that goes wrong shows."""
    always: bool = True
    """Every line of an update has it; for `eval/` metrics, every line of an evaluation."""
    guarded: bool = False
    """A guard may watch it: it does not depend on the machine's speed, is no total, and is there in time."""
    signals: tuple[str, ...] = ()
    """Measured only with teachers that send one of these signals. Empty: with every signal."""
    chart: str = ""
    """Title of the report's chart that shows it; metrics with the same title share one, the first drawn solid."""
    line: str = ""
    """What its line in a shared chart is called."""
    form: Form = "number"
    limits: tuple[float | None, float | None] = (None, None)
    """Values that the chart's y axis includes at least."""
    status: str = ""
    """Row of `understudy status` that shows it."""
    label: str = ""
    """Short name, in that row and in the plain lines of `run`."""
    digits: str = ""
    """Format specification there, such as `.4f`."""


METRICS: dict[str, Metric] = {
    # ---------------------------------------------------------------------------------------- distance to the teacher
    "eval/reverse_kl": Metric(
        DISTANCE, "nats per token", "mean of log pi - log q over the student's own text, on held-out prompts", "rises while `reverse_kl` falls",
        chart="Reverse KL to the teacher", line="held-out", limits=(0, None),
        status="evaluation", label="reverse KL", digits=".4f",
    ),
    "reverse_kl": Metric(
        DISTANCE, "nats per token",
        "mean of log pi - log q at the sampled tokens, or of the exact KL(pi ‖ q) where the objective needs a distribution",
        "rises, or stays high while `grad_norm` is near 0",
        guarded=True, chart="Reverse KL to the teacher", line="training",
        status="training", label="reverse KL", digits=".4f",
    ),
    "log_ratio_histogram": Metric(
        DISTANCE, "tokens",
        "tokens by log pi - log q in the first pass over them, in bins at -4, -3.5, … 4 nats; the outer bins hold "
        "everything beyond",
        always=False, chart="Log-ratios", form="histogram",
    ),
    "log_ratio_p99": Metric(
        DISTANCE, "nats", "99th percentile of log pi - log q at the sampled tokens",
        "far above the rest (10 and more): a few tokens that the teacher would never write dominate the gradient",
        always=False, guarded=True, chart="Tails of the log-ratio", line="99%",
    ),
    "log_ratio_p01": Metric(
        DISTANCE, "nats", "1st percentile", always=False, guarded=True, chart="Tails of the log-ratio", line="1%"
    ),
    "top1_agreement": Metric(
        DISTANCE, "share of tokens", "tokens where student and teacher agree on the most likely token",
        "falls; in a healthy run it rises (arXiv 2604.13016)",
        always=False, guarded=True, signals=TOP_SIGNALS, chart="Agreement with the teacher", line="most likely",
        form="percent",
    ),
    "top8_overlap": Metric(
        DISTANCE, "share", "share of the teacher's 8 most likely tokens that are among the student's 8",
        "falls. With a small vocabulary most of the 8 are noise: watch the trend",
        always=False, guarded=True, signals=TOP_SIGNALS, chart="Agreement with the teacher", line="8 most likely",
        form="percent",
    ),
    "student_support_mass": Metric(
        DISTANCE, "probability", "probability that the student gives to the tokens of a top-k support",
        "falls below about 0.9: the student writes tokens outside the support",
        always=False, guarded=True, signals=MASS_SIGNALS, chart="Mass on the support", line="student", form="percent",
    ),
    "teacher_support_mass": Metric(
        DISTANCE, "probability", "probability that the teacher gives to them",
        "low: `top_k` is too small, or (`student_topk`) the student proposes tokens that the teacher would not write",
        always=False, guarded=True, signals=MASS_SIGNALS, chart="Mass on the support", line="teacher", form="percent",
    ),
    "teacher/<name>/reverse_kl": Metric(
        DISTANCE, "nats per token", "`reverse_kl` over the tokens that this teacher scored; with several teachers",
        "one rises while the others fall", always=False, guarded=True,
    ),
    "teacher/<name>/token_share": Metric(
        DISTANCE, "share of tokens",
        "share of the trained tokens that this teacher scored; with a mixture a token has several teachers, so the "
        "shares may add up to more than 1",
        always=False, guarded=True,
    ),
    "domain/<name>/reverse_kl": Metric(
        DISTANCE, "nats per token", "`reverse_kl` over the prompts of this domain", "one rises while the others fall",
        always=False, guarded=True,
    ),
    "domain/<name>/token_share": Metric(
        DISTANCE, "share of tokens", "share of the trained tokens that belong to this domain",
        "far from the domain's share of the prompts: long responses crowd out a domain", always=False, guarded=True,
    ),
    # ------------------------------------------------------------------------------------------------------ responses
    "eval/accuracy": Metric(
        RESPONSES, "share, or reward",
        "mean reward of the student's answers, with its most likely tokens, to the held-out prompts with a reference answer: the "
        "share that it answers right, where all rewards are 0 or 1. Absent where no prompt has one",
        chart="Accuracy on held-out prompts", line="greedy", form="percent", limits=(0, 1),
        status="evaluation", label="accuracy", digits=".1%",
    ),
    "eval/accuracy_sampled": Metric(
        RESPONSES, "share, or reward", "the same with sampled responses",
        chart="Accuracy on held-out prompts", line="sampled", form="percent",
        status="evaluation", label="sampled", digits=".1%",
    ),
    "eval/right": Metric(
        RESPONSES, "share",
        "share of the answers of `eval/accuracy` that are right (reward of at least 1); where some rewards are neither 0 nor 1, so "
        "that `eval/accuracy` is no share", always=False,
        chart="Right answers to held-out prompts", form="percent", limits=(0, 1),
        status="evaluation", label="right", digits=".1%",
    ),
    "eval/right_teacher": Metric(
        RESPONSES, "share", "the same for the teacher; on the line of step 0", always=False
    ),
    "eval/accuracy_teacher": Metric(
        RESPONSES, "share, or reward", "`eval/accuracy` for the teacher; on the line of step 0, with `evaluation.teacher`", always=False
    ),
    "eval/<name>/accuracy": Metric(
        RESPONSES, "share, or reward",
        "of the evaluation set `<name>`: mean reward of the `samples` answers to each prompt (avg@k), over prompts with a "
        "reference answer",
        always=False, form="percent",
    ),
    "eval/<name>/right": Metric(
        RESPONSES, "share", "share of them that are right, where some rewards are neither 0 nor 1", always=False, form="percent",
    ),
    "eval/<name>/right_teacher": Metric(
        RESPONSES, "share", "the same of the teacher's answers", always=False
    ),
    "eval/<name>/pass@<k>": Metric(
        RESPONSES, "share", "probability that one of k answers is right (reward of at least 1), without bias: 1 - C(n - c, k) / C(n, k) "
        "for c right ones of n samples (arXiv 2107.03374); k = 2, 4, 8, … and `samples`",
        always=False, form="percent",
    ),
    "eval/<name>/majority": Metric(
        RESPONSES, "share, or reward", "reward of the answer that most samples gave; of several such answers, the mean over them",
        always=False, form="percent",
    ),
    "eval/<name>/accuracy_teacher": Metric(
        RESPONSES, "share, or reward", "of the teacher's greedy answers to the set's prompts; on the line of step 0", always=False
    ),
    "eval/<name>/reverse_kl": Metric(
        DISTANCE, "nats per token",
        "`eval/reverse_kl` on the set's prompts, where it samples as training does", always=False,
    ),
    "eval/<name>/reverse_kl_on_teacher_text": Metric(
        DISTANCE, "nats per token", "with `exposure`: the same of one token at each of several prefixes that the teacher has written",
        "far below `reverse_kl`: the student is worst where its own text has led it", always=False,
    ),
    "eval/<name>/exposure_position": Metric(
        DISTANCE, "tokens", "with `exposure`: the last position of each part of a response, a list", always=False, form="histogram",
    ),
    "eval/<name>/exposure_own": Metric(
        DISTANCE, "nats per token", "the reverse KL there on the student's own prefixes, a list", always=False, form="histogram",
    ),
    "eval/<name>/exposure_teacher": Metric(
        DISTANCE, "nats per token", "the same on prefixes that the teacher has written", always=False, form="histogram",
    ),
    "eval/<name>/entropy": Metric(
        RESPONSES, "nats per token", "mean of -log pi over the sampled tokens, likewise", always=False
    ),
    "eval/<name>/response_length_mean": Metric(
        RESPONSES, "tokens", "mean length of the answers to the set's prompts", always=False
    ),
    "eval/<name>/truncated_fraction": Metric(
        RESPONSES, "share of responses", "answers cut at the set's `max_response_tokens`",
        "above a few percent: answers that were never finished count as wrong", always=False,
    ),
    "<metric>:low": Metric(
        RESPONSES, "as the metric",
        "lower bound of the 95% interval of an accuracy, a share of right answers, pass@k, majority, reverse KL or entropy of an evaluation, clustered by "
        "prompt ([how](evaluation.md#intervals))", always=False,
    ),
    "<metric>:high": Metric(RESPONSES, "as the metric", "its upper bound", always=False),
    "<metric>:from_start": Metric(
        RESPONSES, "as the metric", "difference to the untrained student, over the same prompts", always=False
    ),
    "<metric>:from_start:low": Metric(RESPONSES, "as the metric", "lower bound of its paired interval", always=False),
    "<metric>:from_start:high": Metric(RESPONSES, "as the metric", "its upper bound", always=False),
    "<metric>:from_teacher": Metric(
        RESPONSES, "as the metric", "difference to the teacher's accuracy, over the same prompts", always=False
    ),
    "<metric>:from_teacher:low": Metric(RESPONSES, "as the metric", "lower bound of its paired interval", always=False),
    "<metric>:from_teacher:high": Metric(RESPONSES, "as the metric", "its upper bound", always=False),
    "reward_mean": Metric(
        RESPONSES, "of the verifier", "mean reward of the update's responses, where rewards are given",
        "falls, or is 0 from the start: nothing to learn from", always=False, chart="Reward",
        status="responses", label="reward", digits=".4g",
    ),
    "reward/<name>_mean": Metric(
        RESPONSES, "of the verifier",
        "mean of this named part of the rewards, over the update's responses whose reward has it; where a verifier of your own "
        "returns parts",
        always=False,
    ),
    "entropy": Metric(
        RESPONSES, "nats per token", "mean entropy of the student",
        "falls to 0 (no exploration, nothing to correct), or jumps up (the student writes noise)",
        guarded=True, chart="Entropy", limits=(0, None), status="training", label="entropy", digits=".3f",
    ),
    "response_length_mean": Metric(
        RESPONSES, "tokens", "mean length of the responses", "grows to the limit, or shrinks to a few tokens",
        guarded=True, chart="Response length", line="train", status="training", label="length", digits=".1f",
    ),
    "eval/response_length_mean": Metric(
        RESPONSES, "tokens", "the same on held-out prompts", chart="Response length", line="held-out"
    ),
    "response_length_max": Metric(
        RESPONSES, "tokens", "longest response of the update", always=False, guarded=True
    ),
    "truncated_fraction": Metric(
        RESPONSES, "share of responses", "responses cut at `sampling.max_response_tokens`",
        "above a few percent: the end of a cut response cannot be corrected. Near 1: the student no longer stops",
        guarded=True, chart="Truncated", form="percent", status="training", label="truncated", digits=".1%",
    ),
    "truncated_masked": Metric(
        RESPONSES, "responses", "cut responses that were not trained on (`learner.objective.truncated: mask`)",
        "near the update's responses: nothing is left to learn from", always=False, guarded=True,
    ),
    "stopped_fraction": Metric(
        RESPONSES, "share of responses", "responses that the student ended itself, with a stop token",
        "falls, as `truncated_fraction` rises", always=False, guarded=True,
    ),
    "repetition": Metric(
        RESPONSES, "share of 4-grams", "1 - distinct / all 4-grams of a response, mean (seq-rep-4, arXiv 1908.04319)",
        "rises; a loop is near 1", always=False, guarded=True, chart="Repetition", form="percent",
    ),
    "context_share": Metric(
        RESPONSES, "share of tokens", "tokens of the responses that the student did not write; they are not trained on",
        always=False, guarded=True, form="percent",
    ),
    # ----------------------------------------------------------------------------------------------------------- step
    "loss": Metric(
        STEP, "of the objective",
        "what a step minimises, mean over the update's steps (weighted by their tokens, or responses, as "
        "`objective.aggregation` does); not comparable between estimators",
        "0 together with a high `reverse_kl`: the run is dead",
        guarded=True, chart="Loss", status="training", label="loss", digits=".4g",
    ),
    "grad_norm": Metric(
        STEP, "", "norm of the last step's gradient, before clipping",
        "far above `max_grad_norm` for long; near 0 early on",
        guarded=True, chart="Gradient norm", status="training", label="gradient", digits=".3g",
    ),
    "learning_rate": Metric(
        STEP, "", "learning rate of the update, with the guards' factors",
        chart="Learning rate", limits=(0, None), status="training", label="learning rate", digits=".2g",
    ),
    "tokens_trained": Metric(
        STEP, "tokens", "tokens with a finite score that are not masked, each counted once",
        "far below `response_length_mean` x trajectories: scores are missing (is the teacher well?), or masks are too "
        "wide (`masked_token_ids`, `masked_token_roles`)",
        guarded=True, chart="Trained tokens",
    ),
    "forward_kl_old": Metric(
        STEP, "nats per token", "KL(pi_old ‖ pi_theta), mean over the passes of all steps, as all means over tokens",
        "above about 0.1: steps are too large", guarded=True, chart="Forward KL",
    ),
    "ratio_mean": Metric(
        STEP, "", "pi_theta / pi_old at the sampled tokens", "away from 1", guarded=True, chart="Ratio", line="mean"
    ),
    "ratio_max": Metric(STEP, "", "its maximum", "in the hundreds", guarded=True, chart="Ratio", line="max"),
    "clip_fraction": Metric(
        STEP, "share of tokens", "tokens whose gradient the clip removed", "above about 0.2",
        guarded=True, chart="Clipped", form="percent",
    ),
    "importance_ess": Metric(
        STEP, "share", "effective sample size of the ratios; 1 is on-policy", "below 0.5: few tokens dominate the step",
        guarded=True, chart="Importance ESS",
    ),
    "mismatch_ess": Metric(
        STEP, "share",
        "effective sample size of the ratio of the learner, in its first pass over a token, to the engine that sampled it: "
        "rounding and, on stale data, the updates between; of the weights as they were cut, where `mismatch.correction` "
        "corrects",
        "below 0.9: engine and learner disagree", always=False, guarded=True,
    ),
    "behaviour_ess": Metric(
        STEP, "share",
        "how far off-policy: effective sample size of the ratio of the learner, in its first pass over a token, to the policy "
        "that wrote it, before any weight is cut",
        "below 0.5: half the tokens count for nothing; stop replaying, or sample anew", always=False, guarded=True,
        chart="Off-policy: effective sample size", limits=(0, 1),
    ),
    "behaviour_kl": Metric(
        STEP, "nats per token",
        "how far off-policy: mean log-ratio of the policy that wrote the tokens to the learner in its first pass over them, an "
        "estimate of the KL from the one to the other",
        "above 0.1", always=False, guarded=True, chart="Off-policy: KL", limits=(0, None),
    ),
    "replay_epoch": Metric(
        STEP, "", "pass over the record (`replay`), from 1", always=False,
    ),
    "filter_weight_mean": Metric(
        STEP, "share", "probability of the tokens that top-p and top-k kept; 1 without them",
        "below 0.5: most of the policy is never sampled", always=False, guarded=True,
    ),
    "engine_logprob_abs_diff": Metric(
        STEP, "nats", "mean difference of a token's log-prob between engine and learner, for the same weights: over the tokens of the "
        "update's first step that were sampled with the newest version",
        "above 0.05 with bfloat16, 0.001 with float32", guarded=True, chart="Engine against learner",
    ),
    "beta": Metric(
        STEP, "", "weight of the trust region's KL",
        "only grows: steps of this learning rate move further than `trust_region.target_kl` (raise it, or lower the rate)",
        always=False, guarded=True,
    ),
    "step_scale": Metric(
        STEP, "share", "share of the last step that the hard limit of the KL left; 0: it was taken back entirely",
        "near 0", always=False, guarded=True,
    ),
    "steps_taken": Metric(
        STEP, "optimiser steps", "steps that changed the weights",
        "0: each step is beyond `trust_region.max_kl` (raise it, or lower the learning rate), or there is no token to "
        "learn from (`steps_skipped`)",
        always=False, guarded=True,
    ),
    "steps_skipped": Metric(
        STEP, "optimiser steps", "steps that were not taken, because no token of their trajectories was left to learn from",
        "above 0: scores are missing, or masks are too wide", always=False, guarded=True,
    ),
    # ------------------------------------------------------------------------------------------------------- pipeline
    "step": Metric(PIPELINE, "updates", "number of the update"),
    "policy_version": Metric(PIPELINE, "updates", "version of the weights that the update made"),
    "wall_seconds": Metric(PIPELINE, "seconds, total", "time that the campaign has run since its command, without downtime"),
    "trajectories": Metric(PIPELINE, "trajectories, total", "trajectories trained on"),
    "tokens_generated": Metric(PIPELINE, "tokens, total", "tokens sampled for training; in a replay, those of the record"),
    "tokens_per_second": Metric(
        PIPELINE, "tokens per second",
        "sampled tokens over the time since the line before, evaluations included; computed by the report",
        always=False, chart="Throughput",
    ),
    "staleness_mean": Metric(
        PIPELINE, "updates", "versions between sampling its oldest token and training",
        guarded=True, chart="Staleness", line="mean", status="staleness", label="mean", digits=".2f",
    ),
    "staleness_max": Metric(
        PIPELINE, "updates", "its maximum over the update's trajectories",
        guarded=True, chart="Staleness", line="max", status="staleness", label="max", digits=",",
    ),
    "staleness_histogram": Metric(
        PIPELINE, "trajectories", "trajectories by staleness, from 0 to `pipeline.max_staleness`",
        chart="Staleness of trajectories", form="histogram",
    ),
    "dropped": Metric(
        PIPELINE, "trajectories, total", "trajectories dropped without training on them",
        chart="Dropped", status="staleness", label="dropped", digits=",",
    ),
    "passed_over_agreed": Metric(
        PIPELINE, "trajectories, total", "of the dropped: not asked, because student and teacher agree (`prompts.keep`)",
        always=False,
    ),
    "passed_over_later": Metric(
        PIPELINE, "trajectories, total", "of the dropped: not asked yet (`prompts.curriculum`)", always=False
    ),
    "dropped_share": Metric(PIPELINE, "share, total", "share of all issued trajectories that were dropped"),
    "missing_scores": Metric(
        PIPELINE, "tokens, total", "tokens without a finite score of the teacher; they are masked",
        always=False, status="staleness", label="missing scores", digits=",",
    ),
    "preempted": Metric(
        PIPELINE, "times", "a running response lost its place in an engine's full cache since the line before; it is computed again later",
        "a tenth of the trajectories of an update and more: `rollout.engine.max_num_seqs` is too high, or the engines have too little memory",
        always=False,
    ),
    "turns_mean": Metric(
        RESPONSES, "turns", "turns of the student in a response, mean of the update", always=False,
        chart="Turns of an episode", limits=(0, None), status="responses", label="turns", digits=".2f",
    ),
    "conversations_mean": Metric(
        RESPONSES, "conversations", "of an episode (docs/environments.md), mean of the update, where one had several", always=False,
    ),
    "episode_seconds_mean": Metric(
        PIPELINE, "seconds", "an episode takes, mean of the update", always=False,
        chart="Seconds of an episode", line="an episode takes", form="seconds", limits=(0, None),
    ),
    "environment_seconds_mean": Metric(
        PIPELINE, "seconds", "of it: it waits for its environment", "near `episode_seconds_mean`: see docs/environments.md, Environments that take their time",
        always=False, chart="Seconds of an episode", line="waiting for its environment", form="seconds",
    ),
    "environment_idle_seconds": Metric(
        PIPELINE, "seconds", "rollout engines had nothing to write since the line before, because environments were waited for in all of their episodes",
        "near the seconds of an update, times `rollout.replicas`: more episodes under way (`pipeline.max_staleness`)",
        always=False, chart="Engines that wait for environments", form="seconds", limits=(0, None),
    ),
    "episode_retries": Metric(
        PIPELINE, "episodes", "begun again, of those of the update: the environment raised, took too long, or its process died", always=False,
    ),
    "queue_sample": Metric(PIPELINE, "trajectories", "waiting for a rollout actor", always=False),
    "queue_sampling": Metric(PIPELINE, "trajectories", "being sampled", always=False),
    "queue_score": Metric(PIPELINE, "trajectories", "waiting for a teacher", always=False),
    "queue_train": Metric(PIPELINE, "trajectories", "waiting for the learner", always=False),
    "busy_rollout": Metric(PIPELINE, "seconds", "work of all rollout actors since the line before"),
    "busy_teacher": Metric(PIPELINE, "seconds", "work of all teacher actors"),
    "busy_learner": Metric(PIPELINE, "seconds", "work of the learner"),
    "processor_seconds": Metric(
        PIPELINE, "seconds, total", "processor time of the actors for training, without start-up and evaluations", always=False
    ),
    "publish_seconds": Metric(
        PIPELINE, "seconds", "from the learner to every rollout actor",
        chart="Publishing", form="seconds", status="weights", label="published in seconds", digits=".2f",
    ),
    "prepare_seconds": Metric(
        PIPELINE, "seconds",
        "of it: verifying, decoding and staging the version beside a rollout engine that goes on, the slowest actor",
        "far above `publish_bytes` over a GB/s or two for each CPU: raise `rollout.cpus_per_replica`",
        always=False, chart="Loading a version", line="prepared beside the engine", form="seconds",
        status="weights", label="prepared", digits=".2f",
    ),
    "standstill_seconds": Metric(
        PIPELINE, "seconds", "of it: no token was sampled while the weights were replaced, the slowest actor",
        "near `publish_seconds`: weights are copied from pageable memory",
        always=False, chart="Loading a version", line="standstill", form="seconds",
        status="weights", label="standstill", digits=".2f",
    ),
    "publish_bytes": Metric(
        PIPELINE, "bytes", "size of the published weights",
        chart="Weight version", form="bytes", status="weights", label="bytes", digits=",",
    ),
}  # fmt: skip

METRIC_KEYS = tuple(key for key, metric in METRICS.items() if metric.always and not key.startswith("eval/"))
"""Every update's line of metrics.jsonl has these. Metrics whose unit says "total" count from the start of the campaign,
so that a curve can be drawn against them; all others belong to the update alone."""

EVALUATION_KEYS = tuple(key for key, metric in METRICS.items() if metric.always and key.startswith("eval/"))
"""Lines of evaluation steps have these besides; without reference answers, accuracy is absent. Step 0, the untrained student, has them and STEP_ZERO_KEYS alone;
`eval/accuracy_teacher` stands there too where the teacher was measured."""

STEP_ZERO_KEYS = ("step", "policy_version", "wall_seconds")


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is of an evaluation, of `evaluation.prompts` or of sets."""
    return any(key.startswith("eval/") for key in row)


def sets_of(row: Mapping[str, Any]) -> list[str]:
    """The evaluation sets whose metrics a line has, in their order."""
    return list(dict.fromkeys(key.split("/")[1] for key in row if key.startswith("eval/") and key.count("/") == 2))


def guardable(signal: str, teachers: Iterable[str], domains: Iterable[str]) -> list[str]:
    """The metrics that guards may watch in a campaign with this teacher signal, these teachers and these domains.

    `teacher/<name>/…` and `domain/<name>/…` are repeated for each name.
    """
    names = {"teacher": list(teachers), "domain": list(domains)}
    found = []
    for key, metric in METRICS.items():
        if metric.guarded and (not metric.signals or signal in metric.signals):
            group, template, rest = key.partition("/<name>/")
            found += [f"{group}/{name}/{rest}" for name in names[group]] if template else [key]
    return found


def row_of_key(key: str) -> Metric | None:
    """The row of a key of metrics.jsonl: by its name, or by a pattern with `<name>`, `<k>` or `<metric>`; None: there is none."""
    if key in METRICS:
        return METRICS[key]
    base, colon, rest = key.partition(":")
    if colon:
        kind = METRICS.get(f"<metric>:{rest}")
        return kind if row_of_key(base) is not None else None
    words = re.sub(r"@\d+$", "@<k>", key).split("/")
    return METRICS.get("/".join([words[0], "<name>", words[-1]])) if len(words) == 3 else None


def of_status(row: str) -> dict[str, Metric]:
    """The metrics in a row of `understudy status`."""
    return {key: metric for key, metric in METRICS.items() if metric.status == row}


def listed(row: str, values: Mapping[str, float | None], *, graded: bool = False) -> str:
    """The metrics of a status row that were measured, as `label value` side by side. graded: rewards are no shares."""
    told, parts = told_as(graded), []
    for key, metric in of_status(row).items():
        if key in values:
            of_rewards = key.removeprefix("eval/") in MEANS
            label = told.name if key == "eval/accuracy" else metric.label
            parts.append(f"{label} {with_interval(values, key, told.form if of_rewards else metric.digits)}")
    return "   ".join(parts)


def with_interval(values: Mapping[str, Any], key: str, form: str) -> str:
    """A metric for the screen, with the interval that `<key>:low` and `<key>:high` give it: `97.7 ± 0.9%`.

    The number after ± is the larger distance to a bound, so that the whole interval is within it.
    """
    value, low, high = (values.get(name) for name in (key, f"{key}:low", f"{key}:high"))
    if value is None or low is None or high is None or not math.isfinite(value + low + high):
        return written(value, form)
    half = written(max(value - low, high - value), form)
    return f"{written(value, form).removesuffix('%')} ± {half}"


def with_change(values: Mapping[str, Any], key: str, form: str, versus: str = "from_start") -> str:
    """A metric's paired difference, with its 95% interval where it has one: `+63.2% (+59.0% to +67.1%)`; "" without one."""
    value, low, high = (values.get(f"{key}:{versus}{end}") for end in ("", ":low", ":high"))
    if value is None:
        return ""
    bounds = [written(bound, f"+{form}") for bound in (low, high)]
    return written(value, f"+{form}") + (f" ({' to '.join(bounds)})" if "-" not in bounds else "")


def written(value: float | None, form: str) -> str:
    """A number for the screen; "-" where there is none, which is NaN in the process and null in its files."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)
