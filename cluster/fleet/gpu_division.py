"""How the roles of a campaign divide the GPUs of a node, and what an engine may take of its share. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from actors.errors import UserError
from actors.gpu_share import PROCESS_BYTES, is_share
from actors.teacher.backends import backend_of
from actors.vllm_options import share_options
from cluster.config import CampaignConfig


class Engine(NamedTuple):
    """A vLLM engine of a role."""

    role: str
    """`rollout` or `teacher.<name>`."""
    section: str
    """Its section of the configuration."""
    options: Mapping[str, Any]
    ranks: int


def engines(config: CampaignConfig) -> Iterator[Engine]:
    """The vLLM engines of a campaign."""
    rollout = config.rollout
    if rollout.backend == "vllm":
        yield Engine("rollout", "rollout", rollout.engine, rollout.tensor_parallel_size)
    for name, teacher in config.teachers.items():
        if backend_of(teacher, f"teachers.{name}").measures_gpu:
            yield Engine(f"teacher.{name}", f"teachers.{name}", teacher.engine, teacher.tensor_parallel_size)


def refuse_overdrawn(config: CampaignConfig, gpus: Mapping[str, float | None], card_bytes: int = 0) -> None:
    """UserError for an engine that asks for more of a GPU than its role's share, or has fewer GPUs than ranks.

    gpus: role -> GPUs of one actor; None: not known here. card_bytes: of a GPU; 0: not known here.
    """
    for engine in engines(config):
        own = gpus[engine.role]
        share_options(engine.options, own, card_bytes, f"{engine.section}.engine")
        if own and engine.ranks > 1 and own < engine.ranks:
            expected = f"at least {engine.ranks}, one for each rank ({engine.section}.tensor_parallel_size)"
            raise UserError(f"{engine.section}.gpus_per_replica", f"{own:g}", expected)


def division(actors: Mapping[str, tuple[int, float]], card_bytes: int) -> str:
    """Who has how much of a shared GPU, in one line; "" where no role shares one.

    actors: role -> (number of actors, GPUs of one).
    """
    rows = [
        f"{role} {count} x {gpus:g} ({gpus * card_bytes / 1e9:.1f} GB)"
        for role, (count, gpus) in actors.items()
        if is_share(gpus)
    ]
    each = f"each with {PROCESS_BYTES / 1e9:.1f} GB for its process"
    return f"a GPU of {card_bytes / 1e9:.1f} GB is shared: {', '.join(rows)}, {each}" if rows else ""
