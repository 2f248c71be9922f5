"""Trajectories kept for reading: rows of trajectories/, from evaluations and from training."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.data.token_texts import token_texts
from actors.errors import LostObjectError
from actors.prompts.prompt_set import PromptSet
from actors.teacher_scores import TeacherScores, select_scores
from actors.trajectory import FINISH_REASONS, NO_VERSION, Trajectories, TrajectoryId, select_trajectories
from cluster.config import CampaignConfig
from cluster.fleet.ray_actor import fetched
from cluster.loop.work import Scored, each_once, ids_of, trajectories_of
from cluster.records.turns import turns_of
from cluster.records.writer import RunRecords

MOST_TOKENS = 2048
"""Tokens of a response that are kept; a longer one is cut there."""
WIDE_SIGNALS = ("full", "hidden")
"""A teacher's scores of an update are then too large to be fetched for a few samples."""


def readable_rows(
    written: Trajectories,
    teacher_logprobs: np.ndarray,
    tokenizer: Any,
    prompts: PromptSet,
    rewards: Sequence[float | None],
) -> list[dict[str, Any]]:
    """One row (TRAJECTORY_KEYS without the step) for each trajectory. teacher_logprobs: [N], NaN without a score.

    A response with tokens that the student did not write also has `trained`; there it has no log-probs, and the version -1; and
    `turns`, the texts by who wrote them. One of several conversations has `begins`, the numbers of the tokens with which each but the
    first begins.
    """
    rows, own = [], written.trained
    student, teacher = (np.where(own, values, np.nan) for values in (written.student_logprobs, teacher_logprobs))
    versions = np.where(own, written.policy_versions, NO_VERSION)
    for row in range(len(written)):
        begin, end = written.response_offsets[row : row + 2].tolist()
        tokens, span = written.response_tokens[begin:end].tolist(), slice(begin, min(end, begin + MOST_TOKENS))
        begins, prompt = np.flatnonzero(written.begins[span]).tolist(), int(written.ids[row, 1])
        asked = written.prompt_tokens[slice(*written.prompt_offsets[row : row + 2])]
        # An environment may have written a prompt of its own.
        own_text = np.array_equal(asked, prompts.tokens_of(prompt))
        rows.append(
            {
                "id": str(TrajectoryId(*written.ids[row].tolist())),
                "prompt": prompts.texts[prompt] if own_text else tokenizer.decode(asked.tolist()),
                "response": tokenizer.decode(tokens[:MOST_TOKENS], skip_special_tokens=True),
                "tokens": token_texts(tokenizer, tokens[:MOST_TOKENS]),
                "tokens_left_out": max(len(tokens) - MOST_TOKENS, 0),
                "student_logprobs": student[span].tolist(),
                "teacher_logprobs": teacher[span].tolist(),
                "policy_versions": versions[span].tolist(),
                **({} if own[begin:end].all() else _by_turn(tokenizer, tokens, own[span].tolist(), begins)),
                **({"begins": begins} if begins else {}),
                "finish_reason": FINISH_REASONS[written.finish_reasons[row]],
                "reference": prompts.references[prompt],
                "reward": None if rewards[row] is None else float(rewards[row]),  # type: ignore[arg-type]
            }
        )
    return rows


def _by_turn(tokenizer: Any, tokens: Sequence[int], trained: list[bool], begins: Sequence[int]) -> dict[str, Any]:
    """`trained`, and `turns`: for each turn, and for what others wrote between them, who wrote it and the text."""
    turns = [
        {"by": turn.by, "text": tokenizer.decode(tokens[turn.begin : turn.end], skip_special_tokens=True)}
        for turn in turns_of(trained, begins)
    ]
    return {"trained": trained, "turns": turns}


class TrainingSamples:
    """Keeps a few trajectories of training, where no held-out prompts give any."""

    def __init__(self, config: CampaignConfig, prompts: PromptSet, tokenizer: Any, records: RunRecords):
        evaluated = config.evaluation.prompts is not None or config.evaluation.sets
        self._count = 0 if evaluated else config.evaluation.keep_training_trajectories
        self._every, self._last = config.evaluation.every_updates, config.pipeline.updates
        self._wide = any(teacher.signal in WIDE_SIGNALS for teacher in config.teachers.values())
        self._prompts, self._tokenizer, self._records = prompts, tokenizer, records

    async def keep(self, step: int, update: Sequence[Scored]) -> None:
        """Writes the first trajectories of the update that was step `step`, where one is due."""
        if not self._count or (step % self._every and step not in (1, self._last)):
            return
        chosen = sorted(update, key=lambda one: one.sampled.number)[: self._count]
        try:
            rows = await self._rows(chosen)
        except LostObjectError:  # with the node that held them; the update is taken
            return
        self._records.keep_trajectories(step, [{**row, "step": step} for row in rows])

    async def _rows(self, chosen: Sequence[Scored]) -> list[dict[str, Any]]:
        sampled = [one.sampled for one in chosen]
        ids = ids_of(sampled)
        written = select_trajectories(ids, await fetched(trajectories_of(sampled)))
        rewards = written.rewards.tolist() if len(written.rewards) else [None] * len(written)
        teacher = np.full(len(written.response_tokens), np.nan, np.float32)
        if not self._wide and chosen[0].scores:
            in_order = sorted(chosen, key=lambda one: one.turn)
            found: list[TeacherScores] = await fetched(each_once(itertools.chain(*(one.scores for one in in_order))))
            teacher = select_scores(ids, found).logprobs
        return await asyncio.to_thread(readable_rows, written, teacher, self._tokenizer, self._prompts, rewards)
