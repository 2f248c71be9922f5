"""The plan of a run as it was, from what it has measured: one calculation for `plan` and `status`."""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from actors.teacher.backends import teacher_gpus
from cluster.config import CampaignConfig
from cluster.planning.throughput import Plan, Stage, environments, mean_of, measured


def gpus_of(config: CampaignConfig) -> dict[str, float]:
    """Role -> GPUs of one actor, where each actor has its own. With several teachers, the largest number; without one 0."""

    def of(explicit: float | None, default: float) -> float:
        return default if explicit is None else explicit

    return {
        "rollout": of(config.rollout.gpus_per_replica, config.rollout.tensor_parallel_size),
        "teacher": max((of(one.gpus_per_replica, teacher_gpus(one)) for one in config.teachers.values()), default=0.0),
        "learner": of(config.learner.gpus_per_replica, 1.0),
    }


def plan_of_run(
    config: CampaignConfig,
    summary: Mapping[str, Any],
    replicas: Mapping[str, float],
    metrics: Sequence[Mapping[str, Any]],
    live: Mapping[str, Any],
) -> Plan:
    """The plan of a run with this configuration.

    summary: `updates`, `busy` and `loop_seconds` of these updates, and, of a run that has ended, `cost`. replicas: role -> actors.
    metrics: the lines of these updates. live: the content of status.json, {} without it. ValueError: see `measured`.
    """
    thinking = mean_of(metrics, "environment_seconds_mean")
    return measured(
        summary,
        {role: count for role, count in replicas.items() if role in summary["busy"]},
        gpus_of(config),
        overlapped=config.pipeline.max_staleness > 0,
        publish_seconds=mean_of(metrics, "publish_seconds"),
        more=[environments_of(config, thinking)] if thinking else [],
        cores=shared_cores(summary, live),
    )


def environments_of(config: CampaignConfig, seconds_of_each: float) -> Stage:
    """The stage of this campaign's environments, for which an episode waits for so long."""
    replicas = config.environment.replicas if config.environment is not None else 1
    return environments(seconds_of_each, config.trajectories_per_update, config.pipeline.max_staleness, replicas)


def shared_cores(summary: Mapping[str, Any], live: Mapping[str, Any]) -> int | None:
    """Cores for the actors of a run that computes on this machine without a GPU: all but one, which the campaign process and Ray
    take. None: it has GPUs, or is elsewhere."""
    # Release 0.2 wrote no GPUs into status.json; the hours are those of a run that has ended.
    gpus = live.get("gpus") or (summary.get("cost") or {}).get("gpu_hours")
    if not gpus or any(gpus.values()) or live.get("host") != socket.gethostname():
        return None
    return max((os.cpu_count() or 1) - 1, 1)
