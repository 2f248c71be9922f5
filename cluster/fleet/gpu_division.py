"""How the roles of a campaign divide the GPUs of a node, and what an engine may take of its share. Pure."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from actors.errors import UserError
from actors.gpu_share import LARGEST_CARD_BYTES, PROCESS_BYTES, is_share
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


def engines(config: CampaignConfig) -> Iterator[Engine]:
    """The vLLM engines of a campaign."""
    rollout = config.rollout
    if rollout.backend == "vllm":
        yield Engine("rollout", "rollout", rollout.engine)
    for name, teacher in config.teachers.items():
        if backend_of(teacher, f"teachers.{name}").measures_gpu:
            yield Engine(f"teacher.{name}", f"teachers.{name}", teacher.engine)


def refuse_overdrawn(config: CampaignConfig, gpus: Mapping[str, float | None], card_bytes: int = 0) -> None:
    """UserError for a share that holds no process, an engine that asks for more of a GPU than its role's share, or an
    actor with fewer GPUs than tensor-parallel ranks.

    gpus: role -> GPUs of one actor; None: not known here. card_bytes: of a GPU; 0: not known here.
    """
    for role, own in gpus.items():
        nbytes = (own or 0) * (card_bytes or LARGEST_CARD_BYTES)
        if own is not None and is_share(own) and nbytes <= PROCESS_BYTES:
            of = f"a GPU of {card_bytes / 1e9:.1f} GB" if card_bytes else "the largest GPU there is"
            expected = f"more than the {PROCESS_BYTES / 1e9:.1f} GB that a process takes by itself"
            raise UserError(f"{section(role)}.gpus_per_replica", f"{own:g}, {nbytes / 1e6:.3g} MB of {of}", expected)
    for engine in engines(config):
        share_options(engine.options, gpus[engine.role], card_bytes, f"{engine.section}.engine")
    ranks = {f"teacher.{name}": teacher.tensor_parallel_size for name, teacher in config.teachers.items()}
    for role, size in {"rollout": config.rollout.tensor_parallel_size, **ranks}.items():
        if (own := gpus[role]) and own < size > 1:
            expected = f"at least {size}, one for each rank ({section(role)}.tensor_parallel_size)"
            raise UserError(f"{section(role)}.gpus_per_replica", f"{own:g}", expected)


def section(role: str) -> str:
    """The section of the configuration of a role."""
    return role.replace("teacher.", "teachers.", 1) if role.startswith("teacher.") else role


def least_gpus(actors: Mapping[str, tuple[int, float]]) -> int:
    """GPUs below whose number these actors cannot be placed: a share lies on one GPU, so two above a half need two.

    actors: role -> (number of actors, GPUs of one).
    """
    whole = sum(count * math.ceil(gpus) for count, gpus in actors.values() if gpus >= 1)
    shares = [gpus for count, gpus in actors.values() if is_share(gpus) for _ in range(count)]
    large = sum(share > 0.5 for share in shares)
    # Rounded, since sums of fractions have rounding errors.
    return whole + max(math.ceil(round(sum(shares), 6)), large)


def division(actors: Mapping[str, tuple[int, float]], card_bytes: int = 0) -> str:
    """Who has how much of a shared GPU, in one line; "" where no role shares one.

    actors: role -> (number of actors, GPUs of one). card_bytes: 0: not known.
    """
    rows = [
        f"{role} {count} x {gpus:g}" + (f" ({gpus * card_bytes / 1e9:.1f} GB)" if card_bytes else "")
        for role, (count, gpus) in actors.items()
        if count and is_share(gpus)
    ]
    if rows and not card_bytes:
        return f"{', '.join(rows)}: with all others at least {least_gpus(actors)} GPUs"
    each = f"each with {PROCESS_BYTES / 1e9:.1f} GB for its process"
    return f"a GPU of {card_bytes / 1e9:.1f} GB is shared: {', '.join(rows)}, {each}" if rows else ""
