"""Calls to the teachers: which teachers score which prompt, what each reads, and how a batch is divided among actors."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from actors.config import SamplingConfig, TeacherConfig
from actors.errors import CampaignError, UserError
from actors.prompts.columns import Coded
from actors.prompts.prompt_set import PromptSet, requests
from actors.trajectory import Limits, Prompts, Requests, RolloutCounts, offsets_of, ragged_rows
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.work import split_evenly

REPLICA_TOLERANCE = 0.02
"""Nats a token by which actors of one teacher may differ: more than kernels do, less than other weights would."""


def route(domain: str | None, teachers: Mapping[str, TeacherConfig], where: str) -> dict[str, float]:
    """Teacher -> log of its share in the mixture that scores a prompt of this domain; the shares add up to 1.

    These are the teachers that name the domain or, if none does, those that name no domain. where: for the message.
    UserError: no teacher is left.
    """
    chosen = [name for name, teacher in teachers.items() if domain is not None and domain in teacher.domains]
    chosen = chosen or [name for name, teacher in teachers.items() if not teacher.domains]
    if not chosen:
        known = sorted({known for teacher in teachers.values() for known in teacher.domains})
        expected = f"a domain that a teacher names ({', '.join(known)}), or a teacher without domains"
        raise UserError(where, f"domain {domain}", expected)
    # In units of a power of two, which rounds nothing: the sum of two large weights is no float.
    _, unit = math.frexp(max(teachers[name].weight for name in chosen))
    weights = {name: math.ldexp(teachers[name].weight, -unit) for name in chosen}
    total = math.fsum(weights.values())
    return {name: math.log(weight / total) for name, weight in weights.items()}


def routes(
    domains: Coded[str | None], teachers: Mapping[str, TeacherConfig], where: Callable[[int], str]
) -> Coded[dict[str, float]]:
    """The `route` of every prompt. where: names a prompt by its number, for the message."""

    def own(domain: str | None) -> dict[str, float]:
        try:
            return route(domain, teachers, "")
        except UserError as error:
            first = int(np.argmax(domains.where(lambda one: one == domain)))
            raise UserError(where(first), error.found, error.expected) from error

    return domains.each(own)


class PromptRoutes(NamedTuple):
    """Which teachers score each prompt of a set, and how they read it.

    Example, two prompts, the second scored by two teachers:
    PromptRoutes(routes=[{"maths": 0.0}, {"maths": -0.69, "code": -0.69}], privileged={})
    """

    routes: Sequence[dict[str, float]]
    """[prompts] teacher -> log of its share in the mixture."""
    privileged: dict[str, PromptSet]
    """Teacher -> the same prompts as it reads them, for teachers with a `prompt_template` or a `tokenizer`."""
    stop_token_ids: list[int] = []  # noqa: RUF012 (nothing changes it in place)
    """Tokens that end a response that a teacher generates; the first of them is its end of text."""
    longest: dict[str, int] = {}  # noqa: RUF012
    """Teacher -> tokens of the longest text that it may be asked to score, for those whose context is not known here."""


class TeacherAnswer(NamedTuple):
    """The answer to `Teachers.score`."""

    references: list[tuple[Any, ...]]
    """[B] for each trajectory, one reference for each of its teachers: of TeacherScores that hold it, and perhaps others."""
    missing: int
    """Tokens without a finite score."""
    busy_seconds: float
    """Seconds that the teacher actors worked for it, summed."""
    refused: dict[int, str] = {}  # noqa: RUF012
    """Row of a trajectory that a teacher cannot score at all -> why."""
    processor_seconds: float = 0.0
    """Processor time of the teacher actors, summed."""


class Teachers:
    """The fleets of all teachers, and the routes of one set of prompts."""

    def __init__(self, fleets: dict[str, Fleet], prompt_routes: PromptRoutes, *, each: bool = False):
        """each: teachers return one object for each trajectory, so that each rank of the learner is sent only its own;
        otherwise one object for each call."""
        self.fleets = fleets
        self._routes, self._each = prompt_routes, each

    async def score(self, ids: np.ndarray, trajectories: Sequence[Any], *, parts: int | None = None) -> TeacherAnswer:
        """Lets their teachers score the trajectories with these ids [B, 3], and waits for all scores.

        trajectories: references that hold these ids, and perhaps others. parts: calls to each teacher, by default one
        for each of its actors. A teacher gets its share in the order of `ids`, so which trajectories are computed
        together depends on `ids` alone, not on which actor is free. Errors: see Fleet.call.
        """
        calls, rows_of = [], []
        for name, fleet in self.fleets.items():
            mine = [row for row in range(len(ids)) if name in self._routes.routes[ids[row, 1]]]
            for part in split_evenly(len(mine), parts or len(fleet.replicas)) if mine else []:
                rows_of.append(mine[part.start : part.stop])
                calls.append(self._call(name, ids[rows_of[-1]], trajectories))
        answers = await asyncio.gather(*calls)
        # Calls are in the order of the teachers, so each trajectory gets its references in that order too.
        references: list[tuple[Any, ...]] = [()] * len(ids)
        for rows, (_, found) in zip(rows_of, answers, strict=True):
            for row, reference in zip(rows, found, strict=True):
                references[row] += (reference,)
        refused = {
            rows[row]: reason
            for rows, (counts, _) in zip(rows_of, answers, strict=True)
            for row, reason in counts.refused.items()
        }
        return TeacherAnswer(
            references,
            sum(counts.missing for counts, _ in answers),
            sum(counts.busy_seconds for counts, _ in answers),
            refused,
            sum(counts.processor_seconds for counts, _ in answers),
        )

    def actors(self) -> tuple[int, int]:
        """(the fewest actors that a teacher has, the fewest idle ones of one); (1, 1) without teachers."""
        counts = [(len(fleet.replicas), sum(not one.calls for one in fleet.replicas)) for fleet in self.fleets.values()]
        return min((count for count, _ in counts), default=1), min((idle for _, idle in counts), default=1)

    async def room(self, calls: int) -> None:
        """Waits until every teacher has an actor with fewer than `calls` calls under way."""
        for fleet in self.fleets.values():
            await fleet.room(calls)

    async def compare_replicas(self) -> None:
        """Compares the self-tests of each teacher's actors. CampaignError: they differ, as if they held other weights."""
        for name, fleet in self.fleets.items():
            found = [status["probe_logprob"] for status in await fleet.call_each("status")]
            if max(found) - min(found) > REPLICA_TOLERANCE:
                values = ", ".join(f"{value:.4f}" for value in found)
                raise CampaignError(f"the actors of teachers.{name} disagree about one text: mean log-probs {values}")

    async def try_longest(self) -> None:
        """Lets each teacher whose context is not known here score its longest text. UserError: it cannot."""
        for name, tokens in self._routes.longest.items():
            await self.fleets[name].call("full_length_test", tokens)

    async def try_writing(self, prompts: PromptSet, sampling: SamplingConfig) -> None:
        """Lets the only teacher write a token for the first prompt. UserError: it cannot."""
        asked = requests(prompts, np.zeros((1, 3), np.int64), 0)
        counts, _ = await self.sample(asked, 0, replace(sampling, max_response_tokens=1))
        for cause in counts.refused.values():
            expected = "a teacher that writes the student's tokens, and says them by their ids"
            raise UserError(f"teachers.{next(iter(self.fleets))}", f"no response to a prompt ({cause})", expected)

    async def generate(
        self, prompts: PromptSet, max_response_tokens: int, stop_token_ids: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Greedy responses of the teachers to all M prompts: tokens [N], offsets [M + 1].

        Each prompt is answered by the teacher with the largest share in its mixture.
        """
        best = [max(route, key=lambda name: route[name]) for route in self._routes.routes]
        responses: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)

        async def part(name: str, rows: list[int]) -> None:
            read = _prompts_of(self._routes.privileged.get(name, prompts), np.array(rows))
            response, response_offsets = await self.fleets[name].call(
                "generate", read, Limits(max_response_tokens, stop_token_ids)
            )
            for row, answer in zip(rows, np.split(response, response_offsets[1:-1]), strict=True):
                responses[row] = answer

        calls = []
        for name, fleet in self.fleets.items():
            mine = [row for row, chosen in enumerate(best) if chosen == name]
            # At least a call for each actor, and at most 64 prompts in one, so that actors that finish early get more.
            for rows in split_evenly(len(mine), max(len(fleet.replicas), -(-len(mine) // 64))) if mine else []:
                calls.append(part(name, mine[rows.start : rows.stop]))
        await asyncio.gather(*calls)
        return np.concatenate(responses), offsets_of(map(len, responses))

    async def sample(self, asked: Requests, version: int, sampling: SamplingConfig) -> tuple[RolloutCounts, Any]:
        """Lets the only teacher sample responses in the student's place, for estimators that train on the teacher's text.

        Returns the counts, and a reference of Trajectories whose tokens carry this weight version.
        """
        [(name, fleet)] = self.fleets.items()
        prompts = self._routes.privileged.get(name)
        own_prompts = _prompts_of(prompts, asked.ids[:, 1]) if prompts else None
        stop = self._routes.stop_token_ids
        return await fleet.call("sample", asked, version, sampling, stop, own_prompts, returns=2, units=len(asked.ids))

    async def _call(self, name: str, ids: np.ndarray, trajectories: Sequence[Any]) -> tuple[Any, list[Any]]:
        """(counts, [B] for each trajectory the reference of the scores that hold it)."""
        prompts = self._routes.privileged.get(name)
        counts, *scores = await self.fleets[name].call(
            "score_each" if self._each else "score",
            ids,
            *trajectories,
            returns=1 + len(ids) if self._each else 2,
            units=len(ids),
            prompts=_prompts_of(prompts, ids[:, 1]) if prompts else None,
            log_weights=np.array([self._routes.routes[prompt][name] for prompt in ids[:, 1]], np.float32),
        )
        return counts, scores if self._each else scores * len(ids)


def _prompts_of(prompts: PromptSet, rows: np.ndarray) -> Prompts:
    """The prompts with these numbers [B]."""
    return Prompts(ragged_rows(prompts.tokens, prompts.offsets, rows), offsets_of(prompts.lengths_of(rows)))
