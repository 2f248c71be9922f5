"""Starts processes that tests can kill. They are forked from a server that has done the slow imports and nothing else.

A fork of the test's own process does not work: once OpenMP has threads there, a copy crashes at its first matrix product.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("tests.light_campaign", "tests.tiny_updates", "tests.interrupted_campaign", "peft"),
        *("actors.weights.delta_codec", "transformers.models.qwen3.modeling_qwen3", "torch._dynamo"),
    ]
)


def start(body: Callable[..., None], *arguments: Any, log: Path | None = None) -> BaseProcess:
    """Runs a function of a module in a process of its own. Output and errors are appended to `log`.

    Exit code: 0, that of a SystemExit, 1 after another exception, or minus the signal that killed it.
    """
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # of the server, which starts once
        os.environ.pop("TORCH_COMPILE_DISABLE", None)  # vLLM's tests set it in the test's own process
        forkserver.ensure_running()
    process = CONTEXT.Process(target=_run, args=(body, arguments, log), daemon=True)
    process.start()
    return process


def _run(body: Callable[..., None], arguments: tuple, log: Path | None) -> None:
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
    try:
        body(*arguments)
        status: Any = 0
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        print(repr(error))
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
