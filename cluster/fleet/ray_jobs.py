"""Submits a campaign as a Ray job, and follows its output.

The job runs `python -m cluster run CONFIG key=value …` in a copy of the current directory, as
`ray job submit --working-dir . -- python -m cluster run …` does. In addition, mistakes are found before anything is
sent, and files that the job does not need are left out. A job that the cluster restarts resumes from its last
checkpoint, as every `run` does.
"""

import asyncio
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from actors.errors import CampaignError, UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.fleet.ray_private import first_line

EXCLUDES = [".git", ".venv", "venv", "runs", "checkpoints", "**/checkpoints", "**/__pycache__", "*.egg-info"]
"""Not sent, besides what git ignores: files that another machine cannot use, and run directories."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TRIES, PAUSE_SECONDS = 3, 1.0
NO_AGENT, AGENT_SECONDS = "No available agent", 60.0
"""What a head says that has just been started, and for how long it may say so."""
REQUEST_SECONDS = (5.0, 20.0)
"""Of one question: to connect, and between two parts of the answer."""
CHANGE_SECONDS = 300.0
"""For the answer to a job or a package: the head unpacks what it is sent."""
STOP_SECONDS = 1800.0
"""`checkpoint.grace_seconds`, where it is not set."""
LONGEST_ANSWER = 2000
"""Characters of an answer that a message may draw on."""
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
    with _one_line(client.get_address()):
        for other in client.list_jobs():
            if not other.status.is_terminal() and (other.metadata or {}).get("run_dir") == str(config.run_dir):
                raise UserError("name", f"{config.name}, which job {other.submission_id} is running", "another name")
        relative = Path(config_path).resolve().relative_to(here)
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "cluster", "run", str(relative), *overrides]),
            submission_id=f"understudy-{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            runtime_env={"working_dir": str(here), "excludes": EXCLUDES, "env_vars": _patience(config) | variables},
            metadata={"campaign": config.name, "run_dir": str(config.run_dir)},
        )
    return client, job


class PatientClient(JobSubmissionClient):
    """A client whose requests end: each has a time limit, and is tried again where the server answers with an error."""

    def _do_request(self, method: str, endpoint: str, **keywords: Any) -> Any:
        """The server's answer, JSON. UserError: there is none after TRIES tries."""
        asks = method == "GET"
        limit = (REQUEST_SECONDS[0], REQUEST_SECONDS[1] if asks else CHANGE_SECONDS)
        patience = time.monotonic() + AGENT_SECONDS
        left = TRIES
        while left:
            left -= 1
            try:
                answer = super()._do_request(method, endpoint, timeout=limit, **keywords)
            except requests.exceptions.Timeout as error:
                reason = f"no answer within {limit[1]:g} s"
                if not asks and isinstance(error, requests.exceptions.ReadTimeout):
                    break  # it may have taken the job: another try would be refused as a second one
            except requests.exceptions.RequestException as error:
                reason = f"{type(error).__name__}: {first_line(_root(error))}"
            else:
                reason = _fault_of(answer)
            if not reason:
                return answer
            if NO_AGENT in reason and time.monotonic() < patience:
                left += 1  # the head has only just been started
            if left:
                time.sleep(PAUSE_SECONDS)
        raise UserError(
            "--address", f"{self._address} ({reason}, {TRIES - left} times)", "the job server of a running Ray cluster"
        )


def _fault_of(answer: Any) -> str:
    """What is wrong with an answer, in a few words; empty for one of a job server, with an error for the caller or not."""
    said = " ".join(re.sub(r"<[^>]*>", " ", answer.text[:LONGEST_ANSWER]).split())[:200]
    if answer.status_code >= 500:
        return f"status {answer.status_code}: {said}"
    if answer.status_code == 200 and not answer.request.path_url.startswith("/api/packages"):
        try:
            answer.json()
        except ValueError:
            return f"no JSON: {said!r}"
    return ""


def _root(error: BaseException) -> Exception:
    """The first cause of an error of `requests`, which wraps it in several others."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    return reason if isinstance(reason, Exception) else Exception(str(error))


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the job server at `address`. UserError: nothing answers there as one, or it refuses the token."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    with _one_line(address):
        return PatientClient(address)


@contextmanager
def _one_line(address: str) -> Iterator[None]:
    """Turns errors of Ray's client within the block into a UserError."""
    try:
        yield
    except AuthenticationError as error:
        expected = "a cluster that takes our token (RAY_AUTH_MODE=token, and its token in ~/.ray/auth_token)"
        raise UserError("--address", f"{address}, which refuses it", expected) from error
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError, ImportError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            "--address", f"{address} ({reason[:300]})", "the job server of a running Ray cluster"
        ) from error


def follow(client: JobSubmissionClient, job: str) -> int:
    """Prints the job's output until the job ends; returns the exit status of its `run`."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    with _one_line(client.get_address()):
        while not (status := client.get_job_status(job)).is_terminal():
            try:
                asyncio.run(tail())
            except (RuntimeError, OSError, aiohttp.ClientError):  # the connection broke off; the job may still run
                time.sleep(PAUSE_SECONDS)
        details: JobDetails = client.get_job_info(job)
    if status in EXIT_STATUS:
        return EXIT_STATUS[status]
    if not details.driver_exit_code:
        raise CampaignError(f"job {job} failed: {details.message}")
    return details.driver_exit_code


def _patience(config: CampaignConfig) -> dict[str, str]:
    """How long `ray job stop` waits for a checkpoint before it kills the campaign; Ray itself waits for 3 seconds."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(config.checkpoint.grace_seconds or STOP_SECONDS))}


def _environment(names: Sequence[str]) -> dict[str, str]:
    variables = {}
    for entry in names:
        name, given, value = entry.partition("=")
        if not given and name not in os.environ:
            raise UserError("--env", name, "NAME=value, or the name of a variable that is set here")
        variables[name] = value if given else os.environ[name]
    return variables
