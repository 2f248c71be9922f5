"""An HTTP teacher, and servers that fail in many ways. Their log-probs are made up, a function of the tokens."""

import asyncio
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from aiohttp import web

import actors.teacher.http as http
from actors.config import TeacherConfig
from actors.errors import CampaignError, UserError
from actors.teacher.http import HttpTeacher
from actors.trajectory import Trajectories, offsets_of

Fault = Callable[[dict[str, Any]], web.StreamResponse | None]


def logprob(before: int, token: int) -> float:
    return -0.1 - ((7 * before + token) % 11) / 4


class Server:
    """Answers in one of the two dialects, unless `fault` answers first."""

    def __init__(self, dialect: str = "vllm", fault: Fault = lambda body: None, key: str = ""):
        self.dialect, self.fault, self.key = dialect, fault, key
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.seconds = 0.0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(self.seconds)
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "no"}, status=401)
        answer = self.fault(body)
        if answer is not None:
            return answer
        text = body["prompt"]
        known = [None, *({t: logprob(a, b) for t in (b, 1, 2, 3)} for a, b in itertools.pairwise(text))]
        places = [
            place and {t: (v if t == b else logprob(a, t)) for t, v in place.items()}
            for place, a, b in zip(known, [0, *text], text, strict=False)
        ]
        choice: dict[str, Any] = {"text": ""}
        if self.dialect == "vllm" and "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [p and {str(t): {"logprob": v} for t, v in p.items()} for p in places]
        elif self.dialect == "echo" and body.get("echo"):
            choice["logprobs"] = {
                "tokens": [f"token_id:{t}" for t in [*text, 9]],
                "token_logprobs": [*(p and p[t] for p, t in zip(places, text, strict=True)), -1.0],
                "top_logprobs": [*(p and {f"token_id:{t}": v for t, v in p.items()} for p in places), {}],
            }
        return web.json_response({"choices": [choice]})


@contextmanager
def serving(*servers: Any) -> Iterator[list[str]]:
    loop, urls, runners = asyncio.new_event_loop(), [], []

    async def start() -> None:
        for server in servers:
            app = web.Application()
            app.router.add_post("/v1/completions", server.complete)
            runner = web.AppRunner(app, shutdown_timeout=0.1)  # a request may be in flight when a test ends
            await runner.setup()
            runners.append(runner)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield urls
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT_SECONDS", 0.001)


def teacher(urls: list[str], **changes: Any) -> HttpTeacher:
    return HttpTeacher(TeacherConfig("wise", backend="http", urls=urls, **changes), "teachers.wise", 40)


def written() -> Trajectories:
    prompts, responses = [[5, 6], [7]], [[8, 9, 10], [11, 12]]
    return Trajectories(
        ids=np.array([[0, 0, 0], [0, 1, 0]]),
        prompt_tokens=np.concatenate(prompts).astype(np.int32),
        prompt_offsets=offsets_of(map(len, prompts)),
        response_tokens=np.concatenate(responses).astype(np.int32),
        response_offsets=offsets_of(map(len, responses)),
        behaviour_logprobs=np.zeros(5, np.float32),
        policy_versions=np.zeros(5, np.int32),
        finish_reasons=np.zeros(2, np.uint8),
        support_ids=np.empty((5, 0), np.int32),
    )


EXPECTED = [logprob(6, 8), logprob(8, 9), logprob(9, 10), logprob(7, 11), logprob(11, 12)]


@pytest.mark.parametrize("dialect", ["vllm", "echo"])
def test_the_dialect_is_found_out_and_scores_are_those_of_the_response(dialect: str) -> None:
    server = Server(dialect)
    with serving(server) as urls:
        counts, scores = teacher(urls).score(written().ids, written())
    np.testing.assert_allclose(scores.logprobs, EXPECTED, rtol=1e-6)
    assert counts.missing == 0
    assert scores.support_logprobs.shape == (5, 0)
    assert {body["model"] for body in server.bodies} == {"wise"}


@pytest.mark.parametrize("dialect", ["vllm", "echo"])
def test_the_likeliest_tokens_come_with_their_log_probs(dialect: str) -> None:
    with serving(Server(dialect)) as urls:
        scores = teacher(urls, signal="topk", top_k=2).score(written().ids, written())[1]
    for row, (before, own) in enumerate([(6, 8), (8, 9), (9, 10), (7, 11), (11, 12)]):
        best = sorted({own, 1, 2, 3}, key=lambda token: -logprob(before, token))[:2]
        assert sorted(scores.support_ids[row].tolist()) == sorted(best)
        found = dict(zip(scores.support_ids[row], scores.support_logprobs[row], strict=True))
        assert found == pytest.approx({t: logprob(before, t) for t in best})


def failing(count: int, answer: Callable[[], web.StreamResponse]) -> Fault:
    seen: dict[str, int] = {}

    def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        key = str(body["prompt"])
        seen[key] = seen.get(key, 0) + 1
        return answer() if seen[key] <= count else None

    return fault


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(status=503),
        lambda: web.Response(status=429),
        lambda: web.Response(text="not JSON", content_type="application/json"),
        lambda: web.json_response({"choices": []}),
    ],
    ids=["unavailable", "too many requests", "no JSON", "no choices"],
)
def test_a_request_that_fails_is_tried_again(answer: Callable[[], web.StreamResponse]) -> None:
    with serving(Server(fault=failing(2, answer))) as urls:
        np.testing.assert_allclose(teacher(urls).score(written().ids, written())[1].logprobs, EXPECTED, rtol=1e-6)


def test_another_server_takes_the_work_of_one_that_is_gone() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(["http://127.0.0.1:9/v1", *urls])
        np.testing.assert_allclose(wise.score(written().ids, written())[1].logprobs, EXPECTED, rtol=1e-6)
        for _ in range(5):
            wise.score(written().ids, written())
        assert wise._servers[0].failures >= http.FAILURES_TO_OPEN
        asked = wise._servers[0].failures
        wise.score(written().ids, written())
    assert wise._servers[0].failures == asked, "a server that fails again and again is left alone"


def test_no_server_at_all_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"teachers.wise.urls: found http://127.0.0.1:9/v1 \(.*no server answers after 6"
    ):
        teacher(["http://127.0.0.1:9/v1"])


def test_servers_that_vanish_end_in_one_error() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls)
    with pytest.raises(CampaignError, match=r"teachers.wise: no server answers after 6 attempts"):
        wise.score(written().ids, written())


def test_a_refusal_is_not_tried_again() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls)
        server.fault = lambda body: web.json_response({"error": "too long"}, status=400)
        before = len(server.bodies)
        with pytest.raises(CampaignError, match=r"refuses: status 400, .*too long"):
            wise.score(written().ids, written())
    assert len(server.bodies) - before <= 2


def test_a_server_without_log_probs_of_prompts_is_refused() -> None:
    with serving(Server("neither")) as urls, pytest.raises(UserError, match="no log-probs of prompts in its answer"):
        teacher(urls)


def test_a_token_that_the_server_leaves_out_is_missing() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls)

        def shortened(body: dict[str, Any]) -> web.StreamResponse:
            return web.json_response({"choices": [{"prompt_logprobs": [None, {"6": {"logprob": -1.0}}]}]})

        server.fault = shortened
        counts, scores = wise.score(written().ids, written())
    assert counts.missing == 5 and np.isnan(scores.logprobs).all()


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Server(key="s3cret")) as urls:
        monkeypatch.delenv("WISE_KEY", raising=False)
        with pytest.raises(UserError, match=r"teachers.wise.api_key_variable: found WISE_KEY, which is not set"):
            teacher(urls, api_key_variable="WISE_KEY")
        monkeypatch.setenv("WISE_KEY", "s3cret")
        assert np.isfinite(teacher(urls, api_key_variable="WISE_KEY").score(written().ids, written())[1].logprobs).all()


def test_a_server_that_does_not_answer_in_time_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "ATTEMPTS", 2)
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls, timeout_seconds=0.2)
        server.seconds = 1.0
        with pytest.raises(CampaignError, match=r"no server answers after 2 attempts; the last: .*TimeoutError"):
            wise.score(written().ids, written())


def test_nothing_that_the_environment_holds_for_other_servers_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of another server")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: of another server")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server = Server()
    with serving(server) as urls:
        assert np.isfinite(teacher(urls).score(written().ids, written())[1].logprobs).all()
    assert server.headers and "of another server" not in str(server.headers)


def test_an_answer_that_breaks_off_is_a_failure_and_the_request_is_tried_again() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls)
        seen: list[str] = []

        def cut(body: dict[str, Any]) -> web.StreamResponse | None:
            seen.append(str(body["prompt"]))
            broken = web.Response(body=b'{"choices": [{"prompt_logp', content_type="application/json")
            broken.headers["Content-Length"] = "4000"
            broken.force_close()
            return broken if seen.count(seen[-1]) == 1 else None

        server.fault = cut
        np.testing.assert_allclose(wise.score(written().ids, written())[1].logprobs, EXPECTED, rtol=1e-6)
    assert len(seen) == 4


def test_no_method_is_a_coroutine_since_ray_would_run_the_constructor_in_an_event_loop() -> None:
    assert not [name for name in dir(HttpTeacher) if inspect.iscoroutinefunction(getattr(HttpTeacher, name))]
