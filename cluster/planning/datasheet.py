"""What a stage would cost on hardware that one does not have yet: estimates from data sheets. Pure.

A forward pass takes 2 FLOPs for each parameter and token, a training step 6, 8 with gradient checkpointing (Kaplan et
al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). Sampling reads the weights and the cache of every running
sequence once a step: it is bound by memory (Pope et al. 2022, section 2). What is reached of the data sheet's figures
is taken from published runs (EFFICIENCY); a measured run is better than any of this.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """From the data sheet."""

    flops: float
    """Dense bfloat16 FLOPs a second."""
    bandwidth: float
    """Bytes a second of its memory."""
    memory: float
    """Bytes."""


GPUS = {
    "A100-40GB": Gpu(312e12, 1.555e12, 40e9),
    "A100-80GB": Gpu(312e12, 2.039e12, 80e9),
    "L40S": Gpu(362e12, 0.864e12, 48e9),
    "H100": Gpu(989e12, 3.35e12, 80e9),
    "H200": Gpu(989e12, 4.8e12, 141e9),
    "B200": Gpu(2250e12, 8.0e12, 180e9),
}
EFFICIENCY = {"prefill": 0.4, "decode": 0.6, "train": 0.35}
"""Share of the data sheet's figure that is reached: of FLOPs, of bandwidth, of FLOPs."""


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides time and memory."""

    parameters: float
    """All of them."""
    active_parameters: float
    """Those that one token meets; fewer than all in a mixture of experts."""
    cache_bytes_per_token: float
    """Keys and values of one token over all layers, 2 bytes each."""
    vocabulary: int
    hidden: int


@dataclass(frozen=True)
class Load:
    """What one update asks for."""

    trajectories: int
    prompt_tokens: float
    """Mean of a prompt."""
    response_tokens: float
    """Mean of a response."""


def rollout_seconds(load: Load, student: ModelSize, gpu: Gpu, gpus: float, concurrency: int) -> float:
    """Of one engine for one update: prompts at the speed of FLOPs, responses at that of memory or FLOPs.

    gpus: its tensor-parallel ranks. concurrency: sequences that run at a time, at most; the cache's room limits it too.
    """
    context = load.prompt_tokens + load.response_tokens
    running = max(1.0, min(concurrency, load.trajectories, cached_sequences(load, student, gpu, gpus)))
    read = 2 * student.parameters + running * (context - load.response_tokens / 2) * student.cache_bytes_per_token
    step = max(
        read / (gpu.bandwidth * gpus * EFFICIENCY["decode"]),
        2 * student.active_parameters * running / (gpu.flops * gpus * EFFICIENCY["prefill"]),
    )
    prefill = 2 * student.active_parameters * load.prompt_tokens / (gpu.flops * gpus * EFFICIENCY["prefill"])
    return load.trajectories * (prefill + load.response_tokens * step / running)


def cached_sequences(load: Load, student: ModelSize, gpu: Gpu, gpus: float) -> float:
    """Sequences of mean length whose keys and values fit beside the engine's weights, with 10% of the memory left."""
    room = 0.9 * gpu.memory * gpus - 2 * student.parameters
    return max(0.0, room) / ((load.prompt_tokens + load.response_tokens) * student.cache_bytes_per_token)


def teacher_seconds(load: Load, teacher: ModelSize, gpu: Gpu, gpus: float) -> float:
    """Of one teacher actor for one update: one forward pass over prompts and responses."""
    tokens = load.trajectories * (load.prompt_tokens + load.response_tokens)
    return 2 * teacher.active_parameters * tokens / (gpu.flops * gpus * EFFICIENCY["prefill"])


def learner_seconds(load: Load, student: ModelSize, gpu: Gpu, gpus: float, checkpointing: bool) -> float:
    """Of the learner for one update over all its ranks: forward and backward, and the forward again where it is
    recomputed."""
    tokens = load.trajectories * (load.prompt_tokens + load.response_tokens)
    passes = 8 if checkpointing else 6
    return passes * student.active_parameters * tokens / (gpu.flops * gpus * EFFICIENCY["train"])


def teacher_bytes(teacher: ModelSize, microbatch_tokens: int, head_chunk_tokens: int) -> tuple[float, float]:
    """(weights in bfloat16, activations: hidden states of a micro-batch and the head's chunk in float32)."""
    activations = 2 * 8 * microbatch_tokens * teacher.hidden + 2 * 4 * head_chunk_tokens * teacher.vocabulary
    return 2 * teacher.parameters, activations


def learner_bytes(student: ModelSize, ranks: int) -> tuple[float, float]:
    """Of one rank (its share of float32 weights, gradients and AdamW's two moments, 16 bytes a parameter; what it computes
    with: a bfloat16 copy, or, of several ranks, embedding and head, which they gather, see docs/scaling.md)."""
    gathered = 14 * student.vocabulary * student.hidden
    return 16 * student.parameters / ranks, 2 * student.parameters if ranks == 1 else gathered
