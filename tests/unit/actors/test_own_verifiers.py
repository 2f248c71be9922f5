"""What a verifier of the user's own may ask for and return: record and prompt, coroutines, named parts; and verifiers by domain."""

import asyncio
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

from actors.config import VerifierConfig
from actors.data.judge import AT_ONCE, Judge
from actors.data.verifiers import asks_for, make_verifier
from actors.errors import UserError
from actors.trajectory import Aside

HERE = "tests.unit.actors.test_own_verifiers"
ASIDE = {"prompt": "1+1=", "record": {"answer": "2", "level": 3}}


def plain(text: str, gold: str | None) -> float:
    return float(text == gold)


def by_record(response: str, record: dict[str, Any]) -> float:
    return float(response == record["answer"]) * record["level"]


def everything(response: str, reference: str | None, *, record: dict[str, Any], prompt: str) -> float:
    return float((response, reference, record["level"], prompt) == ("2", None, 3, "1+1="))


async def later(response: str, reference: str | None) -> float:
    await asyncio.sleep(0.001)
    return 0.25


async def never(response: str, reference: str | None) -> float:
    await asyncio.sleep(60)
    return 1.0


IN_FLIGHT = [0, 0]
"""Calls of `counted` that have begun and not ended, and the most there were."""


async def counted(response: str, reference: str | None) -> dict[str, float]:
    if response == "exit":
        os._exit(3)
    if response == "never":
        await asyncio.Event().wait()
    if response == "raise":
        raise ValueError(response)
    IN_FLIGHT[0] += 1
    IN_FLIGHT[1] = max(IN_FLIGHT)
    for _ in range(3):
        await asyncio.sleep(0)
    IN_FLIGHT[0] -= 1
    return {"reward": float(response == reference), "most": IN_FLIGHT[1]}


def first_character(response: str, reference: str | None) -> float:
    return float(response[0] == "2")


def parts(response: str, reference: str | None) -> dict[str, Any]:
    return {"reward": 1, "format": 0.5, "length": len(response)}


def wrong(response: str, reference: str | None) -> Any:
    return {"text": "1", "nan": {"reward": 1, "x": math.nan}, "none": {"x": 1}, "name": {"reward": 1, "a/b": 1}}[
        response
    ]


def other_arguments(record: dict[str, Any], response: str, more: int) -> float:
    return 0.0


def verifier(name: str) -> Any:
    return make_verifier(VerifierConfig(f"{HERE}:{name}"))


def test_a_function_gets_what_its_parameters_name() -> None:
    assert verifier("plain")("2", "2", **ASIDE) == 1.0 == verifier("plain")("2", "2")
    assert verifier("by_record")("2", None, **ASIDE) == 3.0
    assert verifier("everything")("2", None, **ASIDE) == 1.0
    assert asks_for(f"{HERE}:everything", "v") == ["prompt", "record"] and asks_for(f"{HERE}:plain", "v") == []
    with pytest.raises(UserError, match=r"other_arguments\(record.*expected a function of two strings"):
        verifier("other_arguments")


def test_a_coroutine_is_awaited_and_named_parts_come_with_the_reward() -> None:
    assert verifier("later")("x", None) == 0.25
    reward = verifier("parts")("abc", None)
    assert reward == 1.0 and reward.parts == {"format": 0.5, "length": 3.0}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", "returned '1', expected a finite reward"),
        ("nan", "'x': nan.*expected a finite reward"),
        ("none", "expected a mapping with 'reward'"),
        ("name", "'a/b': 1"),
    ],
)
def test_what_is_no_reward_is_told(what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        verifier("wrong")(what, None)


@pytest.fixture
def judge() -> Iterator[Judge]:
    own = {
        name: VerifierConfig(f"{HERE}:{name}", timeout_seconds=0.5 if name == "never" else 60)
        for name in ("by_record", "parts", "never", "counted")
    }
    judge = Judge(VerifierConfig("exact"), by_domain=own)
    yield judge
    judge.close()


def test_each_domain_is_judged_by_its_own_verifier_in_a_process_of_its_own(judge: Judge) -> None:
    record = '{"answer": "2", "level": 3}'
    asides = [Aside("by_record", "1+1=", record), Aside("parts"), Aside("unknown"), Aside(), Aside("never")]
    found = judge.rewards(["2"] * 5, [None, None, "2", "3", None], asides)
    assert found.rewards.tolist() == [3.0, 1.0, 1.0, 0.0, 0.0]
    assert found.parts == ({}, {"format": 0.5, "length": 1.0}, {}, {}, {})
    assert found.failed == ["no verdict within 0.5 s (evaluation.verifiers.never.timeout_seconds)"]
    assert judge.of("by_record").asks == ["record"] and judge.asks == []


def test_without_a_reference_the_prompt_is_the_response_that_is_tried() -> None:
    one = Judge(VerifierConfig(f"{HERE}:first_character"))
    assert one.try_references([None, "2"], 60.0, [Aside(prompt="1+1=")] * 2) == (2, None)
    one.close()


def test_a_coroutine_judges_several_responses_at_once_and_no_more_than_the_bound(judge: Judge) -> None:
    count = 2 * AT_ONCE + 3
    found = judge.rewards(
        [str(i) for i in range(count)], [str(i - i % 2) for i in range(count)], [Aside("counted")] * count
    )
    assert found.rewards.tolist() == [1.0 - i % 2 for i in range(count)] and not found.failed
    assert found.parts[-1]["most"] == AT_ONCE


@pytest.mark.parametrize(
    ("what", "why"), [("raise", "ValueError"), ("never", "no verdict within 1 s"), ("exit", "exit status 3")]
)
def test_one_that_fails_among_several_costs_the_others_nothing(what: str, why: str) -> None:
    judge = Judge(VerifierConfig(f"{HERE}:counted", timeout_seconds=1 if what == "never" else 60))
    found = judge.rewards(["a", what, "b"], ["a", "a", "b"])
    judge.close()
    assert found.rewards.tolist() == [1.0, 0.0, 1.0]
    assert len(found.failed) == 1 and why in found.failed[0]
