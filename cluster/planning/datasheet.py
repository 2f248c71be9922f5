"""Estimates seconds and memory of each stage on a GPU from its data sheet, before one has that GPU. Pure.

A forward pass takes 2 FLOPs for each parameter and token, a training step 6, 8 with gradient checkpointing (Kaplan et
al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). Sampling reads the weights and the cache of every running
sequence once a step: it is bound by memory (Pope et al. 2022, section 2). EFFICIENCY, the share of the data sheet's
figures that is reached, is from published runs. A measured run is more accurate than these estimates.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Figures of the data sheet."""

    flops: float
    """Dense bfloat16 FLOPs a second."""
    bandwidth: float
    """Memory bandwidth, bytes a second."""
    memory: float
    """Memory, bytes."""


GPUS = {
    "A100-40GB": Gpu(312e12, 1.555e12, 40e9),
    "A100-80GB": Gpu(312e12, 2.039e12, 80e9),
    "L40S": Gpu(362e12, 0.864e12, 48e9),
    "H100": Gpu(989e12, 3.35e12, 80e9),
    "H200": Gpu(989e12, 4.8e12, 141e9),
    "B200": Gpu(2250e12, 8.0e12, 180e9),
}
EFFICIENCY = {"prefill": 0.4, "decode": 0.6, "train": 0.35}
"""Share of the data sheet's figure that is reached: FLOPs in prefill and training, bandwidth in decoding."""


@dataclass(frozen=True)
class ModelSize:
    """The properties of a model that determine time and memory."""

    parameters: float
    """Number of all parameters."""
    active_parameters: float
    """Parameters that compute one token; fewer than all in a mixture of experts."""
    cache_bytes_per_token: float
    """Keys and values of one token over all layers, 2 bytes each."""
    vocabulary: int
    hidden: int


@dataclass(frozen=True)
class Load:
    """The work of one update."""

    trajectories: int
    prompt_tokens: float
    """Mean length of a prompt."""
    response_tokens: float
    """Mean length of a response."""


def rollout_seconds(load: Load, student: ModelSize, gpu: Gpu, gpus: float, concurrency: int) -> float:
    """Seconds of one engine for one update. Prompts are bound by FLOPs, responses by memory or FLOPs.

    gpus: its tensor-parallel ranks. concurrency: most sequences that run at a time; the cache's size limits them too.
    One decoding step takes max(bytes read / bandwidth, 2 x parameters x sequences / FLOPs); on average half of each
    response is in the cache.
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
    """Seconds of one teacher actor for one update: one forward pass over prompts and responses."""
    tokens = load.trajectories * (load.prompt_tokens + load.response_tokens)
    return 2 * teacher.active_parameters * tokens / (gpu.flops * gpus * EFFICIENCY["prefill"])


def learner_seconds(load: Load, student: ModelSize, gpu: Gpu, gpus: float, checkpointing: bool) -> float:
    """Seconds of the learner for one update on all its ranks: forward, backward, and with checkpointing the forward again."""
    tokens = load.trajectories * (load.prompt_tokens + load.response_tokens)
    passes = 8 if checkpointing else 6
    return passes * student.active_parameters * tokens / (gpu.flops * gpus * EFFICIENCY["train"])
