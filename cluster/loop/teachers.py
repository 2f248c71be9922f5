"""The teachers: which of them scores which prompt, what each reads, and how a batch is divided among their actors."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from actors.config import SamplingConfig, TeacherConfig
from actors.data.prompts import PromptSet
from actors.errors import CampaignError, UserError
from actors.trajectory import Limits, Prompts, Requests, RolloutCounts, offsets_of, ragged_rows
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.slots import split_evenly

REPLICA_TOLERANCE = 0.02
"""Nats a token by which replicas may differ: more than kernels do, less than other weights would."""


def route(domain: str | None, teachers: Mapping[str, TeacherConfig], where: str) -> dict[str, float]:
    """Teacher -> log of its share in the mixture that scores a prompt of this domain.

    The teachers that name the domain; if none does, those that name no domain. UserError: nobody is left.
    """
    chosen = [name for name, teacher in teachers.items() if domain is not None and domain in teacher.domains]
    chosen = chosen or [name for name, teacher in teachers.items() if not teacher.domains]
    if not chosen:
        known = sorted({known for teacher in teachers.values() for known in teacher.domains})
        expected = f"a domain that a teacher names ({', '.join(known)}), or a teacher without domains"
        raise UserError(where, f"domain {domain}", expected)
    total = math.fsum(teachers[name].weight for name in chosen)
    return {name: math.log(teachers[name].weight / total) for name in chosen}


def routes(domains: Sequence[str | None], teachers: Mapping[str, TeacherConfig], where: str) -> list[dict[str, float]]:
    """`route` for every prompt; `where` names the file."""
    seen: dict[str | None, dict[str, float]] = {}
    for number, domain in enumerate(domains, 1):
        if domain not in seen:
            seen[domain] = route(domain, teachers, f"{where}, prompt {number}")
    return [seen[domain] for domain in domains]


class Lessons(NamedTuple):
    """What the teachers do with one set of prompts."""

    routes: list[dict[str, float]]
    """For each prompt: teacher -> log of its share."""
    privileged: dict[str, PromptSet]
    """Teacher -> the prompts as it reads them, for teachers with a `prompt_template` or a `tokenizer`."""
    stop_token_ids: list[int] = []  # noqa: RUF012
    """What ends a response that a teacher writes."""


class Scored(NamedTuple):
    """The answer to `Teachers.score`."""

    references: list[tuple[Any, ...]]
    """[B] of each trajectory the references of TeacherScores that hold it, one for each of its teachers."""
    missing: int
    """Tokens without a finite score."""
    busy_seconds: float


class Teachers:
    """All teachers' fleets, and the lessons for one set of prompts."""

    def __init__(self, fleets: dict[str, Fleet], lessons: Lessons, *, each: bool = False):
        """each: teachers return one object for each trajectory, so that a rank of the learner can be sent only its own;
        else one for each call."""
        self.fleets = fleets
        self._lessons, self._each = lessons, each

    async def score(self, ids: np.ndarray, trajectories: Sequence[Any], *, parts: int | None = None) -> Scored:
        """Has the trajectories with these ids [B, 3], held by the references, scored by their teachers.

        Each teacher takes its share in the order of `ids`, in so many parts, or one for each of its actors: who scores
        what, and in which company, is a function of `ids` alone.
        """
        calls, rows_of = [], []
        for name, fleet in self.fleets.items():
            mine = [row for row in range(len(ids)) if name in self._lessons.routes[ids[row, 1]]]
            for part in split_evenly(len(mine), parts or len(fleet.replicas)) if mine else []:
                rows_of.append(mine[part.start : part.stop])
                calls.append(self._call(name, ids[rows_of[-1]], trajectories))
        answers = await asyncio.gather(*calls)
        references: list[tuple[Any, ...]] = [()] * len(ids)
        for rows, (_, found) in zip(rows_of, answers, strict=True):
            for row, reference in zip(rows, found, strict=True):
                references[row] += (reference,)
        return Scored(
            references,
            sum(counts.missing for counts, _ in answers),
            sum(counts.busy_seconds for counts, _ in answers),
        )

    async def room(self, calls: int) -> None:
        """Waits until some actor of every teacher has fewer than `calls` calls under way."""
        for fleet in self.fleets.values():
            await fleet.room(calls)

    async def compare_replicas(self) -> None:
        """CampaignError where actors of one teacher do not agree about the probe of their self-test."""
        for name, fleet in self.fleets.items():
            found = [status["probe_logprob"] for status in await fleet.call_each("status")]
            if max(found) - min(found) > REPLICA_TOLERANCE:
                values = ", ".join(f"{value:.4f}" for value in found)
                raise CampaignError(f"the actors of teachers.{name} disagree about one text: mean log-probs {values}")

    async def write(
        self, prompts: PromptSet, max_response_tokens: int, stop_token_ids: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Greedy responses to all prompts, each by the teacher with the largest share: tokens [N], offsets [M + 1]."""
        best = [max(route, key=lambda name: route[name]) for route in self._lessons.routes]
        written: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)

        async def part(name: str, rows: list[int]) -> None:
            read = _prompts_of(self._lessons.privileged.get(name, prompts), np.array(rows))
            response, response_offsets = await self.fleets[name].call(
                "generate", read, Limits(max_response_tokens, stop_token_ids)
            )
            for row, answer in zip(rows, np.split(response, response_offsets[1:-1]), strict=True):
                written[row] = answer

        calls = []
        for name, fleet in self.fleets.items():
            mine = [row for row, chosen in enumerate(best) if chosen == name]
            for rows in split_evenly(len(mine), max(len(fleet.replicas), -(-len(mine) // 64))) if mine else []:
                calls.append(part(name, mine[rows.start : rows.stop]))
        await asyncio.gather(*calls)
        return np.concatenate(written), offsets_of(map(len, written))

    async def sample(self, asked: Requests, version: int, sampling: SamplingConfig) -> tuple[RolloutCounts, Any]:
        """Responses that the only teacher writes in place of the student; a reference of Trajectories of this version."""
        [(name, fleet)] = self.fleets.items()
        prompts = self._lessons.privileged.get(name)
        told = _prompts_of(prompts, asked.ids[:, 1]) if prompts else None
        stop = self._lessons.stop_token_ids
        return await fleet.call("sample", asked, version, sampling, stop, told, returns=2, units=len(asked.ids))

    async def _call(self, name: str, ids: np.ndarray, trajectories: Sequence[Any]) -> tuple[Any, list[Any]]:
        """(counts, [B] the reference of the scores that hold each trajectory)."""
        prompts = self._lessons.privileged.get(name)
        counts, *scores = await self.fleets[name].call(
            "score_each" if self._each else "score",
            ids,
            *trajectories,
            returns=1 + len(ids) if self._each else 2,
            units=len(ids),
            prompts=_prompts_of(prompts, ids[:, 1]) if prompts else None,
            log_weights=np.array([self._lessons.routes[prompt][name] for prompt in ids[:, 1]], np.float32),
        )
        return counts, scores if self._each else scores * len(ids)


def _prompts_of(prompts: PromptSet, rows: np.ndarray) -> Prompts:
    """The prompts with these numbers [B]."""
    return Prompts(ragged_rows(prompts.tokens, prompts.offsets, rows), offsets_of(prompts.lengths_of(rows)))
