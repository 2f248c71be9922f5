"""Joins or starts a Ray cluster, and checks that the campaign fits into it."""

import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import ray
from ray._private import services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.accelerator import DETERMINISTIC, DETERMINISTIC_ON_GPU, describe_gpu
from actors.errors import UserError
from actors.teacher.backends import refuse_without_gpu, teacher_gpus
from cluster.config import CampaignConfig
from cluster.fleet.gpu_division import least_gpus, refuse_overdrawn, section
from cluster.fleet.ray_actor import Resources, errors_of
from cluster.fleet.ray_private import first_line, loopback_as_it_is, private_cluster, shut_down, without_handlers_of_ray

CPU_THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""Without these, the threads of actors that share cores spin while they wait for each other: 25 to 60 times slower."""

LOOPBACK = "127.0.0.1"
PROBE_SECONDS = 5.0
GPU_CHECK_SECONDS = 60.0
PROBE_BYTES = 256 << 20
"""Size of the object with which the transfer between two nodes is measured."""
TOKEN_SETTINGS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""If one of these is set, the user has chosen how clusters are protected. Otherwise a private one gets its own token."""


def in_job() -> bool:
    """Whether this process is the entrypoint of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextmanager
def connected(config: CampaignConfig) -> Iterator[bool]:
    """Within the block, this process is connected to the campaign's cluster.

    Yields True for a private cluster, which is started here and ends with the block. UserError: nothing answers at
    `ray.address`, or this machine has no room for a private one. CampaignError: a private one does not start.
    """
    address = config.ray.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address != "local":
        _join(address, "ray.address" if config.ray.address else "RAY_ADDRESS", options)
        try:
            yield False
        finally:
            shut_down()
        return
    # Workers inherit this environment. As a runtime_env of each actor it would delay its start.
    os.environ.update({name: os.environ.get(name, value) for name, value in CPU_THREADS.items()})
    if not any(name in os.environ for name in TOKEN_SETTINGS):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would leave one in the home directory
    # Nothing of a private cluster is reachable from other machines.
    options |= {"include_dashboard": False, "_node_ip_address": LOOPBACK}
    if config.ray.object_store_mebibytes:
        options["object_store_memory"] = config.ray.object_store_mebibytes << 20
    with private_cluster(options, config.ray.object_store_mebibytes):
        yield True


def _join(address: str, key: str, options: dict[str, Any]) -> None:
    """Connects to a running cluster. UserError: nothing answers at the address, or it refuses us."""
    expected = "the address of a running Ray cluster"
    try:
        with without_handlers_of_ray(), loopback_as_it_is():
            probe(services.canonicalize_bootstrap_address(address) or address if "://" not in address else address)
            ray.init(address=address, **options)
    except (
        Exception
    ) as error:  # Ray raises anything from ValueError to a bare Exception for an address that is not right
        shut_down()
        raise UserError(key, f"{address} ({first_line(error)})", expected) from error


def probe(address: str, seconds: float = PROBE_SECONDS) -> None:
    """Asks whether a control store may be there: Ray itself would wait for minutes for one that is not.

    address: host:port; or ray://host:port, where only the connection is tried. ConnectionError, TimeoutError: it is not.
    """
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"no host:port: {address}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as connection:
            if scheme or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return
            # The beginning of HTTP/2, which gRPC speaks: a server answers with a frame of settings (type 4).
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            answer = connection.recv(9)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {seconds:g} s") from error
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from error
    if len(answer) < 4 or answer[3] != 4:
        raise ConnectionError("what answers there is not Ray")


def role_resources(config: CampaignConfig, cluster_gpus: float, *, private: bool) -> dict[str, tuple[int, Resources]]:
    """Role -> (replicas, resources of one). Roles are `rollout`, `teacher.<name>` and `learner`; one that has no work has no
    replicas.

    Where the configuration sets no number of GPUs, an actor gets 1 (or its tensor-parallel size) in a cluster with
    GPUs, and 0 in one without. In one with a single GPU these actors share evenly what the others leave of it. UserError: a
    teacher's signal needs a GPU.
    """
    wanted: dict[str, tuple[Any, float]] = {
        "rollout": (config.rollout, float(config.rollout.tensor_parallel_size)),
        **{f"teacher.{name}": (teacher, teacher_gpus(teacher)) for name, teacher in config.teachers.items()},
        "learner": (config.learner, 1.0),
        **({"environment": (config.environment, 0.0)} if config.environment is not None else {}),
    }
    ranks = config.learner.replicas  # several never share a GPU: a collective wants one for each
    count = {
        name: role.replicas
        if (
            config.needs_rollout if name in ("rollout", "environment") else name == "learner" or config.started_teachers
        )
        else 0
        for name, (role, _) in wanted.items()
    }
    sharing = sum(count[name] for name, (role, default) in wanted.items() if default and role.gpus_per_replica is None)
    rest = 1 - sum(count[name] * (role.gpus_per_replica or 0) for name, (role, _) in wanted.items())
    # Rounded down to hundredths, so that the sum is never above one GPU.
    share = int(100 * rest / sharing + 1e-6) / 100 if sharing and rest > 0 else 0

    def gpus(explicit: float | None, default: float) -> float:
        if explicit is not None:
            return explicit
        if cluster_gpus == 0:
            return 0.0
        # With nothing left for a share it is a whole one, which then does not fit: never a CPU in its place.
        return default if cluster_gpus > 1 or default == 0 or ranks > 1 else share or default

    def environment(role: Any, own: float) -> dict[str, str]:
        exact = DETERMINISTIC | (DETERMINISTIC_ON_GPU if own else {}) if config.deterministic else {}
        if not cluster_gpus:
            return exact | ({} if private else CPU_THREADS)
        # Not only in a cluster that was joined, where Ray sets it: the workers of a private one inherit CPU_THREADS.
        threads = {"OMP_NUM_THREADS": f"{int(role.cpus_per_replica)}"} if role.cpus_per_replica >= 2 else {}
        return exact | threads

    needed = {
        name: (
            count[name],
            Resources(role.cpus_per_replica, own, environment(role, own), role.resources),
        )
        for name, (role, default) in wanted.items()
        for own in [gpus(role.gpus_per_replica, default)]
    }
    for name, teacher in config.teachers.items():
        refuse_without_gpu(teacher, f"teachers.{name}", needed[f"teacher.{name}"][1].gpus)
    return needed


def check_fits(needed: dict[str, tuple[int, Resources]], there: dict[str, float], where: str) -> None:
    """Checks that all actors fit. UserError: they do not; it names the role that needs most.

    there: the cluster's resources by Ray's names: `CPU`, `GPU` and custom ones. where: the cluster's name in the message.
    """
    kinds = {name: name for _, resources in needed.values() for name in resources.custom}
    for kind, unit in {"CPU": "CPUs", "GPU": "GPUs", **kinds}.items():
        one = {
            name: {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}.get(kind, 0)
            for name, (_, resources) in needed.items()
        }
        asked = {name: needed[name][0] * amount for name, amount in one.items()}
        if sum(asked.values()) > there.get(kind, 0.0) + 1e-9:  # sums of fractions of a GPU have rounding errors
            largest = max(asked, key=lambda name: asked[name])
            key = "teachers" + largest.removeprefix("teacher") if largest.startswith("teacher.") else largest
            parts = ", ".join(f"{name} {needed[name][0]} x {one[name]:g}" for name in asked)
            smaller = f"; {key}.{unit.lower()}_per_replica may be a fraction" if kind in ("CPU", "GPU") else ""
            raise UserError(
                f"{key}.replicas",
                f"{sum(asked.values()):g} {unit} asked ({parts})",
                f"at most the {there.get(kind, 0.0):g} {unit} of {where}{smaller}",
            )
    actors = {name: (count, resources.gpus) for name, (count, resources) in needed.items()}
    if (least := least_gpus(actors)) > there.get("GPU", 0.0):
        parts = ", ".join(f"{name} {count} x {gpus:g}" for name, (count, gpus) in actors.items() if gpus)
        largest = max(actors, key=lambda name: actors[name][1] % 1)
        raise UserError(
            f"{section(largest)}.gpus_per_replica",
            f"{parts}, which take {least} GPUs, since a share lies on one",
            f"shares that fit the {there.get('GPU', 0.0):g} GPUs of {where}",
        )


class Room(NamedTuple):
    """The actors that a campaign can start with."""

    needed: dict[str, tuple[int, Resources]]
    """Role -> (replicas, resources of one), as the configuration asks."""
    begin: dict[str, int]
    """Role -> replicas to start with."""
    short: UserError | None = None
    """Why these are fewer than the configuration asks, if they are."""


def room_to_begin(config: CampaignConfig, private: bool) -> Room:
    """How many actors of each role there is room for now. UserError: not even one of each role fits, or an
    engine asks for more of a GPU than its share.

    A shared cluster may be short of nodes for a time: one was lost, or is still joining. The campaign then begins with
    one actor of each role and all ranks of the learner, and grows when there is room. A private cluster never grows.
    """
    there = ray.cluster_resources()
    needed = role_resources(config, there.get("GPU", 0.0), private=private)
    refuse_overdrawn(config, {role: one.gpus for role, (_, one) in needed.items()})
    try:
        check_fits(needed, there, "the cluster")
    except UserError as error:
        least = {role: (count if role == "learner" else min(count, 1), one) for role, (count, one) in needed.items()}
        if not private:
            with suppress(UserError):
                check_fits(least, there, "the cluster")
                return Room(needed, {role: count for role, (count, _) in least.items()}, error)
        raise
    return Room(needed, {role: count for role, (count, _) in needed.items()})


def check_gpus(needed: dict[str, tuple[int, Resources]], seconds: float = GPU_CHECK_SECONDS) -> tuple[str, int]:
    """Computes something on a GPU of each node, where actors reserve GPUs: what was found, and the bytes of the smallest GPU
    (0: none was asked). UserError: torch cannot.

    A node whose GPUs others hold for longer than `seconds` is not asked; its actors find out when they start.
    """
    if not any(resources.gpus for _, resources in needed.values()):
        return "", 0
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    ask: Any = ray.remote(describe_gpu)
    answers = [
        ask.options(
            num_cpus=0,
            num_gpus=0.01,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote("0.01 by Ray")
        for node in nodes
    ]
    ready, waiting = ray.wait(answers, num_returns=len(answers), timeout=seconds)
    with errors_of("the check of a GPU"):
        found = ray.get(ready)
    names = Counter(f"{name} ({size / 1e9:.0f} GB)" for name, size in found)
    for answer in waiting:
        ray.cancel(answer, force=True)
    busy = [f"{len(waiting)} nodes whose GPUs are in use were not asked"] if waiting else []
    told = ", ".join([*(f"{name} on {count} nodes" for name, count in names.items()), *busy])
    return told, min((size for _, size in found), default=0)


def transfer_rate(nbytes: int = PROBE_BYTES) -> float | None:
    """Bytes a second at which an object goes from one node's store to another's; None with a single node.

    Measured with one object between two nodes. Others that use the network at this time make it lower.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return None

    def task(function: Callable[..., Any], node: str) -> Any:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        remote: Any = ray.remote(function)
        return remote.options(num_cpus=0, max_retries=0, scheduling_strategy=there)

    make, size = task(_zeros, nodes[0]), task(_length, nodes[1])
    ray.get(size.remote(make.remote(1)))  # starts a worker on each
    seconds = {}
    for count in (1, nbytes):  # the first without bytes to speak of: what a task takes by itself
        made = make.remote(count)
        ray.wait([made], fetch_local=False)
        start = time.perf_counter()
        ray.get(size.remote(made))
        seconds[count] = time.perf_counter() - start
    return nbytes / max(seconds[nbytes] - seconds[1], 1e-3)


def _zeros(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes, np.uint8)


def _length(values: np.ndarray) -> int:
    return len(values)


def check_scaled(needed: dict[str, tuple[int, Resources]], role: str, replicas: int) -> None:
    """Checks that the connected cluster can hold the campaign with `replicas` actors of this role. UserError: not."""
    check_fits({**needed, role: (replicas, needed[role][1])}, ray.cluster_resources(), "the cluster")


def refuse_relative_output(config: CampaignConfig) -> None:
    """UserError: in a Ray job, `output_dir` is relative. A job's working directory is a temporary copy and lost with it."""
    if in_job() and not os.path.isabs(config.output_dir):
        raise UserError("output_dir", config.output_dir, "an absolute path: inside a job a relative one would be lost")
