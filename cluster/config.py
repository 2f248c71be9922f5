"""The configuration of a campaign: composes the floors' dataclasses, reads YAML and `key=value`, checks ranges.

The only file that imports OmegaConf. Importing it loads neither torch nor vLLM nor Ray.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from actors.config import (
    PromptsConfig,
    RolloutConfig,
    SamplingConfig,
    StudentConfig,
    TeacherConfig,
    VerifierConfig,
    number,
)
from cluster.guards import GuardConfig, default_guards
from learner.config import LearnerConfig


@dataclass
class PipelineConfig:
    """How much work there is, and how far the stages may run ahead of one another."""

    updates: int = number(100, minimum=1)
    """Optimiser steps of the whole campaign."""
    prompts_per_update: int = number(64, minimum=1)
    """Prompts whose trajectories make one update."""
    samples_per_prompt: int = number(1, minimum=1)
    """Trajectories of each prompt: a group."""
    max_staleness: int = number(0, minimum=0)
    """No token is trained on more than this many updates after it was sampled. 0: strictly on-policy, deterministic."""
    oversample: float = number(0.0, minimum=0, maximum=1)
    """Issue up to this share of an update's trajectories in place of those that are still being sampled when new weights
    have come, so that a few very long responses do not hold up the others. Needs max_staleness >= 1."""


@dataclass
class EvaluationConfig:
    """Held-out prompts, sampled by the same rollout actors."""

    prompts: PromptsConfig | None = None
    """Where they come from; null: no evaluation."""
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    """What counts as right."""
    every_updates: int = number(20, minimum=1)
    """Evaluate before the first update, after every so many, and after the last."""
    teacher: bool = True
    """Measure the teacher's own greedy accuracy once, at the start."""
    keep_trajectories: int = number(32, minimum=0)
    """Sampled trajectories of each evaluation that are kept for reading."""


@dataclass
class WeightsConfig:
    """How weights travel from the learner to the rollout actors."""

    transport: Literal["object_store"] = "object_store"
    """By which way: Ray's object store."""
    encoding: Literal["dense", "delta"] = "dense"
    """`dense`: every version whole. `delta`: what changed since the version before, losslessly; less than a tenth of the
    bytes at the learning rates of large models, for processor time at both ends and a copy of the weights on the host."""
    anchor_every: int = number(20, minimum=1)
    """With `delta`: every so many versions one travels whole; a new actor starts from it."""
    bucket_mebibytes: int = number(256, minimum=1)
    """Size of a bucket: the unit that is put into the object store, and pulled once by each node."""


@dataclass
class CheckpointConfig:
    """When the state is saved."""

    every_updates: int = number(100, minimum=1)
    """Save after every so many updates; the last update, and an interrupted campaign, are always saved."""
    keep_last: int = number(3, minimum=1)
    """Older checkpoints are removed."""
    keep_best: int = number(1, minimum=0)
    """So many are kept besides: of those that were evaluated, the ones with the highest held-out accuracy."""
    mirror: str | None = None
    """URL of a directory (`s3://bucket/runs`, `gs://…`, whatever fsspec knows) to which every checkpoint is copied, with the
    records, while training goes on; a campaign whose run directory is lost goes on from there."""


@dataclass
class TrackingConfig:
    """Where metrics are copied to, beside metrics.jsonl."""

    tensorboard: bool = True
    """Event files in `<run directory>/tensorboard`."""
    prometheus: bool = True
    """Gauges `ray_understudy_…` among those that Ray exports on each node."""
    wandb_project: str | None = None
    """A project of Weights & Biases (needs wandb; the key comes from WANDB_API_KEY)."""
    mlflow_uri: str | None = None
    """A tracking server of MLflow (needs mlflow-skinny)."""


@dataclass
class RayConfig:
    """Which cluster the campaign runs on."""

    address: str | None = None
    """`auto` or host:port of a running cluster. Null: the cluster of the job this runs in, else a private local one."""
    object_store_mebibytes: int | None = number(None, minimum=80)
    """Object store of a private local cluster. Null: Ray's own choice, 30% of the memory."""
    max_restarts: int = number(5, minimum=0)
    """How often within an hour an actor that was lost is replaced, before the campaign gives up."""
    hang_timeout_seconds: float = number(300.0, above=0)
    """How long an actor may give no sign of life, or be at work without progress (an engine's step, a micro-batch, an
    answer from a server), before it is taken for hung, killed, and replaced."""
    start_timeout_seconds: float = number(600.0, above=0)
    """How long actors may take to start, models loaded."""


@dataclass
class CampaignConfig:
    """One run of the loop, from a YAML file to a finished student."""

    name: str = "???"
    """Names the run directory, `<output_dir>/<name>`."""
    output_dir: str = "runs"
    """Where run directories are; inside a submitted job it must be absolute."""
    seed: int = number(0, minimum=0)
    """Decides the order of prompts and the seed of every sample."""
    student: StudentConfig = field(default_factory=StudentConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teachers by name: one, or several that score different domains of prompts, or mixtures."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: dict[str, GuardConfig] = field(default_factory=default_guards)
    """What is watched in the metrics of every update, by names of your own. `kl_rises`, `length_rises`, `truncation`
    and `repetition` are there already, and warn (docs/guards.md)."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def run_dir(self) -> Path:
        """`<output_dir>/<name>`."""
        return Path(self.output_dir) / self.name

    @property
    def student_support_size(self) -> int:
        """Tokens that the student names at each position, for teachers that score these."""
        return max((t.top_k for t in self.teachers.values() if t.signal == "student_topk"), default=0)

    @property
    def scores_apart(self) -> bool:
        """Whether what teachers say in more than one number a token goes to the rank that trains on it, and no other."""
        return self.learner.replicas > 1 and any(t.signal != "sampled" for t in self.teachers.values())

    @property
    def gives_rewards(self) -> bool:
        """Whether what is trained on is judged by `evaluation.verifier`."""
        objective = self.learner.objective
        return objective.estimator == "reward" or objective.reward_weight > 0

    @property
    def replicas(self) -> dict[str, int]:
        """Role -> actors; all teachers are one role here."""
        teachers = sum(teacher.replicas for teacher in self.teachers.values())
        return {"rollout": self.rollout.replicas, "teacher": teachers, "learner": self.learner.replicas}

    @property
    def trajectories_per_update(self) -> int:
        """Trajectories that one update trains on."""
        return self.pipeline.prompts_per_update * self.pipeline.samples_per_prompt
