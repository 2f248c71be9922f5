"""`ray start --head` and `ray job submit`, token-protected, as the README says."""

import json
import secrets
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documented import commands_of
from tests.local_cluster import BIN, ROOT, LocalCluster

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A head as the README starts it, in a home where nothing has run."""
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


def test_the_readme_makes_a_token_that_only_its_user_can_read(cluster: LocalCluster) -> None:
    token = Path(cluster.environment["HOME"]) / ".ray" / "auth_token"
    assert len(token.read_text()) == 64 and token.stat().st_mode & 0o777 == 0o600
    assert cluster.environment["RAY_AUTH_MODE"] == "token"


def submit(cluster: LocalCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    [text] = [text for text in commands_of((ROOT / "README.md").read_text()) if text.startswith("understudy submit")]
    words = shlex.split(text.replace("http://127.0.0.1:8265", cluster.address))
    return cluster.understudy(*words[1:], *arguments)


def test_the_quickstart_runs_as_a_submitted_job(cluster: LocalCluster, tmp_path: Path) -> None:
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


def test_a_relative_output_directory_is_refused_inside_a_job(cluster: LocalCluster) -> None:
    ray = (BIN / "ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--")
    done = cluster.run(*ray, "python", "-m", "cluster", "run", "configs/quickstart.yaml", "output_dir=runs")
    assert done.returncode != 0
    assert "understudy: output_dir: found runs, expected an absolute path" in done.stdout


def test_the_exit_status_of_a_followed_job_is_that_of_its_run(cluster: LocalCluster, tmp_path: Path) -> None:
    done = submit(cluster, f"output_dir={tmp_path}", "student.model=/nowhere")
    assert done.returncode == 2
    assert "understudy: student.model: found /nowhere" in done.stdout


def test_a_wrong_token_is_one_clear_line(cluster: LocalCluster, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    own, cluster.environment = cluster.environment, cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(wrong)}
    try:
        done = submit(cluster, f"output_dir={tmp_path}")
    finally:
        cluster.environment = own
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"understudy: --address: found {cluster.address}")
