"""The configuration of a campaign: composes the dataclasses of actors/config.py and learner/config.py.

Standard library only. cluster/config_file.py loads it from YAML and checks types and ranges.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from actors.config import (
    EnvironmentConfig,
    PromptsConfig,
    RolloutConfig,
    SamplingConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    TrainingPromptsConfig,
    VerifierConfig,
    changing,
    number,
    setting,
)
from cluster.guards import GuardConfig, default_guards
from learner.config import LearnerConfig
from learner.objective.estimator_table import estimator_row
from learner.validation import gives_rewards


@dataclass
class PipelineConfig:
    """The amount of work, and how far the stages may run ahead of one another."""

    updates: int = number(100, minimum=1, change="free")
    """Optimiser steps of the whole campaign."""
    prompts_per_update: int = number(64, minimum=1, change="on request")
    """Prompts of one update."""
    samples_per_prompt: int = number(1, minimum=1, change="never")
    """Trajectories sampled from each prompt (a group)."""
    max_staleness: int = number(0, minimum=0, change="on request")
    """The largest number of updates between sampling a token and training on it. 0: strictly on-policy, deterministic."""
    oversample: float = number(0.0, minimum=0, maximum=1, change="on request")
    """When new weights arrive, issue extra trajectories for those still being sampled, up to this share of an update, so
    that a few very long responses do not delay the rest. Needs max_staleness >= 1."""


@changing("free")
@dataclass
class EvaluationSetConfig:
    """One set of held-out prompts, with its own verifier, sampling and length limit (docs/evaluation.md)."""

    prompts: PromptsConfig = setting(PromptsConfig, "free")
    """Its prompts; `limit` takes the first of them."""
    verifier: VerifierConfig | None = setting(None, "free")
    """How its responses are judged, where the prompts have reference answers. Null: only the reverse KL, the entropy and the
    length are measured."""
    samples: int = number(1, minimum=1)
    """Responses to each prompt. Accuracy is the mean over them (avg@k); with several there are pass@k and the majority
    vote besides."""
    temperature: float | None = number(None, minimum=0)
    """Divides the student's logits. 0: the most likely tokens (greedy). Null: `sampling.temperature`. With another
    distribution than that of training, reverse KL and entropy are not measured."""
    top_p: float | None = number(None, above=0, maximum=1)
    """As `sampling.top_p`, which null takes."""
    top_k: int | None = number(None, minimum=0)
    """As `sampling.top_k`, which null takes."""
    max_response_tokens: int | None = number(None, minimum=1)
    """A longer response is cut here. Null: `sampling.max_response_tokens`."""
    every_updates: int | None = number(None, minimum=1)
    """Evaluate after this many updates, and also before the first and after the last. Null: `evaluation.every_updates`."""
    exposure: bool = False
    """Measure exposure bias: the reverse KL by position, on the student's own prefixes and on prefixes that the teacher has
    written."""
    first_sample: ClassVar[int] = 0
    """The sample number, in the ids, of the first response to a prompt."""


@changing("free")
@dataclass
class EvaluationConfig:
    """Evaluation on held-out prompts, by the rollout actors that also train."""

    prompts: PromptsConfig | None = setting(None, "free")
    """The held-out prompts. Null: no evaluation. Accuracy is measured over those that have a reference answer; where none
    has one (`reference_field: null`), there is the reverse KL alone."""
    sets: dict[str, EvaluationSetConfig] = field(default_factory=dict)
    """More sets of held-out prompts, by names of your choice, beside `prompts` or in its place."""
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    """How a response is judged, in evaluations of `prompts` and for rewards."""
    verifiers: dict[str, VerifierConfig] = field(default_factory=dict)
    """The verifiers of prompts of these domains (`domain_field`, `prompts.sources.<name>.domain`), in place of `verifier`, and of
    that of a set."""
    every_updates: int = number(20, minimum=1)
    """Evaluate after this many updates, and also before the first and after the last."""
    max_response_tokens: int | None = number(None, minimum=1)
    """A longer response to `prompts` is cut here; sets have their own. Null: `sampling.max_response_tokens`."""
    teacher: bool = True
    """Measure the teacher's own greedy accuracy once, at the start, where held-out prompts have reference answers."""
    keep_trajectories: int = number(32, minimum=0)
    """Sampled trajectories to keep of each evaluation, for reading."""
    keep_training_trajectories: int = number(4, minimum=0, maximum=64)
    """Without held-out prompts: trajectories of training to keep after the first update, every `every_updates`, and the
    last, for reading. The teacher's log-probs are left out where its signal is `full` or `hidden`."""


@changing("free")
@dataclass
class WeightsConfig:
    """How weights travel from the learner to the rollout actors."""

    transport: Literal["object_store"] = "object_store"
    """The transport: Ray's object store."""
    encoding: Literal["dense", "delta"] = "dense"
    """`dense`: send all weights with every version. `delta`: send the changes since the last version, losslessly. At the
    learning rates of large models this is less than a tenth of the bytes; it costs processor time on both sides and a
    copy of the weights in host memory."""
    anchor_every: int = number(20, minimum=1)
    """With `delta`: send all weights after this many versions. A new actor starts from there."""
    bucket_mebibytes: int = number(256, minimum=1)
    """Size of a bucket, the unit that is put into the object store and pulled once by each node."""


@changing("free")
@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_updates: int = number(100, minimum=1)
    """Save after this many updates. The last update and an interrupted campaign are always saved."""
    keep_last: int = number(3, minimum=1)
    """Number of most recent checkpoints to keep."""
    keep_best: int = number(1, minimum=0)
    """Number of checkpoints to keep besides: the evaluated ones with the highest held-out accuracy, and of equal ones with
    the lowest reverse KL; where no held-out prompt has a reference answer, with the lowest reverse KL."""
    best_by: str | None = None
    """The evaluation set that decides which checkpoint is best, a name of `evaluation.sets`. Null: `evaluation.prompts`, or,
    without it, the first set."""
    grace_seconds: float | None = number(None, above=0)
    """Time between the signal that ends the campaign and its end by force, as the scheduler gives it (`--signal` of Slurm,
    `terminationGracePeriodSeconds` of Kubernetes). A checkpoint that takes longer, as measured before the first update, is
    refused then; a later one is told (docs/operating.md). Null: not known, nothing is compared."""
    mirror: str | None = None
    """URL of a directory (`s3://bucket/runs`, `gs://…`, any file system of fsspec). Checkpoints and records are copied there
    during training. If the run directory is lost, the campaign resumes from the copy."""


@changing("free")
@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Event files in `<run directory>/tensorboard`."""
    prometheus: bool = True
    """Gauges named `ray_understudy_…`, exported by Ray on each node."""
    wandb_project: str | None = None
    """A project of Weights & Biases. Needs wandb; the key comes from WANDB_API_KEY."""
    mlflow_uri: str | None = None
    """A tracking server of MLflow. Needs mlflow-skinny."""


@changing("free")
@dataclass
class AlertsConfig:
    """Who is called when a guard acts, an actor is lost, or the campaign ends (docs/alerts.md)."""

    command: str | None = None
    """A program and its arguments, run on the campaign's machine with the alert as JSON on its standard input."""
    webhook: str | None = None
    """A URL that the alert is sent to as JSON, by POST. One that holds a key comes from the environment:
    `${oc.env:ALERTS_URL}`."""
    timeout_seconds: float = number(10.0, above=0)
    """Time limit of one call of the program or the URL."""


@changing("free")
@dataclass
class RayConfig:
    """Which cluster the campaign runs on."""

    address: str | None = None
    """`auto`, or host:port of a running cluster. Null: inside a job, the job's cluster; otherwise a private local one."""
    object_store_mebibytes: int | None = number(None, minimum=80)
    """Object store of a private local cluster. Null: Ray's own choice, 30% of the memory."""
    max_restarts: int = number(5, minimum=0)
    """How often an actor is replaced within an hour before the campaign ends with an error."""
    hang_timeout_seconds: float = number(300.0, above=0)
    """An actor that does not answer for this long, or works without progress (an engine's step, a micro-batch, an answer
    from a server), is killed and replaced."""
    start_timeout_seconds: float = number(600.0, above=0)
    """An actor that makes no progress with its start for this long ends the campaign. Bytes of a download, bytes that are
    read or filled, and loaded weights are progress; waiting for room in the cluster at the start is not."""


@dataclass
class CampaignConfig:
    """One run of the loop, from a YAML file to a finished student."""

    name: str = setting("???", "free")
    """Name of the run directory, `<output_dir>/<name>`."""
    output_dir: str = setting("runs", "free")
    """Directory that holds run directories. Inside a submitted job it must be absolute."""
    seed: int = number(0, minimum=0, change="never")
    """Determines the order of prompts and the seed of every sample."""
    deterministic: bool = setting(False, "free")
    """Compute with kernels that repeat to the bit, also on GPUs: torch's deterministic algorithms in learner and teachers,
    vLLM's batch-invariant mode in engines (H100 and later). Slower, most of all in engines. CPUs repeat without it."""
    record: bool = setting(False, "free")
    """Keep every trajectory that is trained on, with its teachers' scores, in `<run directory>/record` (docs/replay.md)."""
    replay: str | None = setting(None, "same contents")
    """A run directory, or its `record`: train on what is recorded there, with the recorded scores. Rollout and teacher actors
    start only where an evaluation needs them. More `pipeline.updates` than are recorded begin further epochs."""
    student: StudentConfig = field(default_factory=StudentConfig)
    prompts: TrainingPromptsConfig = field(default_factory=TrainingPromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig | None = None
    """What answers the student between its turns. Null: nothing, each response is one turn."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teachers by name: one, or several that score different domains or form a mixture."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: dict[str, GuardConfig] = field(default_factory=default_guards)
    """Conditions on the metrics of every update, by names of your choice. Some exist by default
    (docs/guards.md): they warn, and those of weights that stand still for ten updates stop the campaign."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def run_dir(self) -> Path:
        """`<output_dir>/<name>`."""
        return Path(self.output_dir) / self.name

    @property
    def student_support_size(self) -> int:
        """Size K of the student's own top-k at each position, for teachers with signal student_topk; 0 without one."""
        return max((t.top_k for t in self.teachers.values() if t.signal == "student_topk"), default=0)

    @property
    def gives_rewards(self) -> bool:
        """Whether training uses rewards, which `evaluation.verifier` gives."""
        return gives_rewards(self.learner.objective)

    @property
    def judges_training(self) -> bool:
        """Whether a verifier gives the rewards of training: an environment gives its own."""
        return self.gives_rewards and self.environment is None

    @property
    def text_by(self) -> str:
        """Who writes the responses that are trained on: "student"; with `estimator: sft` "teacher", or "data", where the
        prompts come with responses."""
        writer = estimator_row(self.learner.objective.estimator).text_by
        return "data" if writer == "teacher" and self.prompts.has_responses else writer

    @property
    def needs_rollout(self) -> bool:
        """Whether rollout actors are started: the student writes, in training or in evaluations."""
        writes = self.replay is None and self.text_by == "student"
        return writes or self.evaluation.prompts is not None or bool(self.evaluation.sets)

    @property
    def started_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers whose actors are started; none, where what is trained on needs none, and no evaluation asks them anything."""
        evaluation = self.evaluation
        asked = evaluation.prompts is not None or any(
            self.is_scored(one) or (one.verifier is not None and evaluation.teacher) for one in evaluation.sets.values()
        )
        return self.teachers if asked or (self.replay is None and self.text_by != "data") else {}

    @property
    def best_by(self) -> str:
        """The evaluation set that decides which checkpoint is best; "" for `evaluation.prompts`."""
        if self.checkpoint.best_by is not None:
            return self.checkpoint.best_by
        return "" if self.evaluation.prompts is not None else next(iter(self.evaluation.sets), "")

    @property
    def replicas(self) -> dict[str, int]:
        """Role -> number of actors that are started. All teachers count as one role."""
        teachers = sum(teacher.replicas for teacher in self.teachers.values()) if self.started_teachers else 0
        rollout = self.rollout.replicas if self.needs_rollout else 0
        return {"rollout": rollout, "teacher": teachers, "learner": self.learner.replicas}

    @property
    def trajectories_per_update(self) -> int:
        """Trajectories of one update."""
        return self.pipeline.prompts_per_update * self.pipeline.samples_per_prompt

    def sampling_of(self, one: EvaluationSetConfig) -> SamplingConfig:
        """How the student answers an evaluation set; the temperature of a greedy one is that of training."""
        base = self.sampling
        return replace(
            base,
            temperature=one.temperature or base.temperature,
            top_p=base.top_p if one.top_p is None else one.top_p,
            top_k=base.top_k if one.top_k is None else one.top_k,
            max_response_tokens=one.max_response_tokens or base.max_response_tokens,
        )

    def is_scored(self, one: EvaluationSetConfig) -> bool:
        """Whether reverse KL and entropy are measured on an evaluation set: its responses are drawn from the policy."""
        own = replace(self.sampling_of(one), max_response_tokens=self.sampling.max_response_tokens)
        return one.temperature != 0 and own == self.sampling

    def limits_at(self, update: int | None) -> tuple[int, int | None]:
        """(tokens of a response, turns of an episode) at most in this update; update None: no limit follows a schedule. Turns
        None: `environment.max_turns`."""
        if update is None:
            return self.sampling.max_response_tokens, None
        turns = None if self.environment is None else self.environment.turns_at(update)
        return self.sampling.response_tokens_at(update), turns

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response that the student may write, in training or in an evaluation."""
        sets = [self.sampling_of(one).max_response_tokens for one in self.evaluation.sets.values()]
        return max(self.sampling.max_response_tokens, self.evaluated.sampling.max_response_tokens, *sets)

    @property
    def longest_scored(self) -> int:
        """The same of responses that teachers score."""
        sets = [one for one in self.evaluation.sets.values() if self.is_scored(one)]
        lengths = [self.sampling_of(one).max_response_tokens for one in sets]
        return max(self.sampling.max_response_tokens, self.evaluated.sampling.max_response_tokens, *lengths)

    @property
    def evaluated(self) -> "CampaignConfig":
        """The same campaign with the length limit of `evaluation.prompts`."""
        longest = self.evaluation.max_response_tokens or self.sampling.max_response_tokens
        return replace(self, sampling=replace(self.sampling, max_response_tokens=longest))


def prompt_sources(config: CampaignConfig) -> dict[str, SourceConfig]:
    """Configuration key -> source, of the prompts, the held-out prompts and the evaluation sets."""
    held_out = config.evaluation.prompts
    found = config.prompts.each_source("prompts")
    found = found | (held_out.each_source("evaluation.prompts") if held_out is not None else {})
    for name, one in config.evaluation.sets.items():
        found = found | one.prompts.each_source(f"evaluation.sets.{name}.prompts")
    return found
