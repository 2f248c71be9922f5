"""The environment actor, and what is known of an environment before a campaign starts."""

import asyncio
import sys
import time
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from actors.config import EnvironmentConfig, PromptsConfig
from actors.environment.actor import BLOCKED, EnvironmentActor
from actors.environment.base import Answer, AwayError, Episode, environment_class
from actors.environment.continuation import Continuation
from actors.environment.trial import try_environment
from actors.environment.vllm_tool_parser import check_parser
from actors.errors import UserError
from actors.rollout.episodes import turn_seed
from actors.trajectory import TrajectoryId
from tests.tiny_models import make_tiny_tokenizer
from tests.waiting import until

HERE = __name__
EPISODE = Episode(TrajectoryId(0, 1, 2), 7)


class Returns:
    """A step that returns what it is made with."""

    tools = ({"name": "1"},)  # as a template writes it that knows of tools: in the text of the prompt

    def __init__(self, answer: Any = None, seconds: float = 0.0, blocks: float = 0.0):
        self.answer, self.seconds, self.blocks = answer, seconds, blocks

    async def reset(self, record: dict, episode: Episode) -> Any:
        return [{"role": "user", "content": record["prompt"]}]

    async def step(self, message: dict) -> Any:
        await asyncio.sleep(self.seconds)
        time.sleep(self.blocks)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class NotAsync:
    """Methods that are no coroutines."""

    def reset(self, record: dict, episode: Episode) -> None: ...

    async def step(self, message: dict) -> None: ...


class Begins:
    """Begins with a text."""

    said = "Go."

    async def reset(self, record: dict, episode: Episode) -> Any:
        return self.said

    async def step(self, message: dict) -> Any: ...


class FewArguments:
    """Methods that take too little."""

    async def reset(self, record: dict) -> None: ...

    async def step(self, message: dict) -> None: ...


class Needs:
    """An argument without a default; one that is wrong; and tools of another form."""

    def __init__(self, size: int, tools: Any = None, fails: Exception | None = None):
        if fails is not None:
            raise fails
        if size < 0:
            raise ValueError("no such size")
        self.tools = tools

    async def reset(self, record: dict, episode: Episode) -> Any:
        if not self.tools:
            raise ValueError("no tools")
        return "Go."

    async def step(self, message: dict) -> Any: ...


class Ends:
    """A close that is counted, and then goes wrong; a reset that does too."""

    tools = ()
    closed: ClassVar[list[str]] = []

    def __init__(self, close: str = "", reset: str = ""):
        self.fails, self.begins = close, reset

    async def reset(self, record: dict, episode: Episode) -> Any:
        if self.begins:
            raise (KeyboardInterrupt if self.begins == "interrupts" else ValueError)("no beginning")
        return "Go."

    async def step(self, message: dict) -> Any:
        if message.get("content") == "the last":
            return "", True, 1.0
        raise GeneratorExit if self.fails == "leaves" else SystemExit(3)

    async def close(self) -> None:
        self.closed.append(self.fails)
        if self.fails == "hangs":
            await asyncio.Event().wait()
        if self.fails == "exits":
            raise SystemExit(3)
        if self.fails == "interrupts":
            raise KeyboardInterrupt
        raise ValueError("no end")


class Builds:
    """Never done with `reset`, or with `step`; what happens is listed."""

    seen: ClassVar[list[str]] = []

    def __init__(self, method: str):
        self.method = method

    async def _begun(self, method: str) -> None:
        self.seen.append(method)
        if method == self.method:
            try:
                await asyncio.Event().wait()
            finally:
                self.seen.append("stopped")

    async def reset(self, record: dict, episode: Episode) -> Any:
        await self._begun("reset")
        return "Go."

    async def step(self, message: dict) -> Any:
        await self._begun("step")

    async def close(self) -> None:
        self.seen.append("close")


def config(name: str = "Returns", **settings: Any) -> EnvironmentConfig:
    return EnvironmentConfig(name=f"{HERE}:{name}", **settings)


def answer_of(**arguments: Any) -> Any:
    async def ask() -> Any:
        actor = EnvironmentActor(config(arguments=arguments, step_timeout_seconds=arguments.pop("limit", 60.0)))
        begun = await actor.reset("a", EPISODE, {"prompt": "1+1="})
        assert begun.messages == [{"role": "user", "content": "1+1="}] and begun.tools == [*Returns.tools]
        answer = await actor.step("a", {"role": "assistant", "content": "2"})
        await actor.close("a")
        assert await actor.status() == {"episodes": 0}
        return answer

    return asyncio.run(ask())


def test_what_a_step_returns_or_raises_is_a_value() -> None:
    assert answer_of(answer=([], np.True_, np.float32(0.5)))[1:] == (True, 0.5, "", None, False)
    assert answer_of(answer=("go on", False, None)) == Answer("go on", False, None)
    for wrong, told in (
        (KeyError("number"), "step raised KeyError: 'number' (test_environment.py, line"),
        (None, "step returned None, expected (messages, done, reward)"),
        (("text", True), "step returned ('text', True)"),
        (("text", True, "much"), "reward = 'much'"),
        (("text", True, "1.0"), "reward = '1.0'"),
        (("text", True, 10**400), "step returned done = True and reward = 1000"),
        (("text", True, float("nan")), "the reward nan"),
        (TimeoutError("of its own"), "step raised TimeoutError: of its own"),
    ):
        assert told in answer_of(answer=wrong).error
    assert (
        "step gave no answer within 0.05 s (environment.step_timeout_seconds)"
        in answer_of(seconds=60.0, limit=0.05).error
    )


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (AwayError("the sandbox"), True),
        (ConnectionRefusedError(111, "refused"), True),
        (ConnectionResetError(), True),
        (BrokenPipeError(), False),  # of a process that the student's code has ended
        (OSError("no such host"), False),
        (TimeoutError(), False),
    ],
)
def test_an_environment_says_that_what_it_needs_is_away(error: Exception, away: bool) -> None:
    answer = answer_of(answer=error)
    assert answer.away == away and answer.error.startswith(f"step raised {type(error).__name__}: ")

    async def begin() -> Any:
        return await EnvironmentActor(config("Needs", arguments={"size": 1, "fails": error})).reset("a", EPISODE, {})

    begun = asyncio.run(begin())
    assert begun.away == away and begun.error.startswith(f"__init__ raised {type(error).__name__}: ")


def test_an_episode_that_is_never_closed_is_forgotten_and_a_blocked_process_ends() -> None:
    async def forget() -> None:
        actor = EnvironmentActor(config(episode_timeout_seconds=0.01))
        await actor.reset("a", EPISODE, {"prompt": "1"})
        await asyncio.sleep(0.02)
        await actor.reset("b", EPISODE, {"prompt": "1"})
        assert await actor.status() == {"episodes": 1}
        assert "environment.episode_timeout_seconds" in (await actor.step("a", {})).error

    async def end_without_waiting() -> None:
        actor = EnvironmentActor(config("Ends", arguments={"close": "hangs"}, episode_timeout_seconds=0.01))
        await actor.reset("a", EPISODE, {})
        await asyncio.sleep(0.02)
        async with asyncio.timeout(30):  # far below the limit of an end
            assert (await actor.reset("b", EPISODE, {})).messages == "Go."
            while Ends.closed != ["hangs"]:
                await asyncio.sleep(0)

    Ends.closed.clear()
    asyncio.run(end_without_waiting())
    ended: list[int] = []

    async def block() -> None:
        actor = EnvironmentActor(config(arguments={"blocks": 0.6}, step_timeout_seconds=0.2))
        actor.exit = ended.append
        await actor.reset("a", EPISODE, {"prompt": "1"})
        await actor.step("a", {})

    asyncio.run(forget())
    asyncio.run(block())
    until(lambda: ended == [BLOCKED], "the end of the blocked process")


@pytest.mark.parametrize("method", ["reset", "step"])
@pytest.mark.parametrize("forgotten", [False, True])
def test_the_end_of_an_episode_stops_what_its_environment_does_before_it_is_closed(
    forgotten: bool, method: str
) -> None:
    async def play() -> None:
        actor = EnvironmentActor(config("Builds", arguments={"method": method}))

        async def begin(key: str) -> Any:
            begun = await actor.reset(key, EPISODE, {})
            return begun if begun.error else await actor.step(key, {})

        calls = {key: asyncio.create_task(begin(key)) for key in ("one/a", "two/a")}
        while Builds.seen.count(method) < 2:
            await asyncio.sleep(0)
        Builds.seen.clear()
        await (actor.forget("one") if forgotten else actor.close("one/a"))
        assert (await calls["one/a"]).error == f"{method} was given up"
        while actor._closing:
            await asyncio.sleep(0)
        assert Builds.seen == ["stopped", "close"]
        assert not calls["two/a"].done() and await actor.status() == {"episodes": 1}
        await actor.close("two/a")

    Builds.seen.clear()
    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize("reset", ["", "raises", "interrupts"])
@pytest.mark.parametrize("close", ["raises", "hangs", "exits", "interrupts", "leaves"])
def test_the_end_of_an_episode_closes_it_and_an_end_that_goes_wrong_is_of_no_consequence(
    close: str, reset: str
) -> None:
    async def play() -> None:
        own = config(
            "Ends", arguments={"close": close, "reset": reset}, step_timeout_seconds=0.2 if close == "hangs" else 60
        )
        actor = EnvironmentActor(own)
        begun = await actor.reset("a", EPISODE, {})
        assert ("no beginning" in begun.error) == bool(reset) and (reset or begun.tools == [])
        raised = "GeneratorExit" if close == "leaves" else "SystemExit: 3"
        assert (await actor.step("a", {})).error.startswith(f"step raised {raised}")
        closed, _ = await asyncio.wait({asyncio.ensure_future(actor.close("a"))}, timeout=20)
        assert closed and not any(one.exception() for one in closed)
        assert await actor.status() == {"episodes": 0}

    Ends.closed.clear()
    asyncio.run(play())
    assert Ends.closed == [close]


@pytest.mark.parametrize("close", ["raises", "hangs", "exits"])
def test_an_environment_that_is_done_is_closed_at_once_and_its_answer_does_not_wait_for_that(close: str) -> None:
    async def play() -> None:
        own = config("Ends", arguments={"close": close}, episodes_per_replica=1, step_timeout_seconds=0.2)
        actor = EnvironmentActor(own)
        assert await actor.enter("a") and not await actor.enter("b")
        await actor.reset("a", EPISODE, {})
        assert await actor.step("a", {"content": "the last"}) == Answer("", True, 1.0)
        assert await actor.status() == {"episodes": 0}
        assert not await actor.enter("b"), "one that is being closed still has its place"
        while not await actor.enter("b"):
            await asyncio.sleep(0.01)
        assert Ends.closed == [close]
        await actor.close("a")
        assert Ends.closed == [close]

    Ends.closed.clear()
    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize(
    ("name", "arguments", "where", "told"),
    [
        ("Missing", {}, "environment.name", "Missing"),
        ("NotAsync", {}, "environment.name", "without async def reset"),
        ("FewArguments", {}, "environment.name", "reset(record, episode)"),
        (
            *("Returns", {"answers": 3}, "environment.arguments"),
            f"found answers, expected arguments that {HERE}:Returns takes: answer, seconds, blocks (docs/environments.md)"
            " (did you mean 'answer'?)",
        ),
        (
            "Needs",
            {},
            "environment.arguments",
            "found none (missing a required argument: 'size'), expected arguments that",
        ),
        ("until", {}, "environment.name", "without async def reset and async def step"),
    ],
)
def test_a_class_of_another_form_is_refused(name: str, arguments: dict, where: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        environment_class(config(name, arguments=arguments))
    assert refused.value.where == where and told in str(refused.value)


def test_an_environment_is_tried_with_the_first_record(tmp_path: Any) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    prompts, tokenizer = PromptsConfig(path=str(tmp_path / "train.jsonl")), make_tiny_tokenizer()
    found = try_environment(config(), prompts, tokenizer, [1])
    assert "first prompt: 7 tokens" in found and "note" not in found
    with pytest.raises(
        UserError, match=r"whose tool 'add' the chat template leaves out, expected a template with tools"
    ):
        try_environment(config("Needs", arguments={"size": 1, "tools": [{"name": "add"}]}), prompts, tokenizer, [1])
    assert "7 tokens" in try_environment(config(), prompts, tokenizer, [1], room=7)
    way_out = (
        r"first messages have 7 tokens with the first record, expected at most 6; prompts\.max_prompt_tokens makes"
    )
    with pytest.raises(UserError, match=way_out):
        try_environment(config(), prompts, tokenizer, [1], room=6)
    thinks = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<eos>{% endfor %}<assistant>"
    tokenizer.chat_template = thinks
    with pytest.raises(UserError, match=r"environment\.earlier_turns.*<think>"):
        try_environment(config(), prompts, tokenizer, [1])
    assert "note: with messages of the role user" in try_environment(
        config(earlier_turns="written"), prompts, tokenizer, [1]
    )


def test_a_beginning_that_fails_says_which_part_of_the_environment_is_at_fault() -> None:
    def begun(parser: str | None = None, **arguments: Any) -> str:
        own = config("Needs", arguments=arguments, tool_parser=parser)
        return asyncio.run(EnvironmentActor(own).reset("a", EPISODE, {})).error

    assert begun(size=-1).startswith("__init__ raised ValueError: no such size (test_environment.py, line")
    assert begun(size=1).startswith("reset raised ValueError: no tools (")
    for wrong in ("add", ["add"], [{"type": "function"}], {"name": "add"}):
        assert begun(size=1, tools=wrong).startswith(f"tools is {wrong!r}, expected a list of JSON schemas")
    assert begun(size=1, tools=[{"name": "add"}]) == ""
    assert begun("hermes", size=1, tools=[{"name": "add"}]).startswith("tools is [{'name': 'add'}], expected")


def test_an_unknown_parser_of_tool_calls_is_told_with_the_nearest_and_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = SimpleNamespace(list_registered=lambda: ["mistral", "hermes", "xlam"])  # vLLM's own take long to import
    monkeypatch.setitem(sys.modules, "vllm.tool_parsers", SimpleNamespace(ToolParserManager=known))
    for name, nearest in (("hermess", " (did you mean 'hermes'?)"), ("qqq", "")):
        with pytest.raises(UserError) as refused:
            check_parser(name)
        told = str(refused.value)
        assert told.startswith(f"environment.tool_parser: found {name}, expected null, or a parser of vLLM")
        assert ": hermes, mistral, xlam" in told and told.endswith(nearest)


def test_the_first_turn_has_the_seed_of_a_single_answer() -> None:
    seeds = [turn_seed(7, turn) for turn in range(50)]
    assert seeds[0] == 7 and len(set(seeds)) == 50 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_first_message_of_megabytes_is_refused_without_being_tokenised(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    prompts, tokenizer = PromptsConfig(path=str(tmp_path / "train.jsonl")), make_tiny_tokenizer()
    monkeypatch.setattr(Begins, "said", "x" * 4_000_000)
    monkeypatch.setattr(Continuation, "prompt", lambda *_: pytest.fail("it was tokenised"))
    with pytest.raises(UserError, match=r"have \d{3},\d{3} tokens or more with the first record, expected at most 100"):
        try_environment(config("Begins"), prompts, tokenizer, [1], room=100)


def test_a_beginning_that_cancels_itself_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def reset(*_: Any) -> None:
        raise asyncio.CancelledError

    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    monkeypatch.setattr(Begins, "reset", reset)
    with pytest.raises(UserError, match=r"whose reset raised CancelledError"):
        try_environment(config("Begins"), PromptsConfig(path=str(tmp_path / "train.jsonl")), make_tiny_tokenizer(), [1])
