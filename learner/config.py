"""Configuration of the learner: what is minimised, how far a step may go, and how it is taken. Standard library only."""

from dataclasses import dataclass, field
from typing import Literal

from actors.config import number

TokenRole = Literal["end_of_sequence", "template"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


@dataclass
class TrustRegionConfig:
    """Keeps pi_theta near pi_old: beta * KL(pi_old || pi_theta) is added to the loss; a step that goes too far is undone."""

    estimator: Literal["k1", "k3", "exact"] = "k3"
    """How the KL is estimated: on the sampled tokens, by `k3`, which is never negative, or `k1`, with the larger
    variance; or `exact`, over the whole vocabulary, for one more forward pass and a hidden state kept for each token."""
    beta: float = number(0.0, minimum=0)
    """Weight of the forward KL. 0 measures it without adding it."""
    target_kl: float | None = number(None, above=0)
    """Beta is doubled after an update whose KL was above 1.5 targets, halved below a target / 1.5. Null: fixed."""
    max_kl: float | None = number(None, above=0)
    """Hard limit: a step after which the KL is above is taken back along its way until it holds, and ends the update."""


@dataclass
class MismatchConfig:
    """Corrects for the difference between the engine that sampled and the learner: pi_old is computed anew by the learner."""

    correction: Literal["none", "truncate", "mask"] = "none"
    """Weights pi_old / pi_behaviour: cut at `high`, or tokens outside of [low, high] left out. `none`: pi_old is what the
    engine recorded."""
    level: Literal["token", "prefix", "sequence"] = "token"
    """What the weight is the ratio of: the token, the response up to it (before it, for `full`), or all of it."""
    low: float = number(0.5, minimum=0)
    high: float = number(2.0, above=0)


@dataclass
class ObjectiveConfig:
    """The clipped-ratio on-policy distillation objective; formulas, sources and biases are in docs/objective.md."""

    estimator: str = "immediate"
    """The coefficient A_t of grad log pi(y_t): `trajectory`, `to_go`, `to_go_expected`, `discounted` or `immediate`. Or
    `full`, the gradient of the divergence itself over the teacher's support; `reward`, the reward alone (reinforcement
    learning); `sft`, responses that the teacher has written. Or package.module:function of your own (docs/extending.md)."""
    gamma: float = number(1.0, minimum=0, maximum=1)
    """Discount of later tokens, for `discounted` and `to_go_expected`."""
    baseline: Literal["none", "batch_mean", "group_mean", "exact_kl"] = "none"
    """What is subtracted from A_t: the mean of the other trajectories at that position, that of the other samples of the
    prompt, or the exact KL at the context (needs a distribution)."""
    divergence: str = "reverse_kl"
    """For `full`, what is minimised at each context: `reverse_kl`, `forward_kl`, `jsd`, `skewed_forward_kl`,
    `skewed_reverse_kl`, `entropy_gated_kl`, or package.module:function of your own (docs/extending.md)."""
    cost: str | None = None
    """package.module:function of your own that takes the place of the log-ratio log pi - log q in A_t, or, with `full`,
    of that in the expected cost (docs/extending.md). Null: the log-ratio."""
    mixture: float = number(0.5, above=0, maximum=1)
    """For `jsd` and the skewed divergences: beta, or the skew."""
    entropy_threshold: float = number(0.5, minimum=0)
    """For `entropy_gated_kl`: the forward KL is added where the teacher's entropy is above this many nats."""
    support: Literal["tail", "renormalised"] = "tail"
    """For a top-k teacher: what is outside is one bucket, or is left out and the rest made to add up to 1."""
    recompute_log_ratio: bool = True
    """The log-ratio in A_t is that of the current student. False: that of the weights that sampled the token, which is
    biased as soon as they differ."""
    masked_token_ids: list[int] = field(default_factory=list)
    """Tokens that are not trained on, for example those about which teacher and student disagree by convention only."""
    masked_token_roles: list[TokenRole] = field(default_factory=list)
    """The same by role: `end_of_sequence`, all tokens that end a response (a student that is never corrected there may
    forget to stop); `template`, the other special tokens that the chat template writes around messages."""
    extrapolation: float = number(1.0, above=0)
    """Lambda of G-OPD: the teacher is q (q / pi_ref)^(lambda - 1), which above 1 goes beyond q. 1 is q itself."""
    reference_teacher: str | None = None
    """The name under `teachers` that is pi_ref: it scores every prompt that is trained on, and teaches none."""
    log_ratio_clip: float | None = number(None, above=0)
    """Bounds |log pi - log q| in A_t. Biased where it acts."""
    log_ratio_power: float | None = number(None, above=0)
    """pi^p - q^p in place of the log-ratio: bounded by 1 (PowerOPD)."""
    proximal_weight: float = number(1.0, above=0, maximum=1)
    """The teacher is w q + (1 - w) pi: bounds the log-ratio by -log(1 - w). 1 is the teacher itself."""
    position_weight: float = number(0.0, minimum=0)
    """Early tokens count more: A_t is multiplied by 1 + this x the share of sum |A| that is still to come (IW-OPD)."""
    reward_weight: float = number(0.0, minimum=0)
    """1 / lambda of the objective KL(pi || q exp(R / lambda)): this x the cost of a response's reward (its distance from the
    other samples of the prompt) is added to A_t. The reward is what `evaluation.verifier` says of the response."""
    through_log_ratio: bool = False
    """Differentiate through the log-ratio too, the literal surrogate E[ratio (log pi - log q)]."""
    clip_low: float | None = number(0.2, minimum=0, maximum=1)
    """The ratio is clipped below at 1 - clip_low. Null: not at all."""
    clip_high: float | None = number(0.2, minimum=0)
    """The ratio is clipped above at 1 + clip_high. Null: not at all."""
    dual_clip: float | None = number(None, above=1)
    """Caps the cost at this many times A_t where A_t is positive."""
    aggregation: Aggregation = "token_mean"
    """How per-token losses become one number: mean over tokens, mean over sequences of their token means or of their
    sums, or those sums over a constant."""
    aggregation_constant: float | None = number(None, above=0)
    """For `constant`: tokens that a sequence's sum is divided by."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
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

    replicas: int = number(1, minimum=1)
    """Ranks of the learner, each with its share of weights, moments and of every update: the result is that of one."""
    gpus_per_replica: float | None = number(None, minimum=0)
    """GPUs of one rank. Null: one, or a share where the cluster has a single GPU. With several ranks, whole ones."""
    cpus_per_replica: float = number(1.0, minimum=0)
    """CPU cores that Ray reserves for one rank."""
    resources: dict[str, float] = field(default_factory=dict)
    """Further resources of Ray that one actor takes, as for `rollout.resources`."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the forward and backward pass. Master weights and optimiser state are always float32."""
    minibatches_per_update: int = number(1, minimum=1)
    """An update's trajectories are cut into this many parts, with an optimiser step on each."""
    epochs_per_update: int = number(1, minimum=1)
    """How often an update's trajectories are gone through before its weights are published."""
    microbatch_tokens: int = number(16384, minimum=1)
    """Tokens of one forward and backward pass, in which trajectories lie end to end, unpadded; gradients accumulate over
    the update's passes."""
    head_chunk_tokens: int = number(1024, minimum=1)
    """Tokens that the language-model head is applied to at a time: [chunk, vocabulary] is the largest array."""
    gradient_checkpointing: bool = False
    """Recompute the layers' activations in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the decoder layers with torch.compile: the first update takes longer, later ones less. Rounding differs."""
    offload_optimizer: bool = False
    """Keep AdamW's moments in host memory, and bring one parameter's at a time to the GPU for its step: 8 bytes a
    parameter less there, and the way there and back in each step. The result is the same to the bit."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
