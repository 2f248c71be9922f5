"""A job server that is away, slow, overloaded or something else is one line after a few tries."""

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.fleet import ray_jobs
from tests.waiting import until

VERSION = json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})


class Server:
    """Gives its answers in turn, the last one again and again: status and body; None: nothing, for a second."""

    def __init__(self, *answers: tuple[int, str] | None):
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                answer = answers[min(len(server.requests), len(answers)) - 1]
                if answer is None:
                    time.sleep(1)
                    return
                self.send_response(answer[0])
                self.end_headers()
                self.wfile.write(answer[1].encode())

            do_POST = do_GET

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ray_jobs, "PAUSE_SECONDS", 0.01)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    yield


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, "<html><body><h1>Internal\nError</h1></body></html>"), "status 500: Internal Error, 3 times"),
        ((503, ""), "status 503: , 3 times"),
        ((200, "<!doctype html><p>Welcome to nginx"), "no JSON: 'Welcome to nginx', 3 times"),
        ((200, "x" * 10_000_000), "no JSON: 'xxx"),
        (None, r"no answer within 0\.3 s, 3 times|Connection"),
    ],
    ids=["500", "503", "html", "long", "slow"],
)
def test_a_server_that_cannot_take_a_job_is_one_line_after_three_tries(
    answer: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(answer)
    if answer is None:
        monkeypatch.setattr(ray_jobs, "REQUEST_SECONDS", (0.3, 0.3))
    with pytest.raises(UserError, match=said) as told:
        ray_jobs.connect(server.address)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500
    assert str(told.value).endswith("expected the job server of a running Ray cluster")
    until(lambda: len(server.requests) >= 3, "the third request, which may come after nobody waits for its answer")
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, "none"), "Version check returned 404"),
        ((200, "[]"), "list indices"),
        ((200, "{}"), "KeyError: 'ray_version'"),
    ],
)
def test_an_answer_of_another_server_is_one_line(answer: Any, said: str) -> None:
    server = Server(answer)
    with pytest.raises(UserError, match=said):
        ray_jobs.connect(server.address)
    assert len(server.requests) == 1


def test_a_server_that_is_overloaded_for_a_moment_is_asked_again() -> None:
    server = Server((500, "busy"), None, (200, VERSION))
    assert ray_jobs.connect(server.address).get_address() == server.address
    assert len(server.requests) == 4  # the client asks twice


def test_nobody_at_the_address_is_one_line() -> None:
    server = Server((200, VERSION))
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match=r"--address: found .*refused.*3 times"):
        ray_jobs.connect(server.address)


def test_a_server_that_fails_after_the_first_answer_is_one_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server((200, VERSION), (200, VERSION), (500, "the agent is away"))
    root = ray_jobs.Path(__file__).resolve().parents[3]
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match="status 500: the agent is away, 3 times"):
        ray_jobs.submit("configs/quickstart.yaml", [f"output_dir={tmp_path}"], address=server.address, environment=[])


def test_a_job_that_is_stopped_has_the_time_to_write_a_checkpoint() -> None:
    """Ray itself kills a stopped job after 3 seconds."""
    config = CampaignConfig()
    assert ray_jobs._patience(config) == {"RAY_JOB_STOP_WAIT_TIME_S": "1800"}
    config.checkpoint.grace_seconds = 99.5
    assert ray_jobs._patience(config) == {"RAY_JOB_STOP_WAIT_TIME_S": "100"}
