"""Submits a campaign as a Ray job, and follows its output.

The job runs `python -m cluster run CONFIG key=value …` in a copy of the current directory, as
`ray job submit --working-dir . -- python -m cluster run …` does. In addition, mistakes are found before anything is
sent, and files that the job does not need are left out. A job that the cluster restarts resumes from its last
checkpoint, as every `run` does.
"""

import asyncio
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from actors.errors import CampaignError, UserError
from cluster.config_file import load_config

EXCLUDES = [".git", ".venv", "venv", "runs", "checkpoints", "**/checkpoints", "**/__pycache__", "*.egg-info"]
"""Not sent, besides what git ignores: files that another machine cannot use, and run directories."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
EXIT_STATUS = {JobStatus.SUCCEEDED: 0, JobStatus.STOPPED: 130}


def submit(
    config_path: str, overrides: Sequence[str], *, address: str | None, environment: Sequence[str]
) -> tuple[JobSubmissionClient, str]:
    """Submits the campaign; returns the client and the job's id.

    address: of the job server; by default RAY_API_SERVER_ADDRESS, else this machine. environment: `NAME=value`, or `NAME`
    for its value here. UserError: the configuration is wrong, a file would not travel, an environment variable is not
    set, another job runs this campaign, or no cluster answers.
    """
    config = load_config(config_path, overrides)
    here = Path.cwd()
    if not Path(config.output_dir).is_absolute():
        raise UserError("output_dir", config.output_dir, "an absolute path: a job's directory is a temporary copy")
    if not Path(config_path).resolve().is_relative_to(here):
        raise UserError("CONFIG", config_path, f"a file below {here}: that directory is what travels with the job")
    if not (here / "cluster" / "cli.py").exists():
        raise UserError("the working directory", here, "the repository's root: `cluster/` travels with the job")
    variables = _environment(environment)
    client = connect(address)
    for other in client.list_jobs():
        if not other.status.is_terminal() and (other.metadata or {}).get("run_dir") == str(config.run_dir):
            raise UserError("name", f"{config.name}, which job {other.submission_id} is running", "another name")
    relative = Path(config_path).resolve().relative_to(here)
    job = client.submit_job(
        entrypoint=shlex.join(["python", "-m", "cluster", "run", str(relative), *overrides]),
        submission_id=f"understudy-{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        runtime_env={"working_dir": str(here), "excludes": EXCLUDES, "env_vars": variables},
        metadata={"campaign": config.name, "run_dir": str(config.run_dir)},
    )
    return client, job


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the job server at `address`. UserError: nothing answers there, or it refuses the token."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        expected = "a cluster that takes our token (RAY_AUTH_MODE=token, and its token in RAY_AUTH_TOKEN_PATH)"
        raise UserError("--address", f"{address}, which refuses it", expected) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError("--address", f"{address} ({reason})", "the job server of a running Ray cluster") from error


def follow(client: JobSubmissionClient, job: str) -> int:
    """Prints the job's output until the job ends; returns the exit status of its `run`."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    while not (status := client.get_job_status(job)).is_terminal():
        try:
            asyncio.run(tail())
        except RuntimeError:  # the connection broke off; the job may still run
            time.sleep(1)
    details: JobDetails = client.get_job_info(job)
    if status in EXIT_STATUS:
        return EXIT_STATUS[status]
    if not details.driver_exit_code:
        raise CampaignError(f"job {job} failed: {details.message}")
    return details.driver_exit_code


def _environment(names: Sequence[str]) -> dict[str, str]:
    variables = {}
    for entry in names:
        name, given, value = entry.partition("=")
        if not given and name not in os.environ:
            raise UserError("--env", name, "NAME=value, or the name of a variable that is set here")
        variables[name] = value if given else os.environ[name]
    return variables
