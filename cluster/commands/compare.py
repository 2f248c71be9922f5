"""`understudy compare`: runs one task under several methods and seeds, and writes one page about all runs.

Every run is an ordinary campaign: it has its own directory, resumes where it stopped, and is not repeated once finished.

    opd            on-policy distillation, as the configuration has it
    opd_reward     the same with the reward mixed in (`reward_weight`, 1 where the configuration has 0)
    rl             the reward alone: policy gradient with the mean of the prompt's other samples as baseline (RLOO)
    sft            cross entropy on responses that the teacher samples, at the same temperature
    sft_then_opd   sft for the first half of the updates, then opd from its student: two campaigns
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from actors.errors import UserError
from cluster.commands.courses import course
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.records.reader import Run
from learner.student.checkpoint import step_directory

WITHOUT_TEACHERS_COST = {
    "learner.objective.reward_weight": 0.0,
    "learner.objective.baseline": "none",
    "learner.objective.divergence": "reverse_kl",
    "learner.objective.gamma": 1.0,
    "learner.objective.turn_discount": 1.0,
    "learner.objective.position_weight": 0.0,
    "learner.objective.through_log_ratio": "false",
    "learner.objective.log_ratio_clip": "null",
    "learner.objective.log_ratio_power": "null",
    "learner.objective.proximal_weight": 1.0,
}
METHODS: dict[str, dict[str, Any]] = {
    "opd": {},
    "sft": {"learner.objective.estimator": "sft", **WITHOUT_TEACHERS_COST},
    "sft_then_opd": {},
    "opd_reward": {},
    "rl": {"learner.objective.estimator": "reward", **WITHOUT_TEACHERS_COST},
}
"""Method -> the keys that it changes in the configuration."""

REWARDED = ("opd_reward", "rl")
SAMPLES = 8
"""Samples of a prompt for methods with a reward if the configuration has one: a reward is compared with those of the
others."""
REWARD_WEIGHT = 1.0


class Trial(NamedTuple):
    """What one method does with one seed."""

    method: str
    seed: int
    config: CampaignConfig
    """Of its campaign, the last one if there are two."""
    before: CampaignConfig | None = None
    """Of the campaign that makes the student that `config` begins with."""

    @property
    def campaigns(self) -> list[CampaignConfig]:
        """In the order in which they run."""
        return [self.config] if self.before is None else [self.before, self.config]


def trials(config_file: Path, overrides: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """All courses, seed by seed. An override `rl:key=value` applies to that method only. UserError: unknown methods,
    or campaigns that cannot be compared."""
    for method in methods:
        if method not in METHODS:
            raise UserError("--methods", method, f"some of {', '.join(METHODS)}", METHODS)
    for key, given in (("--methods", methods), ("--seeds", seeds)):
        if len(set(given)) < len(given):
            raise UserError(key, ",".join(map(str, given)), "each of them once")
    found = [_trial(config_file, overrides, method, seed) for seed in seeds for method in methods]
    for trial in found:
        if trial.config.evaluation.prompts is None:
            raise UserError("evaluation.prompts", "null", "held-out prompts, on which methods are compared")
        if trial.config.evaluation.prompts.reference_field is None:
            raise UserError("evaluation.prompts.reference_field", "null", "the reference answers that accuracy needs")
        if not trial.config.evaluation.teacher:
            raise UserError("evaluation.teacher", "false", "true: the target is a share of the teacher's accuracy")
        budget, first = trial.config.trajectories_per_update, found[0].config.trajectories_per_update
        if budget != first:
            key = f"{trial.method}:pipeline.prompts_per_update"
            raise UserError(key, f"{budget} trajectories an update", f"{first}, like {found[0].method}")
    return found


def _trial(config_file: Path, overrides: Sequence[str], method: str, seed: int) -> Trial:
    """The campaigns of one method with one seed."""
    common = [override for override in overrides if override.partition("=")[0].partition(":")[0] not in METHODS]
    own = [override.partition(":")[2] for override in overrides if override.startswith(f"{method}:")]
    base = load_config(config_file, common)
    changes = [f"{key}={value}" for key, value in METHODS[method].items()]
    if method == "opd_reward" and base.learner.objective.reward_weight == 0:
        changes.append(f"learner.objective.reward_weight={REWARD_WEIGHT}")
    # A reward is compared with those of the prompt's other samples; the number of trajectories stays the same.
    if method in REWARDED and base.pipeline.samples_per_prompt == 1:
        prompts = max(base.trajectories_per_update // SAMPLES, 1)
        changes += [f"pipeline.prompts_per_update={prompts}", f"pipeline.samples_per_prompt={SAMPLES}"]

    def campaign(name: str, *more: str) -> CampaignConfig:
        named = [f"seed={seed}", f"name={base.name}-{name}-{seed}"]
        try:
            return load_config(config_file, [*common, *changes, *own, *more, *named])
        except UserError as error:
            raise UserError("--methods", method, f"methods that this campaign can take ({error})") from error

    if method != "sft_then_opd":
        return Trial(method, seed, campaign(method))
    updates = campaign(method).pipeline.updates
    if updates < 2:
        raise UserError("pipeline.updates", updates, "2 or more, of which sft_then_opd takes half with each method")
    sft = [f"{key}={value}" for key, value in METHODS["sft"].items()]
    before = campaign(f"{method}-1", *sft, f"pipeline.updates={updates // 2}")
    student = step_directory(before.run_dir / "checkpoints", before.pipeline.updates)
    rest = campaign(f"{method}-2", f"pipeline.updates={updates - updates // 2}", f"student.model={student}")
    return Trial(method, seed, rest, before)


def compare(
    found: Sequence[Trial],
    run: Callable[[CampaignConfig], tuple[dict[str, Any], bool]],
    say: Callable[[str], None] = print,
) -> dict[str, list[Run]] | None:
    """Runs the unfinished campaigns; returns method -> courses, or None: interrupted before the last one."""
    for number, trial in enumerate(found, 1):
        for config in trial.campaigns:
            say(f"{number} of {len(found)}: {config.name}")
            _, complete = run(config)
            if not complete:
                return None
    methods = dict.fromkeys(trial.method for trial in found)
    return {
        method: [course([c.run_dir for c in t.campaigns]) for t in found if t.method == method] for method in methods
    }
