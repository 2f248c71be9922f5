"""vLLM's own OpenAI-compatible server of a model, on this machine."""

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from tests.processes import below, kill
from tests.waiting import until


@contextmanager
def serving(model: str, name: str, *options: str) -> Iterator[str]:
    """Its URL. name: the model's, to those who ask."""
    with socket.socket() as kept:
        # Kept for as long as the server runs, which may share it: no other process is given this port meanwhile.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        port = kept.getsockname()[1]
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
            *("--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
            *("--max-logprobs", "20", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), *options),
        ]
        environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def answers() -> bool:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return True
            return False

        try:
            until(answers, "vLLM's server", lambda: process.poll() is None)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            if process.poll() is None:
                kill([*below(process.pid), psutil.Process(process.pid)])
