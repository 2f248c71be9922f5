"""A private Ray cluster on this machine: started in sessions of its own, and nothing of it is left when the campaign ends.

Ray starts its daemons as children of this process. In the same session, a SIGTERM to the process group (`timeout`,
`scancel`, systemd) or a terminal that closes would end them before the checkpoint that they are needed for. So each is the
leader of a session, to which all that it starts belongs. A small process, the watchdog, ends these sessions when this process
is gone, whichever way it went, and removes the cluster's directories.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import node, services
from ray._private import utils as ray_utils

from actors.errors import CampaignError, UserError
from cluster.fleet.ray_actor import kill_tree
from cluster.interrupts import INTERRUPTS, say

TRIES = 3
"""Starts of the cluster. On a machine with more work than cores, Ray gives up after 30 seconds."""
SHUTDOWN_SECONDS = 20.0
"""For Ray's own end, before its processes are killed."""
LONGEST_DIRECTORY = 107 - len("/session_2026-11-28_17-09-53_645508_4194304/sockets/plasma_store")
"""The path of a socket has at most 107 bytes."""
LEAST_TEMPORARY_MEBIBYTES = 64
LEAST_STORE_MEBIBYTES = 80
SLOW_STORE = "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"
"""Ray's own switch: the object store may lie on a disk where shared memory is too small."""
SHARED_MEMORY = "/dev/shm"
UNUSED_SERVICES = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's Node that start what a private cluster does not need."""

WATCHDOG = """
import os, select, shutil, signal, sys
parent, sessions, folders, text = os.getppid(), set(), [], b""
while os.getppid() == parent:
    if select.select([0], [], [], 0.5)[0]:
        read = os.read(0, 65536)
        if not read:
            break
        *lines, text = (text + read).split(b"\\n")
        for kind, _, value in (line.partition(b" ") for line in lines):
            sessions.add(int(value)) if kind == b"session" else folders.append(value)
for _ in range(50):
    left = 0
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{int(entry)}/stat") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                left += 1
                os.kill(int(entry), signal.SIGKILL)
        except (ValueError, OSError):
            pass
    if not left:
        break
    select.select([], [], [], 0.1)
for folder in folders:
    shutil.rmtree(folder, ignore_errors=True)
"""


class Watchdog:
    """The process that ends sessions and removes directories once this process is gone, or has closed it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-IS", "-c", WATCHDOG],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, kind: str, value: object) -> None:
        """kind: `session` and its number, or `folder` and its path."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(f"{kind} {value}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """Ends what is left, and waits for it."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=SHUTDOWN_SECONDS)


@contextmanager
def private_cluster(options: dict[str, Any], object_store_mebibytes: int | None) -> Iterator[None]:
    """Within the block, this process is connected to a cluster of its own. options: of `ray.init`.

    UserError: shared memory or the directory for temporary files is too small. CampaignError: Ray does not start.
    """
    check_shared_memory(object_store_mebibytes)
    watchdog = Watchdog()
    INTERRUPTS.last_acts.append(watchdog.close)
    try:
        folder = session_folder()
        if folder is not None:
            watchdog.watch("folder", folder)
            options = {**options, "_temp_dir": str(folder / "ray")}  # which Ray opens to everybody; `folder` is ours
        start(lambda: _start(options, watchdog))
        yield
    finally:
        shut_down()
        watchdog.close()
        with suppress(ValueError):
            INTERRUPTS.last_acts.remove(watchdog.close)


def start(init: Callable[[], object], where: str = "on this machine", tries: int = TRIES) -> None:
    """Calls `init`, again where it fails: Ray raises a bare Exception when the machine is too busy.

    UserError: it refuses an option. CampaignError: it has failed `tries` times.
    """
    for left in reversed(range(tries)):
        try:
            init()
            return
        except (ValueError, TypeError) as error:
            raise UserError("ray", first_line(error), "settings with which Ray starts") from error
        except OSError as error:
            if not isinstance(error, ConnectionError | TimeoutError):
                raise UserError("TMPDIR", first_line(error), "a directory in which Ray can write") from error
            failure: Exception = error
        except Exception as error:  # Ray has no class for a start that took too long
            failure = error
        shut_down()
        if left:
            say(f"Ray did not start {where} ({first_line(failure)}); trying again")
    raise CampaignError(
        f"Ray did not start {where} in {tries} tries ({first_line(failure)}); is the machine overloaded, or out of memory?"
    ) from failure


def first_line(error: Exception) -> str:
    """The error's text in one line; its class where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def shut_down() -> None:
    """Disconnects from Ray, and ends a cluster that this process has started; waits SHUTDOWN_SECONDS at most."""
    ending = threading.Thread(target=ray.shutdown, daemon=True)  # it waits a minute for a daemon that is gone
    ending.start()
    ending.join(SHUTDOWN_SECONDS)


@contextmanager
def without_handlers_of_ray() -> Iterator[None]:
    """Within the block, Ray's Python code does not replace our handler of SIGTERM; after it, what its C++ code has replaced is ours again."""
    replace = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = replace
        INTERRUPTS.hear_again()


def _start(options: dict[str, Any], watchdog: Watchdog) -> None:
    """`ray.init` with daemons in sessions of their own; those of a start that fails are killed."""
    leaders: list[subprocess.Popen] = []

    class OwnSession(subprocess.Popen):
        def __init__(self, *arguments: Any, **keywords: Any):
            super().__init__(*arguments, **{**keywords, "start_new_session": True})
            leaders.append(self)
            watchdog.watch("session", self.pid)

    internals: Any = services
    popen = internals.ConsolePopen
    internals.ConsolePopen = OwnSession
    try:
        with without_handlers_of_ray(), loopback_as_it_is(), without_unused_services():
            ray.init(address="local", **options)
    except BaseException:
        for leader in leaders:
            kill_tree(leader.pid)
        raise
    finally:
        internals.ConsolePopen = popen


@contextmanager
def loopback_as_it_is() -> Iterator[None]:
    """Within the block, Ray does not replace 127.0.0.1 by the machine's address.

    With that address every service of a private cluster would listen on all interfaces, and a cluster that listens on the
    loopback device alone could not be joined. Ray 2.60 has no public setting for it; a test looks at which ports listen where.
    """
    internals: Any = services
    resolve = internals.resolve_ip_for_localhost
    internals.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        internals.resolve_ip_for_localhost = resolve


@contextmanager
def without_unused_services() -> Iterator[None]:
    """Within the block, Ray starts no API server, no autoscaler and no log monitor.

    Each is a Python process, and `ray.init` waits for the first. Without a dashboard the API server only sends statistics to
    Ray's makers; a private cluster never grows; and the log monitor feeds `log_to_driver`, which is off. Ray 2.60 has no
    public settings for them; without these names it starts them as ever.
    """
    internals: Any = node.Node
    before = {name: vars(internals)[name] for name in UNUSED_SERVICES if name in vars(internals)}
    for name in before:
        setattr(internals, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(internals, name, method)


def session_folder() -> Path | None:
    """A directory of our own for Ray's sockets and logs, private and with a short path; None where Ray's own will do.

    UserError: no directory for temporary files can be written to, or it is full.
    """
    key = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    try:
        # As Ray: `tempfile.gettempdir()` alone would pass over a TMPDIR that is full.
        default = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir(), "ray")
        default.mkdir(parents=True, exist_ok=True)
        if len(os.fsencode(default)) <= LONGEST_DIRECTORY:
            _check_room(default, key)
            return None
    except OSError as error:
        raise UserError(key, first_line(error), "a directory for temporary files in which Ray can write") from error
    refused = ""
    for place in ("/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR") or "/run", SHARED_MEMORY):
        try:
            folder = Path(tempfile.mkdtemp(prefix="us-", dir=place))
            _check_room(folder, place)
            return folder
        except (OSError, UserError) as error:
            refused += f"; {place}: {first_line(error)}"
    raise UserError(
        key, f"{default.parent} with {len(str(default.parent))} characters", f"at most {LONGEST_DIRECTORY - 4}{refused}"
    )


def _check_room(folder: Path, key: str) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 16))
        file.flush()
    free = shutil.disk_usage(folder).free >> 20
    if free < LEAST_TEMPORARY_MEBIBYTES:
        raise UserError(
            key, f"{folder} with {free} MiB of room", f"at least {LEAST_TEMPORARY_MEBIBYTES} MiB for Ray's files"
        )


def check_shared_memory(wanted_mebibytes: int | None) -> None:
    """Looks whether the object store fits into shared memory, where Ray would put it on a disk without a word.

    A container often has 64 MiB there: if the configuration names no size, the store lies on a disk, and a line says so.
    UserError: the configuration names a size that does not fit.
    """
    if os.environ.get(SLOW_STORE) or not os.path.isdir(SHARED_MEMORY):
        return
    free = shutil.disk_usage(SHARED_MEMORY).free >> 20
    way_out = f"`docker run --shm-size=2g`, or remove files from {SHARED_MEMORY}"
    if wanted_mebibytes is None:
        # Ray's own choice is 95% of the room there, where that is less than 30% of the memory.
        if free * 0.95 < LEAST_STORE_MEBIBYTES:
            os.environ[SLOW_STORE] = "1"
            say(
                f"{SHARED_MEMORY} has {free} MiB of room, so Ray's object store lies on a disk, which is slower: {way_out}"
            )
    elif free < wanted_mebibytes:
        raise UserError(
            "ray.object_store_mebibytes",
            f"{wanted_mebibytes}, and {SHARED_MEMORY} with {free} MiB of room",
            f"room for {wanted_mebibytes} MiB there ({way_out}), or {SLOW_STORE}=1 for an object store on a disk",
        )
