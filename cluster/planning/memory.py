"""The memory of every role of a campaign, from its configuration and its models' config.json; refuses what cannot fit.

The arithmetic is in learner/memory_items.py. Nothing is loaded: a model without memory (device "meta") has the shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.accelerator import Card
from actors.config import TeacherConfig, publishes_adapter
from actors.data.contexts import engine_context
from actors.data.models import load_config
from actors.errors import UserError
from actors.teacher.backends import backend_of
from cluster.config import CampaignConfig
from learner.memory_items import (
    CACHE,
    Item,
    LearnerNumbers,
    ModelNumbers,
    engine_host_items,
    engine_items,
    host_items,
    learner_items,
    peak,
    teacher_items,
)

GB, MB = 1e9, 1e6
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LARGE_VERSION = 40e9
"""Bytes of a weight version above which Ray's object store, of 200 GB at most, is the wrong way."""
UTILISATION = 0.92
"""What vLLM takes of a card where `gpu_memory_utilization` is not set."""


@dataclass(frozen=True, slots=True)
class Role:
    """The memory of one actor, or of one rank, of a role."""

    name: str
    """`learner`, `rollout` or `teachers.<name>`: the beginning of its keys."""
    device: list[Item]
    """On each of its GPUs."""
    host: list[Item]
    gpus: float | None
    """GPUs of one actor as configured; None: as the cluster has them."""
    way_out: str
    """What to change where it does not fit."""
    key: str
    found: str
    """The key that decides how many GPUs share it, and its value."""
    note: str = ""

    def sentence(self, card: Card | None) -> str:
        """Every item, the sum at the moment when most is held, and what is beyond the card, if one is known.

        In GB, or all of it in MB where it is below 0.1 GB.
        """
        total, there = peak(self.device)
        unit = GB if total >= GB / 10 else MB
        text = f"{total / unit:.1f} {'GB' if unit == GB else 'MB'}: {_listed(there, unit)}"
        if card is not None:
            text += f"; of {card.nbytes / GB:.1f} GB ({card.name})"
            if total > card.nbytes:
                text += ", which may be too little"
        text += self.note
        if self.host:
            text += f"; host: {_listed(self.host, unit, as_they_come=True)}"
        return text

    def demand_room(self, card: Card) -> None:
        """UserError: what is certain to be held is more than the card has."""
        least, there = peak(self.device, certain=True)
        if least > card.nbytes:
            unit = GB if least >= GB / 10 else MB
            name = "GB" if unit == GB else "MB"
            raise UserError(
                self.key,
                f"{self.found}, with which each GPU holds {least / unit:.1f} {name} at least ({_listed(there, unit)})",
                f"at most {max(card.nbytes, 0) / unit:.1f} {name}, the memory of {card.name}: {self.way_out}",
            )


def _listed(items: list[Item], unit: float, *, as_they_come: bool = False) -> str:
    ordered = items if as_they_come else sorted(items, key=lambda item: -item.nbytes)
    return ", ".join(
        f"{item.name} {item.nbytes / unit:.1f}" if item.nbytes >= unit / 10 else f"{item.name} {item.nbytes / unit:.3f}"
        for item in ordered
    )


def _demand_cache(engine: Mapping[str, Any], items: list[Item], key: str, context: int) -> None:
    """UserError: `kv_cache_memory_bytes` is less than one sequence takes, so that vLLM would not start."""
    given = engine.get("kv_cache_memory_bytes")
    needed = next((item.nbytes for item in items if item.name == CACHE and item.certain), 0)
    if isinstance(given, int) and given < needed:
        expected = (
            f"at least {needed:,} ({needed / MB:,.1f} MB), the cache of one sequence of {context:,} tokens; or nothing"
        )
        raise UserError(f"{key}.kv_cache_memory_bytes", f"{given:,}", expected)


def _cache_item_bytes(engine: Mapping[str, Any], dtype: str) -> int:
    """Of one value in an engine's cache; of formats below 8 bits, 1."""
    given = str(engine.get("kv_cache_dtype", "auto"))
    return ITEM_BYTES.get(dtype if given == "auto" else given, 1)


def roles(config: CampaignConfig) -> list[Role]:
    """Every role whose models have files. UserError: config.json of a model cannot be read."""
    student, adapter = student_numbers(config)
    teachers = {
        name: model_numbers(teacher.source, teacher.trust_remote_code, f"teachers.{name}.model")
        for name, teacher in config.teachers.items()
        if backend_of(teacher).has_model_files
        # The files of a teacher that is not started may not be here; the learner has the head of one with `hidden`.
        and (name in config.started_teachers or teacher.signal == "hidden" or Path(teacher.source).exists())
    }
    first = [learner_role(config, student, adapter, teachers), rollout_role(config, student, adapter)]
    return first + [teacher_role(config, name, numbers) for name, numbers in teachers.items()]


def learner_role(
    config: CampaignConfig, student: ModelNumbers, adapter: int | None, teachers: Mapping[str, ModelNumbers]
) -> Role:
    """One rank of the learner."""
    numbers = learner_numbers(config, adapter, teachers)
    ranks, publish = config.learner.replicas, ITEM_BYTES[config.rollout.dtype]
    host = host_items(
        student,
        numbers,
        publish_bytes=publish,
        bucket=config.weights.bucket_mebibytes << 20,
        delta=config.weights.encoding == "delta",
    )
    note = ""
    if ranks > 1 and ranks % 2 == 0:
        copied, _ = peak(learner_items(student, replace(numbers, ranks=ranks // 2)))
        note = f"; on two nodes with a copy of the student each, where that fits, {copied / GB:.1f} GB"
    way = "more ranks" if config.learner.offload_optimizer else "more ranks, or learner.offload_optimizer: true"
    way += ", a smaller learner.microbatch_tokens"
    if config.student.lora is None:
        way += ", or adapters (student.lora)"
    return Role(
        "learner",
        learner_items(student, numbers),
        host,
        config.learner.gpus_per_replica,
        way,
        "learner.replicas",
        str(ranks),
        note,
    )


def learner_numbers(
    config: CampaignConfig, adapter: int | None, teachers: Mapping[str, ModelNumbers]
) -> LearnerNumbers:
    """What the memory of a rank depends on. adapter: parameters of adapters; None: all weights are trained."""
    scored = {} if config.text_by == "data" else config.teachers
    heads = {name: teachers[name].head for name, teacher in scored.items() if teacher.signal == "hidden"}
    return LearnerNumbers.of(
        config.learner,
        longest=config.sampling.max_response_tokens,  # the prompt is not known here
        averages=sum(teacher.ema_decay is not None for teacher in config.teachers.values()),
        adapter_parameters=adapter,
        teacher_heads_bytes=sum(ITEM_BYTES[config.teachers[name].dtype] * head for name, head in heads.items()),
        update_tokens=config.trajectories_per_update * config.sampling.max_response_tokens,
        score_bytes=_score_bytes(config, teachers),
    )


def _score_bytes(config: CampaignConfig, teachers: Mapping[str, ModelNumbers]) -> int:
    """Of one token on the learner's device: ids in 8 bytes and log-probs in 4, or states in the teacher's dtype."""

    def of(name: str, teacher: TeacherConfig) -> int:
        if teacher.signal in ("topk", "student_topk"):
            return 12 * teacher.top_k
        if name not in teachers or teacher.signal == "sampled":
            return 0
        wide = 4 * teachers[name].vocabulary
        return wide if teacher.signal == "full" else ITEM_BYTES[teacher.dtype] * teachers[name].hidden

    # Teachers of their own domains score different tokens.
    scored = {} if config.text_by == "data" else config.teachers
    own = [of(name, teacher) for name, teacher in scored.items() if teacher.domains]
    shared = [of(name, teacher) for name, teacher in scored.items() if not teacher.domains]
    return sum(shared) + max(own, default=0)


def rollout_role(config: CampaignConfig, student: ModelNumbers, adapter: int | None) -> Role:
    """One GPU of an engine: weights and the cache of one sequence; vLLM fills the rest of its share with cache."""
    rollout = config.rollout
    item = ITEM_BYTES[rollout.dtype]
    context = _context(config, config.student, "student.model", rollout.engine, "rollout.engine")
    device = engine_items(
        student,
        dtype_bytes=item,
        tensor_parallel=rollout.tensor_parallel_size,
        context=context,
        cache_bytes=_cache_item_bytes(rollout.engine, rollout.dtype),
        adapter_bytes=item * (adapter or 0),
    )
    if rollout.backend == "vllm":
        _demand_cache(rollout.engine, device, "rollout.engine", context)
    size = rollout.tensor_parallel_size
    host = engine_host_items(
        version_bytes(config, student, adapter),
        tensor_parallel=size if _stages(config) else 1,
        delta=config.weights.encoding == "delta",
        pinned=_stages(config) and rollout.gpus_per_replica != 0,
    )
    way = "a larger rollout.tensor_parallel_size, or a smaller rollout.engine.max_model_len"
    return Role(
        "rollout",
        device,
        host,
        rollout.gpus_per_replica,
        way,
        "rollout.tensor_parallel_size",
        str(size),
    )


def _stages(config: CampaignConfig) -> bool:
    """Whether engines copy a version before they load it: an adapter, and for an engine of the user's own, stays as it comes."""
    return config.rollout.backend == "vllm" and not publishes_adapter(config.student)


def shares_version(config: CampaignConfig) -> bool:
    """Whether all engines of a node read one copy of each weight version (actors/weights/node_staging.py)."""
    return _stages(config) and config.rollout.tensor_parallel_size > 1


def teacher_role(config: CampaignConfig, name: str, model: ModelNumbers) -> Role:
    """One GPU of a teacher."""
    teacher, key = config.teachers[name], f"teachers.{name}"
    item, size = ITEM_BYTES[teacher.dtype], teacher.tensor_parallel_size
    if teacher.backend == "transformers":
        device = teacher_items(
            model,
            dtype_bytes=item,
            tensor_parallel=size,
            pass_tokens=teacher.microbatch_tokens,
            head_chunk_tokens=teacher.head_chunk_tokens,
        )
    else:
        context = _context(config, teacher, f"{key}.model", teacher.engine, f"{key}.engine")
        device = engine_items(
            model,
            dtype_bytes=item,
            tensor_parallel=size,
            context=context,
            cache_bytes=_cache_item_bytes(teacher.engine, teacher.dtype),
            scored_tokens=teacher.microbatch_tokens,
        )
        if teacher.backend == "vllm":
            _demand_cache(teacher.engine, device, f"{key}.engine", context)
        if teacher.engine.get("quantization"):  # how many bits a weight has, its files say
            device = [part._replace(certain=False) for part in device]
    way = f"a larger {key}.tensor_parallel_size, or backend: vllm with engine: {{quantization: fp8}}"
    return Role(key, device, [], teacher.gpus_per_replica, way, f"{key}.tensor_parallel_size", str(size))


def version_bytes(config: CampaignConfig, student: ModelNumbers, adapter: int | None) -> int:
    """Bytes of one dense weight version."""
    published = adapter if adapter is not None and publishes_adapter(config.student) else student.parameters
    return ITEM_BYTES[config.rollout.dtype] * published


def versions_sentence(nbytes: int, rate: float | None) -> str:
    """What a dense version weighs, and where it is too large for the object store. rate: bytes a second between nodes."""
    text = f"{nbytes / GB:.1f} GB each"
    if nbytes <= LARGE_VERSION:
        return text
    text += f", above {LARGE_VERSION / GB:.0f} GB: Ray's object store, of 200 GB at most a node, holds two at a time"
    if rate is not None:
        text += f"; between two nodes here {rate / GB:.2f} GB/s, {nbytes / rate:.0f} s a version for each node"
    return text + (
        "; weights.encoding: delta sends less, and another transport is a class with the methods of WeightTransport and a "
        "row in TRANSPORTS (cluster/loop/weight_sync.py)"
    )


def _context(config: CampaignConfig, model: Any, key: str, engine: Mapping[str, Any], engine_key: str) -> int:
    """Tokens of the longest sequence that an engine has room for: `max_model_len`, or a response; prompts are not known."""
    if "max_model_len" not in engine:
        return config.longest_response
    return engine_context(load_config(model.source, model.trust_remote_code, key), engine, engine_key)


def student_numbers(config: CampaignConfig) -> tuple[ModelNumbers, int | None]:
    """(the student's numbers, parameters of its adapters or None)."""
    student = config.student
    network = network_without_memory(student.source, student.trust_remote_code, "student.model")
    numbers = _numbers(network)
    if student.lora is None:
        return numbers, None
    ends = student.lora.target_modules
    head = network.get_output_embeddings()
    layers = [
        layer
        for name, layer in network.named_modules()
        if _is_linear(layer) and layer is not head and (not ends or any(name.endswith(end) for end in ends))
    ]
    thin = sum(student.lora.rank * (layer.in_features + layer.out_features) for layer in layers)
    return numbers, thin + (sum(layer.out_features for layer in layers) if student.lora.dora else 0)


def _is_linear(layer: Any) -> bool:
    return hasattr(layer, "in_features") and hasattr(layer, "out_features")


def model_numbers(model: str, trust_remote_code: bool, key: str) -> ModelNumbers:
    """The numbers of a model, from config.json alone. UserError: it cannot be read."""
    return _numbers(network_without_memory(model, trust_remote_code, key))


def _numbers(network: Any) -> ModelNumbers:
    return ModelNumbers.of(network.config.get_text_config(), sum(p.numel() for p in network.parameters()))


def network_without_memory(model: str, trust_remote_code: bool, key: str) -> Any:
    """The model that config.json describes, on the device "meta": names and shapes. UserError: it cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code, key)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
