"""Exposure bias: the reverse KL by position, on prefixes that the student has written and on prefixes that the teacher has.

Where slips add up, the student comes to contexts that its teacher never leads to, and is further from it there. At a prefix that
the teacher has written, the student draws one token and both score it: log pi - log q, the same estimate as on its own text.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from actors.config import SamplingConfig
from actors.errors import CampaignError
from actors.prompts.prompt_set import PromptSet, requests, sample_seed
from actors.teacher_scores import TeacherScores, select_scores
from actors.trajectory import EVALUATION_EPOCH, Requests, Trajectories, offsets_of, select_trajectories
from cluster.fleet.ray_actor import fetched
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.evaluation_statistics import Tally, estimate, tally
from cluster.loop.teachers import Teachers
from cluster.loop.work import each_once, split_evenly

PARTS = 8
"""Into how many parts the positions are divided, at most."""
FIRST_SAMPLE = 1 << 20
"""Sample numbers of these tokens begin here, so that their seeds are those of no response."""
PROMPTS_A_CALL = 64


class Prefixes(NamedTuple):
    """What the teacher has written, and where the student goes on from it."""

    written: Trajectories
    """One response to each of the C prompts."""
    edges: np.ndarray
    """[parts + 1] positions: part i holds those from edges[i] on, below edges[i + 1]."""
    ids: np.ndarray
    """[B, 3] of the requests, one for each prompt and position; the sample is FIRST_SAMPLE + position."""


async def teacher_prefixes(prompts: PromptSet, teachers: Teachers, sampling: SamplingConfig, seed: int) -> Prefixes:
    """Lets the only teacher answer every prompt, as the student is sampled, and chooses two positions in each part."""
    ids = np.array([(EVALUATION_EPOCH, prompt, 0) for prompt in range(len(prompts))], np.int64)
    references = []
    for part in split_evenly(len(ids), -(-len(ids) // PROMPTS_A_CALL)):
        counts, reference = await teachers.sample(requests(prompts, ids[list(part)], seed), 0, sampling)
        for row, cause in counts.refused.items():
            raise CampaignError(f"the teacher has written nothing for {prompts.where(part[row])}: {cause}")
        references.append(reference)
    written = select_trajectories(ids, await fetched(references))
    edges, positions = parts_of(int(written.lengths.max()))
    there = [(p, q) for p, length in enumerate(written.lengths.tolist()) for q in positions if q < length]
    asked = np.array([(EVALUATION_EPOCH, p, FIRST_SAMPLE + q) for p, q in there], np.int64)
    return Prefixes(written, edges, asked)


def parts_of(longest: int) -> tuple[np.ndarray, list[int]]:
    """(edges of the parts of 0 ... longest - 1, the positions at a quarter and three quarters of each)."""
    edges = np.unique(np.linspace(0, longest, min(PARTS, longest) + 1).astype(int))
    widths = np.diff(edges)
    positions = {int(at + share * width) for at, width in zip(edges, widths, strict=False) for share in (0.25, 0.75)}
    return edges, sorted(positions)


async def on_teacher_text(
    prefixes: Prefixes, rollout: Fleet, teachers: Teachers, sampling: SamplingConfig, seed: int
) -> tuple[np.ndarray, dict[str, float]]:
    """(log pi - log q of one token at each of the B prefixes, NaN without a score; role -> seconds of work)."""
    one = replace(sampling, max_response_tokens=1)
    parts = split_evenly(len(prefixes.ids), len(rollout.replicas))
    answers = [
        await rollout.call("generate", _continued(prefixes, prefixes.ids[list(part)], seed), False, one, returns=2)
        for part in parts
    ]
    references = [reference for _, reference in answers]
    scored = await teachers.score(prefixes.ids, references)
    drawn = select_trajectories(prefixes.ids, await fetched(references))
    scores = select_scores(prefixes.ids, await fetched(each_once(r for own in scored.references for r in own)))
    busy = {"rollout": sum(counts.busy_seconds for counts, _ in answers), "teacher": scored.busy_seconds}
    return drawn.student_logprobs - scores.logprobs, busy


def _continued(prefixes: Prefixes, ids: np.ndarray, seed: int) -> Requests:
    """Requests whose prompts are a prompt and the beginning of the teacher's response to it."""
    written, rows = prefixes.written, []
    for _, prompt, sample in ids.tolist():
        begin, at = int(written.response_offsets[prompt]), int(written.prompt_offsets[prompt])
        own = written.prompt_tokens[at : int(written.prompt_offsets[prompt + 1])]
        rows.append(np.concatenate([own, written.response_tokens[begin : begin + sample - FIRST_SAMPLE]]))
    return Requests(
        ids=ids,
        seeds=np.array([sample_seed(seed, *row) for row in ids.tolist()], np.int64),
        prompt_tokens=np.concatenate(rows).astype(np.int32),
        prompt_offsets=offsets_of(map(len, rows)),
    )


def by_position(
    prefixes: Prefixes, on_teacher: np.ndarray, written: Trajectories, scores: TeacherScores
) -> tuple[dict[str, list[float | None]], Tally]:
    """(the curves for metrics.jsonl, the scores at the teacher's prefixes by prompt).

    on_teacher: [B] of `on_teacher_text`. written, scores: the student's own text. A part that one side never reaches has
    NaN. Curves: `exposure_position` [parts] the last position of each part, `exposure_own` and `exposure_teacher` the mean of
    log pi - log q there, with `:low` and `:high`.
    """
    count = len(prefixes.written)
    own = np.where(written.trained, written.student_logprobs - scores.logprobs, np.nan)
    values = {
        "own": (np.repeat(written.ids[:, 1], written.lengths), written.own_places, own),
        "teacher": (prefixes.ids[:, 1], prefixes.ids[:, 2] - FIRST_SAMPLE, on_teacher),
    }
    curves: dict[str, list[Any]] = {"exposure_position": (prefixes.edges[1:] - 1).tolist()}
    for name, (prompts, places, ratios) in values.items():
        found = [
            estimate(_tally(prompts[inside], ratios[inside], count))
            for begin, end in zip(prefixes.edges, prefixes.edges[1:], strict=False)
            for inside in [(places >= begin) & (places < end)]
        ]
        for field, ending in enumerate(("", ":low", ":high")):
            curves[f"exposure_{name}{ending}"] = [one[field] for one in found]
    prompts, _, ratios = values["teacher"]
    return curves, _tally(prompts, ratios, count)


def _tally(prompts: np.ndarray, values: np.ndarray, count: int) -> Tally:
    rows: list[Sequence[float]] = [values[prompts == prompt].tolist() for prompt in range(count)]
    return tally(rows)
