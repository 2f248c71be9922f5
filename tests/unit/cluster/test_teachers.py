"""Which teacher scores which prompt (domains, mixtures, privileged prompts), and the division among its actors."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from actors.config import TeacherConfig
from actors.errors import CampaignError, UserError
from actors.prompts.columns import Coded, Texts
from actors.prompts.prompt_set import PromptSet
from actors.teacher.base import TeacherCounts
from actors.trajectory import offsets_of
from cluster.loop.teachers import PromptRoutes, Teachers, route, routes

TEACHERS = {
    "maths": TeacherConfig("m", domains=["maths", "physics"], weight=3.0),
    "physics": TeacherConfig("p", domains=["physics"], weight=1.0),
    "other": TeacherConfig("o"),
}


class MadeUpFleet:
    """Stands for a fleet: remembers what it was asked."""

    def __init__(self, name: str, replicas: int = 1, probes: tuple[float, ...] = (-1.0,)):
        self.name, self.replicas, self.probes = name, [None] * replicas, probes
        self.scored: list[dict[str, Any]] = []
        self.prompts: list[np.ndarray] = []

    async def call(self, method: str, *arguments: Any, returns: int = 1, units: int = 1, **keywords: Any) -> Any:
        if method == "score":
            self.scored.append({"ids": arguments[0].tolist(), "references": arguments[1:], **keywords})
            return TeacherCounts(1, 0.5), f"scores of {self.name}"
        tokens, offsets = arguments[0]
        self.prompts += np.split(tokens, offsets[1:-1])
        return tokens * 10, offsets  # the answer to a prompt is ten times the prompt

    async def call_each(self, method: str) -> list[dict[str, float]]:
        return [{"probe_logprob": probe} for probe in self.probes]


def prompt_set(tokens: list[list[int]]) -> PromptSet:
    none = [None] * len(tokens)
    flat = np.concatenate(tokens).astype(np.int32)
    return PromptSet(
        tokens=flat,
        offsets=offsets_of(map(len, tokens)),
        references=Texts.of(none),
        domains=Coded.of(none),
        texts=Texts.of([]),
    )


def test_a_prompt_goes_to_the_teachers_of_its_domain_by_their_shares() -> None:
    assert route("maths", TEACHERS, "x") == {"maths": 0.0}
    shares = {name: math.exp(log) for name, log in route("physics", TEACHERS, "x").items()}
    assert shares == pytest.approx({"maths": 0.75, "physics": 0.25})
    assert route("cooking", TEACHERS, "x") == route(None, TEACHERS, "x") == {"other": 0.0}


def test_a_domain_without_a_teacher_is_named_with_its_prompt() -> None:
    named = {name: teacher for name, teacher in TEACHERS.items() if teacher.domains}
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: found domain math, expected .* \(maths, physics\)"):
        routes(Coded.of(["maths", "math"]), named, lambda row: f"p.jsonl, line {row + 1}")


def score(fleets: dict[str, MadeUpFleet], prompt_routes: PromptRoutes, ids: np.ndarray) -> Any:
    return asyncio.run(Teachers(fleets, prompt_routes).score(ids, ["t0", "t1"]))  # type: ignore[arg-type]


def test_each_teacher_scores_its_own_in_parts_for_its_actors() -> None:
    fleets = {
        "maths": MadeUpFleet("maths", replicas=2),
        "physics": MadeUpFleet("physics"),
        "other": MadeUpFleet("other"),
    }
    prompt_routes = PromptRoutes(routes(Coded.of(["maths", "physics", "maths", "maths"]), TEACHERS, str), {})
    ids = np.array([(0, prompt, 0) for prompt in (3, 1, 0, 2)])
    found = score(fleets, prompt_routes, ids)
    assert [call["ids"] for call in fleets["maths"].scored] == [ids[:2].tolist(), ids[2:].tolist()]
    assert [call["ids"] for call in fleets["physics"].scored] == [ids[1:2].tolist()]
    assert fleets["other"].scored == []
    assert np.exp(fleets["maths"].scored[0]["log_weights"]) == pytest.approx([1.0, 0.75])
    assert np.exp(fleets["physics"].scored[0]["log_weights"]) == pytest.approx([0.25])
    assert all(call["references"] == ("t0", "t1") and call["prompts"] is None for call in fleets["maths"].scored)
    assert (found.missing, found.busy_seconds) == (3, 1.5)
    alone, both = ("scores of maths",), ("scores of maths", "scores of physics")
    assert found.references == [alone, both, alone, alone]


def test_a_privileged_teacher_is_given_its_own_prompts() -> None:
    fleets = {"other": MadeUpFleet("other")}
    prompt_routes = PromptRoutes(
        routes(Coded.of([None] * 3), {"other": TEACHERS["other"]}, str), {"other": prompt_set([[1], [2, 3], [4]])}
    )
    score(fleets, prompt_routes, np.array([(0, 2, 0), (0, 1, 0), (0, 1, 1)]))
    tokens, offsets = fleets["other"].scored[0]["prompts"]
    assert tokens.tolist() == [4, 2, 3, 2, 3]
    assert offsets.tolist() == [0, 1, 3, 5]


def test_the_teacher_with_the_largest_share_answers_in_the_prompts_order() -> None:
    fleets = {"maths": MadeUpFleet("maths"), "physics": MadeUpFleet("physics"), "other": MadeUpFleet("other")}
    prompt_routes = PromptRoutes(routes(Coded.of(["physics", None, "maths"]), TEACHERS, str), {})
    teachers = Teachers(fleets, prompt_routes)  # type: ignore[arg-type]
    tokens, offsets = asyncio.run(teachers.generate(prompt_set([[1, 2], [3], [4]]), 5, [0]))
    assert tokens.tolist() == [10, 20, 30, 40] and offsets.tolist() == [0, 2, 3, 4]
    assert [p.tolist() for p in fleets["maths"].prompts] == [[1, 2], [4]]
    assert [p.tolist() for p in fleets["other"].prompts] == [[3]] and not fleets["physics"].prompts


def test_replicas_that_disagree_about_one_text_are_found() -> None:
    prompt_routes = PromptRoutes([], {})
    agreeing = Teachers({"other": MadeUpFleet("other", probes=(-2.0, -2.001))}, prompt_routes)  # type: ignore[dict-item]
    asyncio.run(agreeing.compare_replicas())
    odd = Teachers({"other": MadeUpFleet("other", probes=(-2.0, -2.0, -2.5))}, prompt_routes)  # type: ignore[dict-item]
    with pytest.raises(CampaignError, match=r"teachers\.other disagree .* -2\.0000, -2\.0000, -2\.5000"):
        asyncio.run(odd.compare_replicas())


def test_a_teacher_whose_context_is_not_known_scores_its_longest_text_before_the_start() -> None:
    class Short(MadeUpFleet):
        async def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
            assert method == "full_length_test"
            raise UserError("teachers.other.urls", f"refuses {arguments[0]} tokens", "a longer context")

    panel = Teachers({"other": Short("other")}, PromptRoutes([], {}, longest={"other": 900}))  # type: ignore[dict-item]
    with pytest.raises(UserError, match="refuses 900 tokens"):
        asyncio.run(panel.try_longest())


def test_weights_of_any_size_are_shares() -> None:
    for weight in (1e308, 5e-324, 3.0):
        found = route(None, {name: TeacherConfig(model="m", weight=weight) for name in "ab"}, "x")
        assert found == {"a": math.log(0.5), "b": math.log(0.5)}
