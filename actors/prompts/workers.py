"""Processes that help to read many prompts: each makes the columns of one batch at a time.

A worker is started with `subprocess`, imports nothing of the user's program, and ends when its connection does, so none is left
over by a process that is killed. Parts come back in the order of the tasks, and so does the first error.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from actors.errors import CampaignError, UserError
from actors.prompts.parts import PartMaker, Task
from actors.prompts.record_batches import Records
from actors.prompts.spool import MANY, Part

MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from actors.prompts.workers import serve; serve(int(sys.argv[2]))"
)
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
"""Of a worker: there is one for each core."""
MOST_WORKERS = 16
"""Each has half a gigabyte in memory, most of it libraries that all share."""
CONTROL_GROUP = Path("/sys/fs/cgroup/cpu.max")


def serve(file_descriptor: int) -> None:
    """Answers tasks until the connection ends: with a part, an error of the user's, or None, for any other error."""
    os.dup2(2, 1)  # standard output belongs to the command that the user runs
    with contextlib.suppress(EOFError, OSError):
        connection = Connection(file_descriptor)
        maker: PartMaker = connection.recv()
        while True:
            task: Task = connection.recv()
            answer: Part | UserError | None = None
            try:
                answer = maker.part(task)
            except UserError as error:
                answer = error
            except Exception:
                answer = None
            connection.send(answer)


class Parts:
    """The parts of tasks: made here, and by `workers` other processes from MANY rows on. A context: its end ends them."""

    def __init__(self, maker: PartMaker, workers: int):
        """workers: 0: all parts are made here."""
        self._maker, self._count = maker, workers
        self._workers: list[_Worker] = []
        self._free: deque[_Worker] = deque()
        self._under_way: deque[tuple[_Worker, Task]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()

    def of(self, tasks: Iterator[Task]) -> Iterator[Part]:
        """The part of each task, in their order. The first error is raised after the parts before it, also where it is one
        of `tasks` itself."""
        rows = 0
        for task in tasks:
            yield self._maker.part(task)
            rows += len(task.batch)
            if rows >= MANY and self._count:
                yield from self._together(tasks)

    def _together(self, tasks: Iterator[Task]) -> Iterator[Part]:
        failed: Exception | None = None
        while True:
            try:
                task = next(tasks, None)
            except Exception as error:  # those before it are made first: one of them may be at fault, too
                task, failed = None, error
            if task is None:
                yield from self._made(0)
                if failed is not None:
                    raise failed
                return
            if isinstance(task.batch, Records):  # a function of the user's own may yield anything
                yield from self._made(0)
                yield self._maker.part(task)
                continue
            yield from self._made(self._count - 1)
            worker = self._free.popleft() if self._free else self._started()
            worker.send(task)
            self._under_way.append((worker, task))

    def _made(self, rest: int) -> Iterator[Part]:
        """Waits for the oldest tasks, until no more than `rest` are under way."""
        while len(self._under_way) > rest:
            worker, task = self._under_way.popleft()
            answer = worker.receive()
            self._free.append(worker)
            if isinstance(answer, UserError):
                raise answer
            yield self._maker.part(task) if answer is None else answer  # another error is raised here, as it is

    def _started(self) -> _Worker:
        self._workers.append(worker := _Worker(self._maker))
        return worker


class _Worker:
    """This end of one worker."""

    def __init__(self, maker: PartMaker):
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [sys.executable, "-c", MAIN, json.dumps(sys.path), str(theirs.fileno())]
            # A session of its own: a signal to the terminal's processes is the campaign's to handle.
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | ENVIRONMENT,
            )
        self._connection = Connection(ours.detach())
        self._unsent: PartMaker | None = maker

    def send(self, task: Task) -> None:
        """Gives it a task; it has none. CampaignError: the process has ended."""
        try:
            if self._unsent is not None:  # not earlier: it takes until the process has imported what it needs
                self._connection.send(self._unsent)
                self._unsent = None
            self._connection.send(task)
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Part | UserError | None:
        """The answer to its task. CampaignError: the process has ended."""
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error

    def _lost(self) -> CampaignError:
        status = self._process.wait()
        how = f"signal {-status}, as where memory is short" if status < 0 else f"exit status {status}"
        return CampaignError(f"a process that reads prompts has ended ({how}); the same command reads them again")

    def end(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def cores() -> int:
    """Cores that this process may use: of its affinity, and of its control group."""
    found = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no control groups, or no limit ("max")
        share, period = CONTROL_GROUP.read_text("ascii").split()
        found = min(found, max(1, int(share) // int(period)))
    return found
