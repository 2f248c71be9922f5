"""`ray start --head` and `ray job submit`, token-protected, as the README says."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head of its own, with a token: (address of its job server, environment of a client)."""
    folder = tmp_path_factory.mktemp("cluster")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    command = [
        *(BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
        *(f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        f"--metrics-export-port={metrics}",
        *("--num-cpus=2", "--object-store-memory=200000000", "--disable-usage-stats"),
    ]
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 60
    while subprocess.run(
        [BIN / "ray", "job", "list", "--address", address], env=environment, capture_output=True
    ).returncode:
        assert head.poll() is None and time.monotonic() < deadline, "the head did not start"
        time.sleep(1)
    yield address, environment
    # Not `ray stop`: it would stop every Ray on the machine.
    processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)


def run(cluster: tuple[str, dict[str, str]], *command: str) -> subprocess.CompletedProcess[str]:
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, cwd=ROOT, env=cluster[1], capture_output=True, text=True, timeout=250)
        # The head answers a little before the agent that starts jobs is there.
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def submit(cluster: tuple[str, dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "cluster", "submit", "configs/quickstart.yaml")
    return run(cluster, *command, "--address", cluster[0], "--follow", *arguments)


@pytest.mark.integration
@pytest.mark.timeout(500)
def test_the_quickstart_runs_as_a_submitted_job(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    done = submit(
        cluster,
        f"output_dir={tmp_path}",
        "pipeline.updates=2",
        "pipeline.prompts_per_update=16",
        "evaluation.prompts.limit=16",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "update 2/2" in done.stdout
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert summary["updates"] == 2
    assert summary["ledger"]["trained"] == 32


@pytest.mark.integration
@pytest.mark.timeout(500)
def test_a_relative_output_directory_is_refused_inside_a_job(cluster: tuple[str, dict[str, str]]) -> None:
    ray = (str(BIN / "ray"), "job", "submit", "--address", cluster[0], "--working-dir", ".", "--")
    done = run(cluster, *ray, "python", "-m", "cluster", "run", "configs/quickstart.yaml", "output_dir=runs")
    assert done.returncode != 0
    assert "understudy: output_dir: found runs, expected an absolute path" in done.stdout


@pytest.mark.integration
@pytest.mark.timeout(500)
def test_the_exit_status_of_a_followed_job_is_that_of_its_run(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    done = submit(cluster, f"output_dir={tmp_path}", "student.model=/nowhere")
    assert done.returncode == 2
    assert "understudy: student.model: found /nowhere" in done.stdout


@pytest.mark.integration
@pytest.mark.timeout(500)
def test_a_wrong_token_is_one_clear_line(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = cluster
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    done = submit((address, environment | {"RAY_AUTH_TOKEN_PATH": str(wrong)}), f"output_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"understudy: --address: found {address}")
