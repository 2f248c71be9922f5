"""What a new actor waits for: a node that is large enough, room on the nodes that there are, or only its start.

Ray calls all three "pending". The judgement is pure; two functions ask the cluster.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private import state as cluster_state

Amounts = Mapping[str, float]
"""Resource -> amount, by Ray's names: `CPU`, `GPU` and custom ones."""
MOST_HOLDERS = 4
"""Jobs that a message names."""


def shortage(bundles: Sequence[Amounts], total: Iterable[Amounts], available: Iterable[Amounts]) -> str:
    """Why there is no room for these bundles, in one line; "" where there is: then they wait for their start only.

    bundles: alike. A bundle is on one node. total, available: of each node.
    """
    kinds, nodes, free = sorted(bundles[0]), list(total), list(available)
    if not _fit(bundles, nodes):
        largest = ", ".join(f"{max((node.get(k, 0.0) for node in nodes), default=0.0):g} {k}" for k in kinds)
        return f"no node is large enough, the largest have {largest}"
    if not _fit(bundles, free):
        amounts = (f"{_sum(free, kind):g} of {_sum(nodes, kind):g} {kind}" for kind in kinds)
        return f"{', '.join(amounts)} are free"
    return ""


def _sum(nodes: Iterable[Amounts], kind: str) -> float:
    return round(sum(node.get(kind, 0.0) for node in nodes), 3)


def needs(bundles: Sequence[Amounts]) -> str:
    """What these bundles need, for a message."""
    one = ", ".join(f"{amount:g} {kind}" for kind, amount in bundles[0].items())
    return f"{len(bundles)} times {one}" if len(bundles) > 1 else one


def _fit(bundles: Sequence[Amounts], nodes: Sequence[Amounts]) -> bool:
    """Whether the bundles, which are alike, find room on the nodes together."""
    places = 0
    for node in nodes:
        # The tolerance is for sums of fractions of a GPU.
        shares = [(node.get(kind, 0.0) + 1e-6) // amount for kind, amount in bundles[0].items() if amount]
        places += int(min(shares, default=len(bundles)))
    return places >= len(bundles)


def shortage_now(bundles: Sequence[Amounts]) -> str:
    """`shortage` in the connected cluster. It asks the control store, and blocks."""
    total, available = cluster_state.total_resources_per_node(), cluster_state.available_resources_per_node()
    return shortage(bundles, total.values(), available.values())


def holders() -> str:
    """Whose actors hold the room of the connected cluster, in one line; "" if nobody's. It blocks."""
    return described(cluster_state.actors().values(), ray.get_runtime_context().get_job_id(), cluster_state.jobs())


def described(actors: Iterable[Mapping[str, Any]], own_job: str, jobs: Iterable[Mapping[str, Any]]) -> str:
    """Living actors by job, those of other jobs first. actors, jobs: as Ray's state has them."""
    by_job: dict[str, Counter[str]] = {}
    for actor in actors:
        if actor["State"] == "ALIVE":
            by_job.setdefault(actor["JobID"], Counter())[actor["ActorClassName"].rpartition(".")[2]] += 1
    drivers = {job["JobID"]: f", process {job['DriverPid']} on {job['DriverIPAddress']}" for job in jobs}
    lines = []
    for job, classes in sorted(by_job.items(), key=lambda pair: (pair[0] == own_job, -pair[1].total())):
        listed = ", ".join(f"{count} {name}" for name, count in classes.most_common())
        whose = "this campaign" if job == own_job else f"job {job}{drivers.get(job, '')}"
        lines.append(f"{whose}: {listed}")
    more = [f"{len(lines) - MOST_HOLDERS} more jobs"] if len(lines) > MOST_HOLDERS else []
    return "; ".join([*lines[:MOST_HOLDERS], *more])
