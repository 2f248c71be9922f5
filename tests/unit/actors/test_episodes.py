"""Episodes with a scripted engine and a scripted environment: what is written, asked, seeded, rewarded and begun again."""

import asyncio
import json
import pickle
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from actors.config import EnvironmentConfig, PromptsConfig, SamplingConfig
from actors.environment.actor import EnvironmentActor
from actors.environment.base import Answer, Begun, Episode, Follows, Turn
from actors.environment.continuation import Continuation
from actors.errors import AbortedError
from actors.prompts.prompt_set import load_prompts
from actors.rollout.engine import Response, trajectories_of
from actors.rollout.episodes import NO_LIMITS, Episodes, _row, turn_seed
from actors.rollout.thinking import Thinking
from actors.trajectory import FINISH_REASONS, Aside, EpisodeCounts, Requests, Trajectories, TrajectoryId, offsets_of
from tests.light_campaign import LocalEnvironments
from tests.light_engine import done
from tests.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
END = TOKENIZER.eos_token_id
SPELLED = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "the"]
"""One token a letter, as a student may sample it: the tokenizer itself writes the word with fewer."""
TURN = [*SPELLED, END]
IDS, SEEDS = [(0, 3, 0), (0, 8, 1)], [11, 12]
THREE_TURNS = [["no", False, 0.25], ["7 again", False, None], ["", True, 0.5]]
FIRST, SECOND = (f"\n<|user|>{text}<|end|>\n<|assistant|>" for text in ("no", "7 again"))
"""What the template writes after the end of a turn."""


class Spells:
    """An engine that writes `the` in every turn; its log-probs and versions tell the turns apart."""

    version = 4

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], int, list[int], int]] = []
        """(id, seed, prompt, length limit) of each request."""

    def generate(self, requests: Requests, sampling: SamplingConfig, *, greedy: bool = False) -> Any:
        id_, limit = tuple(requests.ids[0].tolist()), sampling.max_response_tokens
        self.asked.append((id_, int(requests.seeds[0]), requests.prompt_tokens.tolist(), limit))
        tokens = TURN[:limit]
        logprobs = -np.arange(1, len(tokens) + 1) - len(requests.prompt_tokens) / 64
        reason = "stop" if len(tokens) == len(TURN) else "length"
        versions = [len(requests.prompt_tokens)] * len(tokens)
        return done(trajectories_of(requests, [Response(tokens, logprobs, versions, reason)]))


class Tells:
    """Answers turn i with `answers[i]`: (messages, done, reward). In the first attempts it raises or hangs at turn 1."""

    seen: ClassVar[list[tuple[Any, ...]]] = []
    """(episode, method, argument) of each call."""

    def __init__(
        self, answers: list = THREE_TURNS, fails: int = 0, only: int = -1, hangs: bool = False, first: str = ""
    ):
        self.answers, self.fails, self.only, self.hangs, self.first = answers, fails, only, hangs, first

    async def reset(self, record: dict, episode: Episode) -> Any:
        self.episode, self.turn = episode, 0
        self.seen.append((episode, "reset", record))
        return self.first or None

    async def step(self, message: dict) -> Any:
        self.seen.append((self.episode, "step", message))
        self.turn += 1
        if self.turn == 2 and self.episode.attempt < self.fails and self.only in (-1, self.episode.id.prompt):
            if self.hangs:
                await asyncio.Event().wait()
            raise ValueError("broken")
        return self.answers[self.turn - 1]

    async def close(self) -> None:
        self.seen.append((self.episode, "close", None))


def requests() -> Requests:
    prompts = [TOKENIZER(f"<|user|>{name}<|end|>\n<|assistant|>")["input_ids"] for name in ("a", "bc")]
    return Requests(
        ids=np.array(IDS),
        seeds=np.array(SEEDS),
        prompt_tokens=np.array(sum(prompts, []), np.int32),  # noqa: RUF017
        prompt_offsets=offsets_of(map(len, prompts)),
        asides=tuple(Aside(record=json.dumps({"prompt": name})) for name in ("a", "bc")),
    )


def episodes_of(engine: Any, arguments: dict[str, Any], limits: Any = NO_LIMITS, **settings: Any) -> Episodes:
    Tells.seen.clear()
    config = EnvironmentConfig(name=f"{__name__}:Tells", arguments=arguments, **settings)
    there = LocalEnvironments([EnvironmentActor(config)])
    return Episodes(engine, config, Continuation(TOKENIZER, frozenset({END})), limits, there)


def played(
    max_response_tokens: int = 100, limits: Any = NO_LIMITS, **arguments: Any
) -> tuple[Trajectories, tuple[EpisodeCounts, ...], Spells]:
    settings = {name: arguments.pop(name) for name in set(arguments) & set(EnvironmentConfig.__dataclass_fields__)}

    async def play() -> Any:
        episodes = episodes_of(engine, arguments, limits, **settings)
        found = await episodes.play(requests(), SamplingConfig(max_response_tokens=max_response_tokens), False)
        await asyncio.sleep(0)  # what nobody waits for is told now
        return found

    engine = Spells()
    return *asyncio.run(play()), engine


def text_of(written: Trajectories, row: int) -> str:
    return TOKENIZER.decode(written.response_tokens[slice(*written.response_offsets[row : row + 2])])


@pytest.mark.parametrize("as_text", [False, True])
def test_the_tools_of_a_record_are_those_of_the_field_that_its_source_names(
    as_text: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    record = {"prompt": "a look", "functions": json.dumps(tools) if as_text else tools, "tools": "of the reader's own"}
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    source = PromptsConfig(str(tmp_path / "train.jsonl"), reference_field=None, tools_field="functions")
    monkeypatch.setattr(
        TOKENIZER, "chat_template", TOKENIZER.chat_template + "{{ tools[0]['function']['name'] if tools }}"
    )
    aside = load_prompts(source, TOKENIZER, None, "prompts", records=True).aside(0)
    monkeypatch.undo()
    found: list[Any] = []
    after = Continuation.after
    monkeypatch.setattr(Continuation, "after", lambda *given: (found.append(given[-1]), after(*given))[1])

    async def play() -> Any:
        asked = replace(requests(), asides=(aside, aside))
        return await episodes_of(Spells(), {}).play(asked, SamplingConfig(max_response_tokens=100), False)

    asyncio.run(play())
    assert found == 4 * [tools]


def test_an_episode_is_what_student_and_environment_wrote_in_their_order() -> None:
    written, counts, engine = played()
    assert TOKENIZER("the")["input_ids"] != SPELLED
    assert (
        written.ids.tolist() == [list(id_) for id_ in IDS]
        and written.prompt_tokens.tolist() == requests().prompt_tokens.tolist()
    )
    assert written.turn_counts.tolist() == [3, 3] and written.rewards.tolist() == [0.75, 0.75]
    assert [FINISH_REASONS[reason] for reason in written.finish_reasons] == ["stop", "stop"]
    for row, (id_, seed, prompt) in enumerate(zip(IDS, SEEDS, requests().prompts, strict=True)):
        own = slice(*written.response_offsets[row : row + 2])
        tokens, trained = written.response_tokens[own].tolist(), written.trained[own]
        assert text_of(written, row) == f"the<|end|>{FIRST}the<|end|>{SECOND}the<|end|>"
        assert [token for token, mine in zip(tokens, trained, strict=True) if mine] == 3 * TURN
        asked = [one[1:] for one in engine.asked if one[0] == id_]
        starts = np.flatnonzero(np.diff(np.concatenate([[0], trained])) == 1).tolist()
        # A turn reads all that was written before it, draws from a seed of its own, and has the room that is left.
        expected = [
            (turn_seed(seed, turn), [*prompt, *tokens[:start]], 100 - start) for turn, start in enumerate(starts)
        ]
        assert asked == expected
        before = np.repeat([len(one[1]) for one in asked], len(TURN))
        assert written.policy_versions[own][trained].tolist() == before.tolist()
        assert np.array_equal(written.behaviour_logprobs[own][trained], np.tile([-1, -2, -3, -4], 3) - before / 64)
        assert (counts[row].turns, counts[row].retries, counts[row].prompt_tokens) == (3, 0, len(prompt))
        calls = [
            (method, argument)
            for episode, method, argument in Tells.seen
            if episode == Episode(TrajectoryId(*id_), seed)
        ]
        said = ("step", {"role": "assistant", "content": "the"})
        assert calls == [("reset", {"prompt": ("a", "bc")[row]}), said, said, said, ("close", None)]


class Asks:
    """A program's environment actor: request i goes on from turn `script[i][0]`, with this message; None begins a conversation.

    There is room for `room` episodes.
    """

    def __init__(self, script: list[tuple[int | None, str]], room: int = 9):
        self.script, self.room, self.refused = script, room, 0
        self.open: dict[str, int] = {}

    async def enter(self, key: str) -> bool:
        if len(self.open) >= self.room:
            self.refused += 1
            return False
        self.open[key] = 0
        return True

    async def reset(self, key: str, episode: Episode, record: dict) -> Begun:
        self.open.setdefault(key, 0)
        assert len(self.open) <= self.room
        return Begun([{"role": "user", "content": "a"}], [])

    async def step(self, key: str, message: dict, turn: Turn) -> Answer:
        self.open[key] += 1
        if self.open[key] > len(self.script):
            del self.open[key]
            return Answer([], True, 0.5)
        after, text = self.script[self.open[key] - 1]
        return Answer([{"role": "user", "content": text}], follows=Follows(after, []))

    async def close(self, key: str) -> None:
        del self.open[key]


def asked(
    script: list[tuple[int | None, str]], most: int = 999, room: int = 9, **settings: Any
) -> tuple[Trajectories, tuple[EpisodeCounts, ...], Spells, Asks]:
    engine, place = Spells(), Asks(script, room)
    config = EnvironmentConfig(command=["true"], **settings)

    async def play() -> Any:
        there = LocalEnvironments([place])
        episodes = Episodes(engine, config, Continuation(TOKENIZER, frozenset({END})), NO_LIMITS, there)
        return await episodes.play(requests(), SamplingConfig(max_response_tokens=most), False)

    return *asyncio.run(play()), engine, place


SCRIPT = [(0, "b"), (None, "sub"), (1, "c"), (0, "d"), (2, "e"), (3, "f"), (0, "g")]
"""The conversation a-b-c-f, one of a sub-agent with the turns sub-e, and two more that go on from the first turn: d, g."""


def test_each_turn_of_several_conversations_is_trained_once_and_read_as_it_was_written() -> None:
    written, counts, engine, _ = asked(SCRIPT)
    opening = "<|user|>{}<|end|>\n<|assistant|>".format
    said = "the<|end|>"
    first = f"{said}\n{opening('b')}{said}\n{opening('c')}{said}\n{opening('f')}{said}"
    others = [
        f"{opening('sub')}{said}\n{opening('e')}{said}",
        *(f"{opening('a')}{said}\n{opening(text)}{said}" for text in "dg"),
    ]
    for row, id_ in enumerate(IDS):
        own = slice(*written.response_offsets[row : row + 2])
        tokens, trained, begins = (
            written.response_tokens[own],
            written.trained[own],
            np.flatnonzero(written.begins[own]),
        )
        texts = [TOKENIZER.decode(part) for part in np.split(tokens, begins)]
        assert texts == [first, *others] and TOKENIZER.decode(
            written.prompt_tokens[: written.prompt_offsets[1]]
        ) == opening("a")
        assert not trained[begins].any() and trained.sum() == (len(SCRIPT) + 1) * len(TURN)
        # Every turn is trained behind the very tokens that the engine had read when it wrote it.
        prompt = written.prompt_tokens[slice(*written.prompt_offsets[row : row + 2])].tolist()
        read = []
        for number, part in enumerate(np.split(np.arange(len(tokens)), begins)):
            starts = [place for place in part if trained[place] and (place == part[0] or not trained[place - 1])]
            read += [[*([] if number else prompt), *tokens[part[0] : place].tolist()] for place in starts]
        assert sorted(read) == sorted(one[2] for one in engine.asked if one[0] == id_)
        own_turns = (TURN, np.tile([-1, -2, -3, -4], len(read)) - np.repeat([len(one) for one in read], 4) / 64)
        assert tokens[trained].tolist() == len(read) * own_turns[0]
        assert np.array_equal(written.behaviour_logprobs[own][trained], own_turns[1])
        assert (counts[row].turns, counts[row].conversations) == (8, 4)
    seeds = [seed for id_, seed, *_ in engine.asked if id_ == IDS[0]]
    assert seeds == [turn_seed(SEEDS[0], turn) for turn in range(8)]
    assert written.rewards.tolist() == [0.5, 0.5]


def test_an_episode_has_room_for_what_all_its_conversations_read_and_write() -> None:
    whole = int(asked(SCRIPT)[0].lengths[0])
    for most in (whole, whole - 1, whole - 4, whole - len(TURN) + 1, whole // 2, 5):
        written, _, engine, _ = asked(SCRIPT, most)
        assert written.lengths[0] <= most and written.truncated.tolist() == 2 * [most < whole]
        assert len(engine.asked) == 2 * written.turn_counts[0]
    written, counts, *_ = asked(SCRIPT, max_turns=3)
    assert written.truncated.all() and (counts[0].turns, counts[0].conversations) == (3, 2)


def test_an_episode_begins_when_its_process_has_room() -> None:
    for room in (1, 2):
        written, counts, _, place = asked(SCRIPT, room=room, episodes_per_replica=room, attempts=1)
        assert not any(one.failed for one in counts) and written.turn_counts.tolist() == [8, 8]
        assert (place.refused > 0) == (room == 1)


def test_an_engine_that_has_nothing_to_write_while_an_environment_thinks_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that only the environment and the engine move; one episode of three turns."""
    now = [0.0]

    async def thinks(self: Tells, message: dict) -> Any:
        now[0] += 5
        return await answers(self, message)

    def writes(self: Spells, *arguments: Any, **keywords: Any) -> Any:
        now[0] += 7
        return generate(self, *arguments, **keywords)

    answers, generate = Tells.step, Spells.generate
    monkeypatch.setattr(Tells, "step", thinks)
    monkeypatch.setattr(Spells, "generate", writes)

    async def play() -> Episodes:
        episodes = episodes_of(Spells(), {})
        episodes.thinking = Thinking(lambda: now[0])
        await episodes.play(_row(requests(), 0), SamplingConfig(max_response_tokens=100), False)
        return episodes

    found = asyncio.run(play()).thinking
    assert found.idle_seconds == 3 * 5
    assert found.at_once(10) > 10  # it has waited


LONG = len(TURN) + len(TOKENIZER(FIRST)["input_ids"])
"""Tokens before the second turn."""


@pytest.mark.parametrize(
    ("settings", "text", "finish", "reward", "steps"),
    [
        ({"max_response_tokens": LONG + 2}, f"the<|end|>{FIRST}th", "length", 0.25, 1),  # cut: no end, and no answer to it
        ({"max_response_tokens": LONG}, "the<|end|>", "length", 0.25, 1),  # no room for a token after the answer
        ({"max_response_tokens": 2}, "th", "length", 0.0, 0),
        ({"max_turns": 2}, f"the<|end|>{FIRST}the<|end|>", "length", 0.25, 2),
        ({"max_turns": 3}, f"the<|end|>{FIRST}the<|end|>{SECOND}the<|end|>", "stop", 0.75, 3),
        ({"answers": [["", True, None]]}, "the<|end|>", "stop", 0.0, 1),
        ({"max_turn_tokens": 2}, f"th<|end|>{FIRST}th<|end|>{SECOND}th", "stop", 0.75, 3),
        ({"max_turn_tokens": 4}, f"the<|end|>{FIRST}the<|end|>{SECOND}the<|end|>", "stop", 0.75, 3),
        ({"max_turn_tokens": 2, "max_response_tokens": 2}, "th", "length", 0.0, 0),
    ],
)  # fmt: skip
def test_an_episode_ends_with_the_students_last_token(
    settings: dict, text: str, finish: str, reward: float, steps: int
) -> None:
    written, counts, _ = played(**settings)
    for row in range(2):
        assert text_of(written, row) == text
        assert FINISH_REASONS[written.finish_reasons[row]] == finish and written.rewards[row] == reward
        assert counts[row].failed == "" and written.trained[written.response_offsets[row + 1] - 1]
    assert [method for _, method, _ in Tells.seen].count("step") == 2 * steps


def test_a_turn_that_is_cut_is_told_as_it_is_and_its_end_is_context() -> None:
    written, _, engine = played(max_turn_tokens=2)
    assert {one[3] for one in engine.asked} == {2}
    said = [message["content"] for _, method, message in Tells.seen if method == "step"]
    assert said == 6 * ["th"]
    own = written.response_tokens[: written.response_offsets[1]]
    assert TOKENIZER.decode(own[written.trained[: written.response_offsets[1]]]) == "ththth"


def test_requests_may_have_fewer_turns_than_the_environment() -> None:
    async def play(**limits: Any) -> tuple[Trajectories, tuple[EpisodeCounts, ...]]:
        asked = pickle.loads(pickle.dumps(replace(requests(), **limits)))
        return await episodes_of(Spells(), {}).play(asked, SamplingConfig(max_response_tokens=100), False)

    for limits, turns, finish in (({"max_turns": 2}, 2, "length"), ({"max_turns": 3}, 3, "stop"), ({}, 3, "stop")):
        written, counts = asyncio.run(play(**limits))
        assert [one.turns for one in counts] == [turns, turns]
        assert {FINISH_REASONS[reason] for reason in written.finish_reasons} == {finish}


@pytest.mark.parametrize("attempts", [2, 3])
def test_what_failed_attempts_have_waited_is_counted(attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the environment moves: two attempts fail in their second step, the third takes three steps."""
    now = [0.0]

    async def thinks(self: Tells, message: dict) -> Any:
        now[0] += 5
        return await answers(self, message)

    answers = Tells.step
    monkeypatch.setattr(Tells, "step", thinks)
    monkeypatch.setattr("actors.rollout.episodes.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def play() -> Any:
        episodes = episodes_of(Spells(), {"fails": 2}, attempts=attempts)
        return await episodes.play(_row(requests(), 0), SamplingConfig(max_response_tokens=100), False)

    _, [counts] = asyncio.run(play())
    steps = 2 + 2 + (3 if attempts == 3 else 0)
    assert bool(counts.failed) == (attempts == 2)
    assert counts.waited_seconds == 5 * steps


def test_an_attempt_that_fails_is_repeated_with_the_same_draws() -> None:
    calm, _, engine = played()
    undisturbed = sorted(engine.asked)
    written, counts, engine = played(fails=2)
    for name in ("response_tokens", "response_offsets", "behaviour_logprobs", "trained", "rewards", "finish_reasons"):
        assert np.array_equal(getattr(written, name), getattr(calm, name)), name
    assert [one.retries for one in counts] == [2, 2] and [one.failed for one in counts] == ["", ""]
    twice = [one for one in undisturbed if one[1] in {turn_seed(seed, turn) for seed in SEEDS for turn in (0, 1)}]
    assert sorted(engine.asked) == sorted([*undisturbed, *twice, *twice])
    begun = {
        id_: [episode for episode, method, _ in Tells.seen if method == "reset" and episode.id == id_] for id_ in IDS
    }
    assert begun == {
        id_: [Episode(TrajectoryId(*id_), seed, n) for n in range(3)] for id_, seed in zip(IDS, SEEDS, strict=True)
    }
    assert [method for _, method, _ in Tells.seen].count("close") == 6


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"attempts": 2}, "step raised ValueError: broken (test_episodes.py, line"),
        ({"attempts": 2, "hangs": True, "step_timeout_seconds": 0.1}, "no answer within 0.1 s (environment.step_timeout_seconds)"),
        ({"attempts": 1, "hangs": True, "episode_timeout_seconds": 0.1}, "not over after 0.1 s (environment.episode_timeout_seconds)"),
    ],
)  # fmt: skip
def test_one_that_fails_in_all_attempts_says_why_and_takes_no_other_with_it(settings: dict, cause: str) -> None:
    calm = played()[0]
    written, counts, _ = played(fails=9, only=IDS[1][1], **settings)
    if "hangs" not in settings:  # a busy machine may be late with the other one, too
        assert counts[0].failed == "" and text_of(written, 0) == text_of(calm, 0)
    assert cause in counts[1].failed and counts[1].retries == settings["attempts"] - 1
    own = slice(*written.response_offsets[1:3])
    assert not written.trained[own].any() and written.rewards[1] == 0
    resets = [episode for episode, method, _ in Tells.seen if method == "reset" and episode.id == IDS[1]]
    assert len(resets) == settings["attempts"]


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        ([["go", False, 3e38], ["", True, 3e38]], "step: rewards of 6e+38 together, more than a 32-bit number holds"),
        ([["go", False, None], ["", True, -1e39]], "step: rewards of -1e+39 together"),
        ([["caf\udce9", False, 0.0]], "text that is not Unicode (a lone surrogate)"),
        ([[[{"role": 9999 * "r", "content": "go"}], False, 0.0]], "rrr…"),
    ],
)
def test_what_no_trajectory_can_hold_fails_the_episode(answers: list, cause: str) -> None:
    _, counts, _ = played(answers=answers, attempts=1)
    assert all(cause in one.failed and len(one.failed) < 600 for one in counts)


def test_messages_of_reset_are_the_prompt_and_a_missing_reward_is_told() -> None:
    written, counts, engine = played(first="Guess")
    prompt = TOKENIZER("<|user|>Guess<|end|>\n<|assistant|>")["input_ids"]
    assert written.prompt_tokens.tolist() == 2 * prompt and [one.prompt_tokens for one in counts] == 2 * [len(prompt)]
    assert engine.asked[0][2] == prompt
    limits = NO_LIMITS._replace(needs_reward=True)
    _, counts, _ = played(limits=limits, answers=[["", True, None]])
    assert all("over without a reward" in one.failed for one in counts), (
        "a rare path without one does not end a campaign"
    )
    assert played(limits=limits, answers=[["", True, 0.0]])[0].rewards.tolist() == [0, 0]


def test_messages_that_cannot_be_read_fail_their_episode_alone() -> None:
    limits = NO_LIMITS._replace(tokens=8)
    _, counts, engine = played(max_response_tokens=4, limits=limits, first="a long first message", attempts=1)
    assert not engine.asked and all("expected at most 4; prompts.max_prompt_tokens" in one.failed for one in counts)

    refusing = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no word') }}{% endif %}{% endfor %}"
    )

    async def play(**arguments: Any) -> list[str]:
        episodes = episodes_of(Spells(), arguments, attempts=1)
        template = {"chat_template": refusing + str(TOKENIZER.chat_template)}
        episodes._write = Continuation(TOKENIZER, frozenset({END}), template)
        _, counts = await episodes.play(requests(), SamplingConfig(max_response_tokens=100), False)
        return [one.failed for one in counts]

    for arguments, where in (({"first": "no"}, "the first messages"), ({}, "step")):
        told = f"{where}: the chat template refuses messages of user"
        assert all(one.startswith(told) for one in asyncio.run(play(**arguments)))
    assert asyncio.run(play(answers=[["yes", False, None], ["", True, 1.0]])) == ["", ""]


def test_a_text_that_is_far_too_long_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = Continuation._ids

    def short(self: Continuation, text: str) -> list[int]:
        assert len(text) < 10_000
        return ids(self, text)

    monkeypatch.setattr(Continuation, "_ids", short)
    far, limits = 100_000 * "x", NO_LIMITS._replace(tokens=200)
    for limit in (NO_LIMITS, limits):
        written, counts, _ = played(answers=[[far, False, 0.5]], limits=limit)
        assert (
            written.truncated.all()
            and written.rewards.tolist() == [0.5, 0.5]
            and [one.turns for one in counts] == [1, 1]
        )
    _, counts, engine = played(limits=limits, first=far, attempts=1)
    assert not engine.asked and all("tokens or more, expected at most 100;" in one.failed for one in counts)
    assert asked([(None, far)], most=100)[0].truncated.all()
    for text in ("no", "7 again, and a longer text", 50 * " ", 40 * "é"):
        write, messages = Continuation(TOKENIZER, frozenset({END})), [{"role": "user", "content": text}]
        assert write.least(messages) <= len(TOKENIZER(text)["input_ids"])


def test_an_aborted_episode_ends_at_once_and_the_others_go_on() -> None:
    one = requests()
    alone = [
        replace(one, ids=one.ids[row : row + 1], seeds=one.seeds[row : row + 1], prompt_tokens=one.prompts[row],
                prompt_offsets=offsets_of([len(one.prompts[row])]), asides=one.asides[row : row + 1])
        for row in range(2)
    ]  # fmt: skip

    async def play() -> Any:
        episodes = episodes_of(Spells(), {"fails": 1, "hangs": True})
        sampling = SamplingConfig(max_response_tokens=100)
        calls = [asyncio.create_task(episodes.play(each, sampling, False)) for each in alone]
        while sum(method == "step" for _, method, _ in Tells.seen) < 4:
            await asyncio.sleep(0.001)
        episodes.abort(one.ids[1:])
        with pytest.raises(AbortedError):
            await calls[1]
        with pytest.raises(TimeoutError):  # it still waits for its environment
            await asyncio.wait_for(asyncio.shield(calls[0]), 0.05)
        episodes.abort()
        with pytest.raises(AbortedError):
            await calls[0]

    asyncio.run(play())
    assert not any(episode.attempt for episode, *_ in Tells.seen)


class Place:
    """A process that hosts environments: remembers what it is asked, and answers a step at once or never."""

    def __init__(self, hangs: bool = False):
        self.hangs, self.steps, self.cancelled = hangs, [], 0

    async def reset(self, key: str, episode: Episode, record: dict) -> Begun:
        return Begun()

    async def step(self, key: str, *arguments: Any) -> Answer:
        self.steps.append(arguments)
        try:
            if self.hangs:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Answer([], True, 1.0)

    async def close(self, key: str) -> None: ...


def with_place(engine: Any, place: Place | None, **settings: Any) -> Episodes:
    there = None if place is None else LocalEnvironments([place])
    config = EnvironmentConfig(**{"name": f"{__name__}:Tells", **settings})
    return Episodes(engine, config, Continuation(TOKENIZER, frozenset({END})), NO_LIMITS, there)


def test_a_program_is_told_of_the_tokens_of_a_turn_without_the_one_that_ended_it() -> None:
    class Newer(Spells):
        """New weights arrive in the middle of a turn."""

        def generate(self, requests: Requests, sampling: SamplingConfig, *, greedy: bool = False) -> Any:
            logprobs, versions = [-0.5, -0.25, -0.125, -1.0], [4, 4, 5, 5]
            return done(trajectories_of(requests, [Response(TURN, logprobs, versions, "stop")]))

    async def play(**settings: Any) -> list[tuple[Any, ...]]:
        place = Place()
        episodes = with_place(Newer(), place, **settings)
        await episodes.play(_row(requests(), 0), SamplingConfig(max_response_tokens=100), False)
        return place.steps

    said = {"role": "assistant", "content": "the"}
    turn = Turn(["t", "h", "e"], [-0.5, -0.25, -0.125], 4, len(requests().prompts[0]), 5)
    assert asyncio.run(play(name=None, command=["true"])) == [(said, turn)]
    assert asyncio.run(play()) == [(said,)], "a class of the user's own takes the message alone"


def test_an_episode_that_is_given_up_takes_its_question_back() -> None:
    async def play() -> None:
        place = Place(hangs=True)
        episodes = with_place(Spells(), place)
        call = asyncio.create_task(episodes.play(_row(requests(), 0), SamplingConfig(max_response_tokens=100), False))
        while not place.steps:
            await asyncio.sleep(0)
        episodes.abort()
        with pytest.raises(AbortedError):
            await call
        await asyncio.sleep(0)
        assert place.cancelled == 1

    asyncio.run(play())


def test_seconds_without_any_process_for_environments_are_waiting_for_them() -> None:
    async def play() -> None:
        episodes, place = with_place(Spells(), None), Place()
        call = asyncio.create_task(episodes.play(_row(requests(), 0), SamplingConfig(max_response_tokens=100), False))
        await asyncio.sleep(0.01)
        assert episodes.thinking._asking == 1 and not place.steps
        episodes.reach(LocalEnvironments([place]))
        await call
        assert episodes.thinking._asking == 0 and episodes.thinking.idle_seconds > 0

    asyncio.run(play())


def test_the_seconds_of_an_episode_are_those_of_the_engine_too() -> None:
    class Slow(Spells):
        def generate(self, *arguments: Any, **keywords: Any) -> Any:
            time.sleep(0.02)
            return super().generate(*arguments, **keywords)

    episodes = with_place(Slow(), Place())
    _, [counts] = asyncio.run(episodes.play(_row(requests(), 0), SamplingConfig(max_response_tokens=100), False))
    assert 0 < counts.waited_seconds <= counts.seconds - 0.02
