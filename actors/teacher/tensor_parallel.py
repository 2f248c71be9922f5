"""A teacher whose layers are sharded over several GPUs of a node by transformers' own tensor-parallel plan.

Each rank is a process with a LocalTeacher. All ranks run the same calls, since every layer sums over the ranks. Rank 0 is
the actor's process and returns the results. If a rank failed, the others would wait for it forever in a collective, so
the actor's process exits, and the fleet replaces the actor.
"""

import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from actors.accelerator import torch_device
from actors.config import TeacherConfig
from actors.data.models import tensor_parallel_plan
from actors.errors import UserError
from actors.teacher.base import Teacher
from actors.teacher.local import LocalTeacher


class ShardedTeacher(Teacher):
    """`tensor_parallel_size` ranks on one node, called like one LocalTeacher."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """Starts the ranks and loads the model.

        UserError: the architecture has no plan, there are fewer visible GPUs than ranks, or see LocalTeacher.
        """
        super().__init__(config, key, vocabulary)
        size, gpus = config.tensor_parallel_size, torch.cuda.device_count()
        if torch_device() == "cuda" and gpus < size:
            raise UserError(f"{key}.tensor_parallel_size", size, f"at most {gpus}, the GPUs that its actor has")
        tensor_parallel_plan(config.model, config.trust_remote_code, f"{key}.model")
        self._pipes: list[Connection] = []
        # The folder is kept until the self-test in `_load` is over: NCCL meets in its file at the first collective.
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(1, size):
                ours, theirs = multiprocessing.get_context("spawn").Pipe()
                work = (rank, size, folder, config, key, vocabulary, theirs)
                multiprocessing.get_context("spawn").Process(target=_serve, args=work, daemon=True).start()
                theirs.close()  # with this end closed, a send to a rank that has died fails
                self._pipes.append(ours)
            self._teacher = _load(0, size, folder, config, key, vocabulary)

    def score(self, *arguments: Any, **keywords: Any) -> Any:
        """See Teacher."""
        return self._on_all("score", arguments, keywords)

    def generate(self, *arguments: Any, **keywords: Any) -> Any:
        """See LocalTeacher."""
        return self._on_all("generate", arguments, keywords)

    def sample(self, *arguments: Any, **keywords: Any) -> Any:
        """See WritingTeacher. All ranks seed torch alike, and so draw the same tokens."""
        return self._on_all("sample", arguments, keywords)

    def status(self) -> dict[str, float]:
        """See Teacher."""
        return self._teacher.status()

    def _on_all(self, method: str, arguments: tuple, keywords: dict[str, Any]) -> Any:
        """Calls the method on every rank, and returns the first rank's result."""
        try:
            # The other ranks first: this rank's own call waits for them in its first collective.
            for pipe in self._pipes:
                pipe.send((method, arguments, keywords))
            return getattr(self._teacher, method)(*arguments, **keywords)
        except Exception:
            # The other ranks may be inside a collective, which no exception can interrupt.
            traceback.print_exc()
            os._exit(13)


def _load(rank: int, size: int, folder: str, config: TeacherConfig, key: str, vocabulary: int | None) -> LocalTeacher:
    """Joins the other ranks, which meet in a file of `folder`, and loads this rank's part of the model."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    on_gpu = torch_device() == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would listen on all interfaces
    store = dist.FileStore(os.path.join(folder, "meeting"), size)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
    return LocalTeacher(config, key, vocabulary)


def _serve(
    rank: int,
    size: int,
    folder: str,
    config: TeacherConfig,
    key: str,
    vocabulary: int | None,
    calls: Connection,
) -> None:
    """The process of a further rank: repeats rank 0's calls until that process has gone."""
    # Without OMP_NUM_THREADS torch would use all cores in every rank.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    teacher = _load(rank, size, folder, config, key, vocabulary)
    while True:
        try:
            method, arguments, keywords = calls.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)  # an orderly exit would wait for the process group, whose first rank is gone
        getattr(teacher, method)(*arguments, **keywords)
