"""What a campaign has cost: the hours for which its actors held processors and GPUs. Pure."""

from collections.abc import Mapping
from typing import Any, Protocol


class Reserved(Protocol):
    """What one actor of a role holds."""

    @property
    def cpus(self) -> float:
        """Cores."""

    @property
    def gpus(self) -> float:
        """GPUs, or a share of one."""


def cost_of(
    actor_seconds: Mapping[str, Mapping[str, float]], reserved: Mapping[str, Reserved], tokens: int
) -> dict[str, Any]:
    """GPU and CPU hours of each role during the loop, and the tokens sampled for each GPU hour (None without GPUs).

    actor_seconds: actor -> state -> seconds, as cluster/records/utilisation.py measures them: together the time that the actor
    was there, whatever it did. reserved: what an actor of each role holds.
    """
    gpu_hours, cpu_hours = dict.fromkeys(reserved, 0.0), dict.fromkeys(reserved, 0.0)
    for actor, states in actor_seconds.items():
        role, hours = actor.rpartition("-")[0], sum(states.values()) / 3600
        gpu_hours[role] += hours * reserved[role].gpus
        cpu_hours[role] += hours * reserved[role].cpus
    total = sum(gpu_hours.values())
    return {
        "gpu_hours": gpu_hours,
        "cpu_hours": cpu_hours,
        "tokens_per_gpu_hour": tokens / total if total else None,
    }
