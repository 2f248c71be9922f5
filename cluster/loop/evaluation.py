"""Evaluates the student and the teachers on held-out prompts, with the same rollout and teacher actors that train.

The student answers every prompt twice: greedily, and once sampled as in training. Every evaluation uses the same seeds,
so that curves differ by the weights alone. Only here does the campaign process read tokens: verifiers need their text.
"""

import asyncio
import itertools
from typing import Any

import numpy as np

from actors.data.prompts import PromptSet, requests
from actors.data.verifiers import Verifier, rewards_of
from actors.trajectory import (
    EVALUATION_EPOCH,
    FINISH_REASONS,
    TeacherScores,
    Trajectories,
    TrajectoryId,
    select_scores,
    select_trajectories,
)
from cluster.fleet.ray_actor import fetched
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.teachers import Teachers
from cluster.loop.work import each_once, split_evenly

GREEDY, SAMPLED = 0, 1
"""The sample number in an evaluation's ids: how the response was drawn."""


class Evaluator:
    """Held-out prompts, and the verifier that judges responses to them."""

    def __init__(
        self,
        prompts: PromptSet,
        tokenizer: Any,
        verifier: Verifier,
        teachers: Teachers,
        *,
        seed: int,
        max_response_tokens: int,
        stop_token_ids: list[int],
        keep_trajectories: int,
    ):
        self._prompts, self._tokenizer, self._verifier, self._teachers = prompts, tokenizer, verifier, teachers
        self._seed, self._max_tokens, self._stop = seed, max_response_tokens, stop_token_ids
        self._keep = keep_trajectories
        self.trajectories = 2 * len(prompts)
        """Responses that the student gives in one evaluation."""

    async def student(self, rollout: Fleet) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, float]]:
        """Evaluates the weights that the rollout actors hold now.

        Returns the metrics `eval/...`, rows for trajectories/ (up to `keep_trajectories`), and role -> seconds of work.
        `eval/reverse_kl` is a Monte-Carlo estimate of KL(pi || q) in nats a token: the mean of log pi(y_t) - log q(y_t)
        over the tokens y_t that pi has sampled, without those that lack a score.
        """
        # Both at once: the engines batch them, and a long response of one does not delay the other.
        (greedy, greedy_seconds), (sampled, sampled_seconds) = await asyncio.gather(
            self._sample(rollout, GREEDY), self._sample(rollout, SAMPLED)
        )
        ids = self._ids(SAMPLED)
        scored = await self._teachers.score(ids, sampled)
        scores = select_scores(ids, await fetched(each_once(itertools.chain(*scored.references))))
        written = select_trajectories(ids, await fetched(sampled))
        best = select_trajectories(self._ids(GREEDY), await fetched(greedy))
        rewards = self._rewards(written.response_tokens, written.response_offsets)
        # Missing scores are NaN, and nanmean leaves them out.
        log_ratios = (written.behaviour_logprobs - scores.logprobs)[written.trained]
        metrics = {
            "eval/accuracy": float(np.mean(self._rewards(best.response_tokens, best.response_offsets))),
            "eval/accuracy_sampled": float(np.mean(rewards)),
            "eval/reverse_kl": float(np.nanmean(log_ratios)),
            "eval/response_length_mean": float(written.trained_lengths.mean()),
        }
        busy = {"rollout": greedy_seconds + sampled_seconds, "teacher": scored.busy_seconds}
        return metrics, self._rows(written, scores, rewards), busy

    async def teacher(self) -> float:
        """The teachers' accuracy with greedy responses of their own, by the same verifier."""
        return float(
            np.mean(self._rewards(*await self._teachers.generate(self._prompts, self._max_tokens, self._stop)))
        )

    def _ids(self, sample: int) -> np.ndarray:
        return np.array([(EVALUATION_EPOCH, prompt, sample) for prompt in range(len(self._prompts))], np.int64)

    async def _sample(self, rollout: Fleet, sample: int) -> tuple[list[Any], float]:
        """References of the trajectories, one for each rollout actor's part, and the seconds of the engines."""
        ids = self._ids(sample)
        answers = await asyncio.gather(
            *(
                rollout.call(
                    "generate",
                    requests(self._prompts, ids[list(part)], self._seed),
                    sample == GREEDY,
                    returns=2,
                    units=len(part) * self._max_tokens,
                )
                for part in split_evenly(len(ids), len(rollout.replicas))
            )
        )
        return [reference for _, reference in answers], sum(counts.busy_seconds for counts, _ in answers)

    def _rewards(self, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """[M] rewards of the responses to all held-out prompts."""
        return rewards_of(self._tokenizer, self._verifier, tokens, offsets, self._prompts.references)

    def _rows(self, written: Trajectories, scores: TeacherScores, rewards: np.ndarray) -> list[dict[str, Any]]:
        rows = []
        for row in range(min(self._keep, len(written))):
            span = slice(*written.response_offsets[row : row + 2])
            tokens = written.response_tokens[span].tolist()
            prompt = int(written.ids[row, 1])
            rows.append(
                {
                    "id": str(TrajectoryId(*written.ids[row].tolist())),
                    "prompt": self._prompts.texts[prompt],
                    "response": self._tokenizer.decode(tokens, skip_special_tokens=True),
                    "tokens": [self._tokenizer.decode([token]) for token in tokens],
                    "student_logprobs": written.behaviour_logprobs[span].tolist(),
                    "teacher_logprobs": scores.logprobs[span].tolist(),
                    "policy_versions": written.policy_versions[span].tolist(),
                    "finish_reason": FINISH_REASONS[written.finish_reasons[row]],
                    "reference": self._prompts.references[prompt],
                    "reward": float(rewards[row]),
                }
            )
        return rows
