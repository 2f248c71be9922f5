"""A Ray cluster of several nodes on this machine, started with the commands of a page, by a user whose home is empty."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.documented import examples_in
from tests.processes import below, command_of, kill
from tests.waiting import PATIENCE_SECONDS, until

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}
"""A lost node refuses connections, which Ray notices in two seconds with these settings (fifteen with its own). A node that
is only slow, on a machine with more processes than cores, has ten seconds to answer."""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback device that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class LocalCluster:
    """A head, and the nodes that are added. `ray stop` would stop every Ray on the machine, so this class does not use it."""

    def __init__(self, folder: Path, page: str = "README.md"):
        """Starts the head as `page` says, and waits until its job server answers. folder: gets the home of its user."""
        self._folder, self._page = folder, page
        [before] = [text for text in examples_in("sh", page) if "ray start --head" in text]
        preparation, _, rest = before.partition("ray start --head")
        home = folder / "home"
        home.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(home),
            "PYTHONUNBUFFERED": "1",
        }
        """Of a client of this cluster, and of its nodes."""
        shown = self.run("bash", "-ec", preparation + "env -0")
        assert shown.returncode == 0, shown.stderr
        self.environment = dict(entry.split("=", 1) for entry in shown.stdout.split("\0") if entry)
        self._scratch = Path(tempfile.mkdtemp(prefix="nodes-"))  # short: paths of sockets end after 107 characters
        self._gcs, dashboard, client, self.metrics_port = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        """Of the job server."""
        self.nodes: list[psutil.Process] = []
        """`ray start --block` of each node, the head first."""
        self._start(
            *shlex.split("ray start --head" + rest.partition("\n")[0], comments=True),
            *(f"--port={self._gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            *(f"--ray-client-server-port={client}", f"--metrics-export-port={self.metrics_port}"),
            f"--system-config={json.dumps(QUICK_TO_NOTICE)}",
        )
        listing = ("ray", "job", "list", "--address", self.address)
        until(lambda: not self.run(*listing).returncode, "a head that answers", self.nodes[0].is_running)

    def add_node(self) -> None:
        """Starts one more node as the page says; not two at a time, since nodes of one IP address wait for each other for
        ever.

        Its temporary directory is its own: nodes that share one unpack a job's working directory into the same place, each
        removing it first, below the processes that another node has started there.
        """
        [command] = [text for text in examples_in("sh", self._page) if text.startswith("ray start --address")]
        where = (f"--address=127.0.0.1:{self._gcs}", f"--temp-dir={self._scratch / str(len(self.nodes))}")
        self._start(*shlex.split(command.replace("\\\n", " ")), *where)

    def run(self, *command: object, timeout: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
        """Runs a command as this cluster's operator, from the repository's root."""
        words = list(map(str, command))
        return subprocess.run(words, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def understudy(self, *arguments: object, timeout: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
        """Runs `understudy …`; again where the head answers, but the agent that starts jobs is not there yet."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            done = self.run(sys.executable, "-m", "cluster", *arguments, timeout=timeout)
            if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(2)

    def hosts(self, actor: str) -> list[psutil.Process]:
        """The nodes that have an actor of this class, by its name."""
        return [
            node for node in self.nodes if any(f"ray::{actor}" in " ".join(command_of(one)) for one in below(node.pid))
        ]

    def kill(self, node: psutil.Process) -> None:
        """Takes a node away as a power cut does: all its processes at once, without a word."""
        kill([node, *below(node.pid)])
        self.nodes.remove(node)

    def close(self) -> None:
        """Ends every node."""
        for node in reversed(list(self.nodes)):
            self.kill(node)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _start(self, *written: str) -> None:
        """Runs `ray start …` on ports that are free; of options that are given twice, the last counts."""
        command = [
            *(*written, "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"),
            *("--object-store-memory=200000000", "--dashboard-agent-listen-port=0"),
            *("--min-worker-port=0", "--max-worker-port=0"),
        ]
        output = self._folder / f"node-{len(self.nodes)}.log"
        with output.open("w") as log:
            process = psutil.Popen(command, env=self.environment, start_new_session=True, stdout=log, stderr=log)
        self.nodes.append(process)
        until(
            lambda: "Ray runtime started" in output.read_text(), f"a node; see {output}", lambda: process.poll() is None
        )
