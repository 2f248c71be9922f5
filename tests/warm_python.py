"""A Python whose processes start in no time: each is a fork of one that has imported torch, transformers and our package.

A campaign on Ray starts four processes or more, and each of them imports for four seconds. Tests of many campaigns would do
little else. What runs in this Python is a process of its own as ever, with its own environment, files, folder and exit
status; only the imports are there already.

    with warm_python(folder) as python:
        subprocess.run([python, "-m", "cluster", "run", "campaign.yaml"])
"""

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.waiting import until

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    *("torch", "torch._dynamo", "transformers", "transformers.models.qwen3.modeling_qwen3", "datasets", "peft"),
    *(
        "pyarrow.parquet",
        "openai",
        "tensorboardX",
        "cluster.cli",
        "learner.learner",
        "google.protobuf",
        "grpc",
        "aiohttp",
    ),
    *("actors.teacher.local", "actors.teacher.http", "actors.teacher.cross_tokenizer", "tests.light_engine"),
)
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
if "-c" in sys.argv[:3]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
order = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(order).to_bytes(8, "big")], [0, 1, 2])
server.sendall(order)
process = int(server.recv(20))
for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, _: os.kill(process, number))
os._exit(int(server.recv(20) or 1))
"""
"""The executable: hands its arguments, environment, folder and standard files over, and waits. A signal goes to the fork.
A program on the command line (`-c`) is run by Python itself: such small ones get files besides, and import little."""


@contextlib.contextmanager
def warm_python(folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The path of the executable, for the block. At its end all processes that it has started are killed.

    environment: of the first process. What a library reads when it is imported comes from here.
    """
    address, executable = str(folder / "warm"), folder / "python"
    executable.write_text(CLIENT.format(python=sys.executable, address=address))
    executable.chmod(0o755)
    command = [sys.executable, "-m", "tests.warm_python", address, str(executable)]
    server = subprocess.Popen(command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        until(Path(address).exists, "the first process", lambda: server.poll() is None)
        yield str(executable)
    finally:
        server.kill()  # which ends its children: see `_die_with_parent`
        server.wait()


def serve(address: str, executable: str) -> None:
    """Forks for each client that connects, until it is killed."""
    _die_with_parent()
    for name in PRELOADED:
        importlib.import_module(name)
    multiprocessing.set_executable(sys.executable)  # which hands over more files than the executable can
    gc.collect()
    gc.freeze()
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    clients: dict[int, socket.socket] = {}
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ)
    ready.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in ready.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                order, files = _received(client)
                process = os.fork()
                if not process:
                    signal.set_wakeup_fd(-1)
                    for other in (listener, woken, waker, client, *clients.values()):
                        other.close()
                    ready.close()
                    os._exit(_run(executable, *order, files=files))
                for file in files:
                    os.close(file)
                client.sendall(str(process).encode())
                clients[process] = client
                ready.register(client, selectors.EVENT_READ, process)
            elif key.fileobj is woken:
                woken.recv(1000)
                _bury(clients, ready)
            else:  # the client has died: so does what it asked for
                ready.unregister(key.fileobj)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(key.data, signal.SIGKILL)


def _received(client: socket.socket) -> tuple[list[Any], list[int]]:
    length, files, _, _ = socket.recv_fds(client, 8, 3)
    size, order = int.from_bytes(length, "big"), b""
    while len(order) < size:
        order += client.recv(size - len(order))
    return json.loads(order), files


def _bury(clients: dict[int, socket.socket], ready: selectors.BaseSelector) -> None:
    """Tells the clients of the processes that have ended their exit status."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            process, status = ended
            client = clients.pop(process)
            with contextlib.suppress(KeyError):
                ready.unregister(client)
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                client.sendall(str(code if code >= 0 else 128 - code).encode())
            client.close()


def _run(executable: str, arguments: list[str], environment: dict[str, str], folder: str, files: list[int]) -> int:
    """What `python ARGUMENTS` does: a file or `-m MODULE`, and its exit status.

    Ray's daemons start its workers by `sys.executable`, so theirs is this one. Others may hand over more files than it can.
    """
    _die_with_parent()
    os.setsid()  # Ray kills the process group of a worker that has died: it must not be that of all others
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    sys.stdout, sys.stderr = (open(file, "w", buffering=1, closefd=False) for file in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(":") if path]
    while arguments[0].startswith("-") and arguments[0] != "-m":
        arguments.pop(0)
    try:
        program = arguments[arguments[0] == "-m"]
        if "default_worker" not in program:
            sys.executable = executable
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, folder)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
        return code if isinstance(code, int) else int(code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        multiprocessing.util._exit_function()
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _die_with_parent() -> None:
    """Has the kernel kill this process when the one that forked it has ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    serve(*sys.argv[1:])
