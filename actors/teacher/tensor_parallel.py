"""A teacher whose layers are spread over several GPUs of a node by transformers' own tensor-parallel plan.

Every rank is a process with the whole of `TeacherActor`, given the same calls, so that all have the same part in each
layer's sums; the first one, the actor itself, answers. A rank that fails takes all of them with it, and whoever
supervises the actor replaces it: nothing could be said to those that wait for it.
"""

import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from actors.config import TeacherConfig
from actors.data.models import tensor_parallel_plan
from actors.errors import UserError
from actors.teacher.base import Teacher
from actors.teacher.local import TeacherActor


class ShardedTeacher(Teacher):
    """`tensor_parallel_size` ranks on one node, which is all that a caller sees of one teacher."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """As TeacherActor, of which each rank holds a part. UserError, too: the architecture has no plan, or fewer GPUs
        are visible than there are ranks."""
        size, gpus = config.tensor_parallel_size, torch.cuda.device_count()
        if torch.cuda.is_available() and gpus < size:
            raise UserError(f"{key}.tensor_parallel_size", size, f"at most {gpus}, the GPUs that its actor has")
        tensor_parallel_plan(config.model, config.trust_remote_code, f"{key}.model")
        self._pipes: list[Connection] = []
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(1, size):
                ours, theirs = multiprocessing.get_context("spawn").Pipe()
                work = (rank, size, folder, config, key, vocabulary, theirs)
                multiprocessing.get_context("spawn").Process(target=_follow, args=work, daemon=True).start()
                theirs.close()
                self._pipes.append(ours)
            self._teacher = _join(0, size, folder, config, key, vocabulary)

    def score(self, *arguments: Any, **keywords: Any) -> Any:
        """As TeacherActor.score."""
        return self._together("score", arguments, keywords)

    def generate(self, *arguments: Any, **keywords: Any) -> Any:
        """As TeacherActor.generate."""
        return self._together("generate", arguments, keywords)

    def sample(self, *arguments: Any, **keywords: Any) -> Any:
        """As TeacherActor.sample: the ranks draw the same numbers."""
        return self._together("sample", arguments, keywords)

    def status(self) -> dict[str, float]:
        """As TeacherActor.status."""
        return self._teacher.status()

    def _together(self, method: str, arguments: tuple, keywords: dict[str, Any]) -> Any:
        try:
            for pipe in self._pipes:
                pipe.send((method, arguments, keywords))
            return getattr(self._teacher, method)(*arguments, **keywords)
        except Exception:
            traceback.print_exc()
            os._exit(13)


def _join(rank: int, size: int, folder: str, config: TeacherConfig, key: str, vocabulary: int | None) -> TeacherActor:
    """Waits for the others, and loads this rank's part."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.path.join(folder, "meeting"), size)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
    return TeacherActor(config, key, vocabulary)


def _follow(
    rank: int,
    size: int,
    folder: str,
    config: TeacherConfig,
    key: str,
    vocabulary: int | None,
    calls: Connection,
) -> None:
    """A further rank: does what the first one does, until that has gone."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    teacher = _join(rank, size, folder, config, key, vocabulary)
    while True:
        try:
            method, arguments, keywords = calls.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)  # without waiting for a group that has lost its first rank
        getattr(teacher, method)(*arguments, **keywords)
