"""An HTTP teacher, and servers that fail in many ways. Their log-probs are made up, a function of the tokens."""

import asyncio
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from aiohttp import web

import actors.teacher.http_servers as http
from actors.config import SamplingConfig, TeacherConfig
from actors.errors import CampaignError, UserError
from actors.heartbeat import waiting
from actors.teacher.http import HttpTeacher
from actors.trajectory import Requests, Trajectories, offsets_of
from tests.waiting import until

Fault = Callable[[dict[str, Any]], web.StreamResponse | None]


def logprob(before: int, token: int) -> float:
    return -0.1 - ((7 * before + token) % 11) / 4


class Server:
    """Answers in one of the two dialects, unless `fault` answers first."""

    def __init__(self, dialect: str = "vllm", fault: Fault = lambda body: None, key: str = "", name: Any = None):
        self.dialect, self.fault, self.key, self.name, self.drips = dialect, fault, key, name, False
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
        if self.drips:
            return await drip(request)
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
        return web.json_response({"choices": [choice]} | ({"model": self.name()} if self.name else {}))


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
    monkeypatch.setattr(http, "LONGEST_WAIT_SECONDS", 0.01)


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


def test_another_server_takes_the_work_of_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(["http://127.0.0.1:9/v1", *urls])
        monkeypatch.setattr(http, "FIRST_WAIT_SECONDS", 100.0)
        monkeypatch.setattr(http, "LONGEST_WAIT_SECONDS", 100.0)
        np.testing.assert_allclose(wise.score(written().ids, written())[1].logprobs, EXPECTED, rtol=1e-6)
        for _ in range(5):
            wise.score(written().ids, written())
        assert wise._servers.servers[0].failures >= http.FAILURES_TO_OPEN
        asked = wise._servers.servers[0].failures
        wise.score(written().ids, written())
    assert wise._servers.servers[0].failures == asked, "a server that fails again and again is left alone"


def test_no_server_at_all_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"teachers.wise.urls: found http://127.0.0.1:9/v1 \(.*no server answers after 6"
    ):
        teacher(["http://127.0.0.1:9/v1"])


def test_servers_that_stay_away_end_in_one_error_after_the_limit() -> None:
    with serving(Server()) as urls:
        wise = teacher(urls, away_timeout_seconds=0.3)
    with pytest.raises(
        CampaignError, match=r"teachers.wise: no server has answered for 0.3 s \(teachers.wise.away_timeout"
    ):
        wise.score(written().ids, written())


def test_servers_that_are_away_for_a_while_are_waited_for_and_said_to_be() -> None:
    """Longer than all attempts at one request used to take; `waiting` is what the supervisor shows in `status`."""
    server, told = Server(), []
    with serving(server) as urls:
        wise = teacher(urls)

        def away(body: dict[str, Any]) -> web.StreamResponse | None:
            told.append(waiting())
            return web.Response(status=503) if len(told) <= 20 else None

        server.fault = away
        np.testing.assert_allclose(wise.score(written().ids, written())[1].logprobs, EXPECTED, rtol=1e-6)
    assert any("status 503" in what and seconds > 0 for what, seconds in told) and waiting() == ("", 0.0)


def test_a_server_that_asks_to_be_left_alone_is_left_alone() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls)
        asked: list[float] = []

        def busy(body: dict[str, Any]) -> web.StreamResponse | None:
            asked.append(time.monotonic())
            return web.Response(status=429, headers={"Retry-After": "1"}) if len(asked) == 1 else None

        server.fault = busy
        wise.score(written().ids[:1], written())
    assert asked[1] - asked[0] >= 1.0


def test_a_refusal_is_not_tried_again_and_drops_its_trajectory_alone() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls)

        def picky(body: dict[str, Any]) -> web.StreamResponse | None:
            too_long = body["prompt"][:2] == [7, 11]
            return web.json_response({"error": "too long"}, status=400) if too_long else None

        server.fault = picky
        before = len(server.bodies)
        counts, scores = wise.score(written().ids, written())
    assert list(counts.refused) == [1] and "status 400" in counts.refused[1] and "too long" in counts.refused[1]
    np.testing.assert_allclose(scores.logprobs[:3], EXPECTED[:3], rtol=1e-6)
    assert np.isnan(scores.logprobs[3:]).all() and counts.missing == 0
    assert len(server.bodies) - before <= 3, "the two texts, and the probe that tells whose fault it is"


def test_a_server_that_refuses_everything_is_away_and_not_the_trajectories_fault() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls, away_timeout_seconds=0.3)
        server.fault = lambda body: web.json_response({"error": "model not loaded"}, status=400)
        with pytest.raises(CampaignError, match="no server has answered for"):
            wise.score(written().ids, written())


def test_a_request_that_a_healthy_server_never_answers_is_refused_in_the_end() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls)
        server.fault = lambda body: web.Response(status=500) if body["prompt"][:2] == [7, 11] else None
        counts, _ = wise.score(written().ids, written())
    assert "status 500" in counts.refused[1]


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


def test_a_server_that_does_not_answer_in_time_is_a_failure() -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls, timeout_seconds=0.2, away_timeout_seconds=0.3)
        server.seconds = 1.0
        with pytest.raises(CampaignError, match=r"no server has answered .*; the last: .*TimeoutError"):
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


def writes(body: dict[str, Any]) -> web.StreamResponse | None:
    """Two tokens and the first stop token, made of the prompt and the seed; nothing to the prompt 13, and 99 to 14."""
    if "stop_token_ids" not in body:
        return None
    own = body["prompt"][-1]
    if own == 13:
        return web.json_response({"error": "the prompt is too long"}, status=400)
    tokens = [99 if own == 14 else own, body["seed"] % 20, body["stop_token_ids"][0]][: body["max_tokens"]]
    return web.json_response({"choices": [{"text": "", "logprobs": {"tokens": [f"token_id:{t}" for t in tokens]}}]})


def test_what_it_writes_has_the_servers_token_ids_and_what_it_does_not_is_refused() -> None:
    server, prompts = Server(fault=writes), [[5, 6], [7, 13], [8], [9, 14]]
    asked = Requests(
        ids=np.array([(0, i, 0) for i in range(4)]),
        seeds=np.array([2**40 + 3, 1, 2, 3]),
        prompt_tokens=np.concatenate(prompts).astype(np.int32),
        prompt_offsets=offsets_of(map(len, prompts)),
    )
    with serving(server) as urls:
        wise = teacher(urls)
        counts, text = wise.sample(asked, 7, SamplingConfig(max_response_tokens=3, top_p=0.9, top_k=5), [2])
        _, shorter = wise.sample(asked, 7, SamplingConfig(max_response_tokens=2), [2])
    assert list(counts.refused) == [1, 3] and "the prompt is too long" in counts.refused[1]
    assert "the token 99, which student and teacher do not share (40 tokens)" in counts.refused[3]
    assert text.response_tokens.tolist() == [6, (2**40 + 3) % 2**31 % 20, 2, 8, 2, 2]
    assert text.ids[:, 1].tolist() == [0, 2] and text.prompt_tokens.tolist() == [5, 6, 8]
    assert counts.lengths.tolist() == [3, 0, 3, 0] and not counts.truncated.any() and not text.truncated.any()
    assert shorter.truncated.tolist() == [True, False] and set(text.policy_versions.tolist()) == {7}
    sent = next(body for body in server.bodies if body.get("top_k") == 5 and body["prompt"] == [5, 6])
    assert sent["top_p"] == 0.9 and sent["temperature"] == 1 and sent["max_tokens"] == 3
    assert 0 <= sent["seed"] < 2**31 and sent["skip_special_tokens"] is False


def every(content: Any, **more: Any) -> Fault:
    return lambda body: web.json_response(content(body) if callable(content) else content, **more)


def with_values(value: Callable[[int], Any]) -> Callable[[dict[str, Any]], Any]:
    """An answer in vLLM's form whose log-probs are these."""
    return lambda body: {"choices": [{"prompt_logprobs": [
        None, *({str(t): {"logprob": value(place)}} for place, t in enumerate(body["prompt"][1:]))
    ]}]}  # fmt: skip


def raw(body: bytes, kind: str = "application/json") -> Fault:
    return lambda _: web.Response(body=body, content_type=kind)


MALFORMED: dict[str, Fault] = {
    "strings": every(with_values(lambda place: f"-{place + 1}.5")),
    "fields missing": every(lambda body: {"choices": [{"prompt_logprobs": [None] + [{}] * (len(body["prompt"]) - 1)}]}),
    "zeros": every(with_values(lambda place: 0.0)),
    "false": every(with_values(lambda place: False)),
    "just false": every(False),
    "NaN": raw(b'{"choices": [{"prompt_logprobs": [null, {"6": {"logprob": NaN}}]}]}'),
    "above zero": every(with_values(lambda place: 0.5 + place)),
    "infinite": every(with_values(lambda place: float("-inf"))),
    "a huge number": raw(b'{"choices": [{"prompt_logprobs": [null, {"6": {"logprob": ' + b"9" * 5000 + b"}}]}]}"),
    "deep": raw(b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "too long": raw(b'{"choices": "' + b"x" * 3_000_000 + b'"}'),
    "an error with status 200": every({"error": {"message": "overloaded"}}),
    "a page": raw(b"<html>Sign in</html>", "text/html"),
    "nothing": raw(b""),
    "other tokens": every(lambda body: {"choices": [{"prompt_logprobs": [None, *([{"39": {"logprob": -1.0}}] * 40)][: len(body["prompt"])]}]}),
    "too many tokens": every(lambda body: {"choices": [{"prompt_logprobs": [None] + [{str(t): {"logprob": -1.0 - t} for t in range(40)}] * 400}]}),
    "ids that are no numbers": every(lambda body: {"choices": [{"prompt_logprobs": [None, *([{"²": {"logprob": -1}}] * (len(body["prompt"]) - 1))]}]}),
    "lists for objects": every(lambda body: {"choices": [{"prompt_logprobs": [[1, 2]] * len(body["prompt"])}]}),
    "a string for a list": every({"choices": [{"prompt_logprobs": "none"}]}),
    "a redirect": lambda _: web.Response(status=307, headers={"Location": "http://127.0.0.1:9/steal"}),
    "huge headers": lambda _: web.json_response({}, headers={"X-Long": "x" * 200_000}),
    "no login": lambda _: web.json_response({"error": "the key s3cret is wrong"}, status=401),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_answer_is_one_line_at_the_start_and_a_failure_or_a_missing_score_later(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WISE_KEY", "s3cret")
    fault = MALFORMED[name]
    with serving(Server(fault=fault)) as urls, pytest.raises((UserError, CampaignError)) as told:
        teacher(urls, api_key_variable="WISE_KEY")
    assert (
        str(told.value).startswith("teachers.wise") and "\n" not in str(told.value) and "s3cret" not in str(told.value)
    )
    assert len(str(told.value)) < 1000
    # Later: the other server has the scores; nothing that the failing one sends becomes a number.
    server = Server()
    with serving(server, Server()) as urls:
        wise = teacher(urls, api_key_variable="WISE_KEY")
        server.fault = fault
        for _ in range(2):
            counts, scores = wise.score(written().ids[:1], written())
            known = np.isfinite(scores.logprobs)
            np.testing.assert_allclose(scores.logprobs[known], np.array(EXPECTED[:3])[known], rtol=1e-6)
            assert counts.missing == (~known).sum() and not counts.refused


async def drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:  # until the connection is closed
        await response.write(b" ")
        await asyncio.sleep(0.05)


def test_an_answer_that_drips_for_ever_is_cut_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    with serving(server) as urls:
        wise = teacher(urls, timeout_seconds=0.3, away_timeout_seconds=0.2)
        monkeypatch.setattr(server, "drips", True)
        with pytest.raises(CampaignError, match="TimeoutError, no answer within"):
            wise.score(written().ids, written())


def test_a_server_that_comes_back_with_another_model_gets_no_work() -> None:
    first = Server()
    with serving(first, Server()) as urls:
        wise = teacher(urls)
        first.fault = lambda body: web.Response(status=503)

        def fails(times: int) -> bool:
            """Each call is one failure at most: requests that fail together count once."""
            np.testing.assert_allclose(wise.score(written().ids, written())[1].logprobs, EXPECTED, rtol=1e-6)
            return wise._servers.servers[0].failures >= times

        until(lambda: fails(http.FAILURES_TO_OPEN), "the server has to answer the probe")
        first.fault = every(with_values(lambda place: -2.0 - place / 7))  # of another model
        until(lambda: fails(http.FAILURES_TO_OPEN + 3), "it has not answered the probe as before")
        first.fault = lambda body: None
        for _ in range(20):
            wise.score(written().ids, written())
            time.sleep(0.01)
        assert wise._servers.servers[0].failures == 0, "the same model again"


def test_an_answer_of_another_model_counts_as_a_failure() -> None:
    names = iter(["wise"] * 1000)
    first = Server(name=lambda: next(names))
    with serving(first) as urls:
        wise = teacher(urls, away_timeout_seconds=0.1)
        names = iter(["other"] * 1000)
        with pytest.raises(CampaignError, match="an answer of the model other, after answers of wise"):
            wise.score(written().ids, written())


def test_servers_of_different_models_are_refused_at_the_start() -> None:
    other = Server(fault=every(with_values(lambda place: -2.0 - place / 7)))
    with (
        serving(Server(), other) as urls,
        pytest.raises(UserError, match=r"differ by .*, expected servers of one model"),
    ):
        teacher(urls)


def test_ids_that_the_servers_do_not_accept_are_found_out_and_are_missing_scores() -> None:
    """As vLLM, which refuses a text with an id beyond its model's rows."""

    def rows(body: dict[str, Any]) -> web.StreamResponse | None:
        return web.json_response({"error": "out of vocabulary"}, status=400) if max(body["prompt"]) >= 36 else None

    text = written()
    text.response_tokens[1], text.prompt_tokens[2] = 38, 39
    with serving(Server(fault=rows)) as urls:
        wise = teacher(urls)
        counts, scores = wise.score(text.ids, text)
    assert wise.vocabulary == 36 and not counts.refused and counts.missing == 1
    assert np.flatnonzero(np.isnan(scores.logprobs)).tolist() == [1]


def test_a_server_is_asked_for_the_longest_text_before_the_start() -> None:
    def short(body: dict[str, Any]) -> web.StreamResponse | None:
        return (
            web.json_response({"message": "maximum context length is 64"}, status=400)
            if len(body["prompt"]) > 63
            else None
        )

    with serving(Server(fault=short)) as urls:
        wise = teacher(urls)
        wise.full_length_test(63)
        with pytest.raises(
            UserError, match=r"teachers\.wise\.urls: found .*status 400.*maximum context.*expected a context of 64"
        ):
            wise.full_length_test(64)


class Clock:
    """Time that passes with the pauses alone."""

    def __init__(self) -> None:
        self.now, self._lock = 1000.0, threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(http, "time", made)
    monkeypatch.setattr(http, "FIRST_WAIT_SECONDS", 0.5)
    monkeypatch.setattr(http, "LONGEST_WAIT_SECONDS", 30.0)
    return made


def scripted(post: Callable[[], int], away_timeout_seconds: float = 20.0) -> http.Servers:
    """One server in the middle of a campaign; `post` gives the status of each request."""
    made = http.Servers(
        "t", ["http://h/v1"], "", timeout_seconds=1, per_url=8, away_timeout_seconds=away_timeout_seconds
    )
    made._post = lambda *_: (post(), 0.0, b'{"choices": [{}]}')  # type: ignore[method-assign]
    made.patient = True
    return made


def test_requests_that_fail_together_are_one_failure(clock: Clock) -> None:
    together, first = threading.Barrier(8), threading.local()

    def post() -> int:
        if hasattr(first, "over"):
            counted.append(servers.servers[0].failures)
            return 200
        first.over = True
        together.wait(30)
        return 503

    servers, answers, counted = scripted(post), [], []
    threads = [threading.Thread(target=lambda: answers.append(servers.ask({}, 9, bool))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [True] * 8 and max(counted) == 1


@pytest.mark.parametrize("status", [503, 404, 401, 308])
def test_an_outage_costs_little_more_than_itself(clock: Clock, status: int) -> None:
    servers = scripted(lambda: status if clock.now < 1004 else 200)
    assert servers.ask({}, 9, bool) and clock.now - 1000 < 6.5


def test_servers_are_tried_until_the_limit_and_once_more_when_it_is_over(clock: Clock) -> None:
    asked: list[float] = []

    def post() -> int:
        asked.append(clock.now - 1000)
        return 503 if back is None or clock.now < back else 200

    back: float | None = 1019.9
    assert scripted(post).ask({}, 9, bool)
    asked, back, clock.now = [], None, 1000.0
    with pytest.raises(CampaignError, match="no server has answered for 20 s"):
        scripted(post).ask({}, 9, bool)
    assert 20 <= asked[-1] < 21 and all(b - a <= 10 for a, b in itertools.pairwise(asked))


def test_whatever_the_client_library_raises_is_a_failure_of_the_server() -> None:
    """anyio raises a group with an OverflowError for a port that does not exist."""
    with pytest.raises(
        UserError, match=r"teachers.wise.urls: found http://127.0.0.1:99999/v1 \(.*OverflowError|port must be"
    ):
        teacher(["http://127.0.0.1:99999/v1"])
