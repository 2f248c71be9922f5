"""Configuration of the learner: what is minimised, how far a step may go, and how it is taken. Standard library only."""

from dataclasses import dataclass, field
from typing import Literal

from actors.config import number

Estimator = Literal["immediate", "to_go", "full"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


@dataclass
class TrustRegionConfig:
    """Keeps pi_theta near pi_old: beta * KL(pi_old || pi_theta) is added to the loss."""

    beta: float = number(0.0, minimum=0)
    """Weight of the forward KL, estimated with k3 on the sampled tokens. 0 measures it without adding it."""


@dataclass
class ObjectiveConfig:
    """The clipped-ratio on-policy distillation objective."""

    estimator: Estimator = "immediate"
    """The coefficient A_t: `immediate` and `to_go` use the sampled token's log-ratio; `full` is the exact KL over the teacher's support."""
    clip_low: float = number(0.2, minimum=0, maximum=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = number(0.2, minimum=0)
    """The ratio is clipped above at 1 + clip_high."""
    aggregation: Aggregation = "token_mean"
    """How per-token losses become one number: mean over tokens, mean over sequences of their token means, or mean over sequences of their sums."""
    trust_region: TrustRegionConfig = field(default_factory=TrustRegionConfig)


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and a schedule."""

    learning_rate: float = number(1e-6, above=0)
    """Peak rate. What is right for supervised training is usually ten times too high here."""
    beta1: float = number(0.9, minimum=0, maximum=1)
    beta2: float = number(0.99, minimum=0, maximum=1)
    epsilon: float = number(1e-8, above=0)
    weight_decay: float = number(0.0, minimum=0)
    """Decoupled decay, on matrices only (not on norms and biases)."""
    warmup_updates: int = number(5, minimum=0)
    """The rate grows linearly from 0 during these updates."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The rate after the warm-up, down to `final_fraction` at the campaign's last update."""
    final_fraction: float = number(0.0, minimum=0, maximum=1)
    """What is left of the peak rate at the end of a `linear` or `cosine` schedule."""
    max_grad_norm: float = number(1.0, above=0)
    """Gradients are scaled down to this global norm."""


@dataclass
class LearnerConfig:
    """The one role that changes weights."""

    replicas: int = number(1, minimum=1, maximum=1)
    """Ranks of the learner. One device for now: larger models need the sharded learner."""
    gpus_per_replica: float | None = number(None, minimum=0)
    """GPUs of one rank. Null: one, or a share where the cluster has a single GPU."""
    cpus_per_replica: float = number(1.0, minimum=0)
    """CPU cores that Ray reserves for one rank."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the forward and backward pass. Master weights and optimiser state are always float32."""
    microbatch_tokens: int = number(16384, minimum=1)
    """Tokens of one forward and backward pass, padding included; gradients accumulate over the update's micro-batches."""
    head_chunk_tokens: int = number(1024, minimum=1)
    """Tokens that the language-model head is applied to at a time: [chunk, vocabulary] is the largest array."""
    gradient_checkpointing: bool = False
    """Recompute the layers' activations in the backward pass: less memory, a third more time."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
