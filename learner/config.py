"""Configuration of the learner: objective, trust region, optimiser and resources. Standard library only."""

from dataclasses import dataclass, field
from typing import Literal

from actors.config import changing, number, setting

TokenRole = Literal["end_of_sequence", "template"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


@changing("on request")
@dataclass
class TrustRegionConfig:
    """Keeps pi_theta near pi_old: adds beta * KL(pi_old || pi_theta) to the loss, and limits the KL of a step."""

    estimator: Literal["k1", "k3", "exact"] = "k3"
    """Estimator of the KL. `k3` and `k1` use the sampled tokens; `k3` is never negative, `k1` has the larger variance.
    `exact` sums over the vocabulary; it takes one more forward pass and keeps a hidden state for each token."""
    beta: float = number(0.0, minimum=0)
    """Weight of the forward KL. 0 measures it without adding it."""
    target_kl: float | None = number(None, above=0)
    """Beta doubles after an update whose KL is above 1.5 times this, and halves if it is below this / 1.5. Null: fixed. A target
    below the KL that steps of this learning rate have at any beta makes beta grow until the student learns nothing."""
    max_kl: float | None = number(None, above=0)
    """Hard limit: a step that exceeds it is scaled down by 1/2, 1/4, ... until the KL is within it, and ends the update."""


@changing("on request")
@dataclass
class MismatchConfig:
    """Corrects for differences between the sampling engine and the learner: the learner computes pi_old itself."""

    correction: Literal["none", "truncate", "mask"] = "none"
    """Weighs tokens by pi_old / pi_behaviour. `truncate` cuts the weight at `high`; `mask` leaves out tokens outside [low,
    high]. `none`: the ratio of the token alone, see `pi_old`."""
    level: Literal["token", "prefix", "sequence"] = "token"
    """Tokens whose ratios the weight multiplies: this token, the response up to it (for `full`, before it), or all."""
    low: float = number(0.5, minimum=0)
    high: float = number(2.0, above=0)
    pi_old: Literal["auto", "engine", "learner"] = "auto"
    """Where the clipped ratio starts, with `correction: none`. `engine`: from the log-prob that the engine recorded, whose
    rounding is then clipped as if it were a step. `learner`: from the learner's own log-prob at the start of the update;
    its ratio to the recorded one is a weight, cut at `high`, that no clip acts on. It costs a pass without gradients
    where an update has several steps. `auto`: `learner` where engine or learner compute in 16 bits, else `engine`."""


@changing("on request")
@dataclass
class ObjectiveConfig:
    """The on-policy distillation objective with a clipped ratio; docs/objective.md has formulas, sources and biases."""

    estimator: str = setting("immediate", "never")
    """The coefficient A_t of grad log pi(y_t): `trajectory`, `to_go`, `to_go_expected`, `discounted` or `immediate`. Or
    `full`, the gradient of the divergence itself over the teacher's support; `reward`, the reward alone (reinforcement
    learning); `sft`, -log pi on responses that the teacher wrote. Or package.module:function of your own
    (docs/extending.md)."""
    gamma: float = number(1.0, minimum=0, maximum=1)
    """Discount of later tokens, for `discounted` and `to_go_expected`. Only tokens that the student wrote are counted."""
    turn_discount: float = number(1.0, minimum=0, maximum=1)
    """Discount of later turns, for the same estimators: what a token costs k turns later counts this to the power k, beside
    `gamma`. 0: each turn by itself. A turn is what the student writes until an environment answers."""
    first_turns: int | None = number(None, minimum=1)
    """Only this many turns are trained on, from the first of a response. The others are context, as if someone else had
    written them. Null: all."""
    last_turns: int | None = number(None, minimum=1)
    """The same from the last turn."""
    baseline: Literal["none", "batch_mean", "group_mean", "exact_kl"] = "none"
    """Subtracted from A_t: its mean over the update's other trajectories at that position, over the prompt's other samples
    at that position, or the exact KL at the context (needs a distribution)."""
    divergence: str = setting("reverse_kl", "never")
    """For `full`, the divergence that is minimised at each context: `reverse_kl`, `forward_kl`, `jsd`, `skewed_forward_kl`,
    `skewed_reverse_kl`, `entropy_gated_kl`, or package.module:function of your own (docs/extending.md)."""
    cost: str | None = setting(None, "never")
    """package.module:function of your own that replaces the log-ratio log pi - log q in A_t, or with `full` in the
    expected cost (docs/extending.md). Null: the log-ratio."""
    mixture: float = number(0.5, above=0, maximum=1)
    """For `jsd` and the skewed divergences: beta, or the skew."""
    entropy_threshold: float = number(0.5, minimum=0)
    """For `entropy_gated_kl`: the forward KL is added where the teacher's entropy is above this many nats."""
    support: Literal["tail", "renormalised"] = "tail"
    """For a top-k teacher: merge the tokens outside the top k into one bucket, or drop them and renormalise."""
    recompute_log_ratio: bool = True
    """Take log pi in A_t from the current student. False: from the weights that sampled the token, which is biased as soon
    as the two differ."""
    truncated: Literal["train", "mask"] = "train"
    """Responses that were cut at the length limit. `mask`: their tokens are not trained on, and `truncated_masked` counts
    them (docs/objective.md)."""
    masked_token_ids: list[int] = field(default_factory=list)
    """Tokens that are not trained on, for example those where teacher and student differ by convention only."""
    masked_token_roles: list[TokenRole] = field(default_factory=list)
    """Roles of tokens that are not trained on. `end_of_sequence`: all tokens that end a response (a student that is never
    corrected there may forget to stop). `template`: the other special tokens that the chat template writes."""
    extrapolation: float = number(1.0, above=0)
    """Lambda of G-OPD: the teacher is q (q / pi_ref)^(lambda - 1). Above 1 it extrapolates beyond q; 1 is q itself."""
    reference_teacher: str | None = None
    """The teacher that is pi_ref, by its name under `teachers`. It scores every prompt and teaches none."""
    log_ratio_clip: float | None = number(None, above=0)
    """Bounds log pi - log q in A_t to [-this, this]. Biased where it acts."""
    log_ratio_power: float | None = number(None, above=0)
    """p: replaces the log-ratio by pi^p - q^p, which is in [-1, 1] (PowerOPD)."""
    proximal_weight: float = number(1.0, above=0, maximum=1)
    """w: the teacher is w q + (1 - w) pi, so the log-ratio is at most -log(1 - w). 1 is the teacher itself."""
    position_weight: float = number(0.0, minimum=0)
    """Weighs early tokens more: A_t is multiplied by 1 + this x the share of the response's summed
    absolute A_t that is at token t and later (IW-OPD)."""
    reward_weight: float = number(0.0, minimum=0)
    """1 / lambda, where the objective is the reverse KL to q exp(R / lambda). A_t gets this x the reward's cost: minus the
    difference between the response's reward and the mean of the prompt's other samples. `evaluation.verifier` gives the reward."""
    through_log_ratio: bool = False
    """Differentiate through the log-ratio too: the literal surrogate E[ratio (log pi - log q)]."""
    clip_low: float | None = number(0.2, minimum=0, maximum=1)
    """The ratio is clipped below at 1 - clip_low. Null: no clip."""
    clip_high: float | None = number(0.2, minimum=0)
    """The ratio is clipped above at 1 + clip_high. Null: no clip."""
    dual_clip: float | None = number(None, above=1)
    """Caps the cost at this many times A_t where A_t is positive."""
    aggregation: Aggregation = "token_mean"
    """How per-token losses become one number: the mean over tokens; the mean over sequences of their token means or token
    sums; or the mean over sequences of token sum / `aggregation_constant`."""
    aggregation_constant: float | None = number(None, above=0)
    """For `constant`: the number of tokens by which a sequence's sum is divided."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    trust_region: TrustRegionConfig = field(default_factory=TrustRegionConfig)


@changing("on request")
@dataclass
class OptimizerConfig:
    """AdamW with warm-up and a schedule."""

    learning_rate: float = number(1e-6, above=0)
    """Peak rate. A good rate for supervised training is usually ten times too high here."""
    beta1: float = number(0.9, minimum=0, maximum=1)
    beta2: float = number(0.99, minimum=0, maximum=1)
    epsilon: float = number(1e-8, above=0)
    weight_decay: float = number(0.0, minimum=0)
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    warmup_updates: int = number(5, minimum=0)
    """The rate grows linearly from 0 during these updates."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The rate after the warm-up, down to `final_fraction` at the campaign's last update."""
    final_fraction: float = number(0.0, minimum=0, maximum=1)
    """Share of the peak rate at the end of a `linear` or `cosine` schedule."""
    max_grad_norm: float = number(1.0, above=0)
    """Gradients with a larger global norm are scaled down to it."""


@dataclass
class LearnerConfig:
    """The learner, the only role that changes weights."""

    replicas: int = number(1, minimum=1, change="free")
    """Ranks of the learner. Weights, moments and every update are split between them; the result is that of one rank."""
    sequence_parallel: int = number(1, minimum=1, change="free")
    """This many consecutive ranks share each row of tokens: each holds a part of its activations, and in attention a part of
    the heads (docs/scaling.md). For long responses. Must divide `replicas` and the student's attention heads."""
    gpus_per_replica: float | None = number(None, minimum=0, change="free")
    """GPUs of one rank. Null: one, or a share if the cluster has a single GPU. Below 1: a share, to which the learner keeps.
    A whole number with several ranks."""
    cpus_per_replica: float = number(1.0, minimum=0, change="free")
    """CPU cores that Ray reserves for one rank."""
    resources: dict[str, float] = setting(dict, "free")
    """Custom Ray resources that one rank reserves, as in `rollout.resources`."""
    compute_dtype: Literal["float32", "bfloat16"] = setting("bfloat16", "on request")
    """Data type of the forward and backward pass. Master weights and optimiser state are always float32."""
    minibatches_per_update: int = number(1, minimum=1, change="on request")
    """An update's trajectories are split into this many parts, each with its own optimiser step."""
    epochs_per_update: int = number(1, minimum=1, change="on request")
    """Passes over an update's trajectories before the new weights are published."""
    microbatch_tokens: int = number(16384, minimum=1, change="free")
    """Tokens of one forward and backward pass, on all ranks that share it. Trajectories are packed end to end without
    padding; gradients accumulate over the passes of an optimiser step."""
    head_chunk_tokens: int = number(1024, minimum=1, change="free")
    """Tokens per application of the language-model head: [chunk, vocabulary] is the largest array. The backward pass computes
    the chunks of a micro-batch again, except the last: with one chunk, nothing is computed twice."""
    gradient_checkpointing: bool = setting(False, "free")
    """Recompute the layers' activations in the backward pass: less memory, about a third more time, the same numbers.
    (Dropout is off in the learner, with or without it.)"""
    compile: bool = setting(False, "free")
    """Compile the decoder layers with torch.compile: the first update is slower, later ones are faster. Rounding differs."""
    offload_optimizer: bool = setting(False, "free")
    """Keep AdamW's moments in host memory and copy those of one parameter at a time to the GPU for its step. Saves 8 bytes
    of GPU memory a parameter; each step copies the moments both ways. The result is bit-equal."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
