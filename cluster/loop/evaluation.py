"""Evaluates the student and the teachers on held-out prompts, with the same rollout and teacher actors that train.

The student answers every prompt twice: greedily, and once sampled as in training. Every evaluation uses the same seeds,
so that curves differ by the weights alone. Accuracy is measured over the prompts that have a reference answer; without
any, it is absent, only the reverse KL is measured, and nothing is answered greedily.
"""

import asyncio
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from actors.config import SamplingConfig
from actors.data.judge import Judge, Verdicts, texts_to_judge
from actors.errors import CampaignError
from actors.prompts.fingerprint import prompts_fingerprint
from actors.prompts.prompt_set import PromptSet, requests
from actors.teacher_scores import TeacherScores, select_scores
from actors.trajectory import EVALUATION_EPOCH, FINISH_REASONS, RolloutCounts, Trajectories, select_trajectories
from cluster.fleet.ray_actor import fetched
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.evaluation_statistics import Tally, mean_of, tally
from cluster.loop.samples import readable_rows
from cluster.loop.teachers import Teachers
from cluster.loop.work import each_once, split_evenly
from cluster.records.rewards import are_graded, is_right

GREEDY, SAMPLED = 0, 1
"""The sample number in an evaluation's ids: how the response was drawn."""

Tallies = dict[str, Tally]
"""Quantity -> its scores, prompt by prompt. Example: {"accuracy": Tally([3, 0], [4, 4])} of four responses to each prompt."""


def identity(prompts: PromptSet, *settings: Any) -> str:
    """What two evaluations must share to be compared prompt by prompt: a digest of the prompts and these settings."""
    text = json.dumps([prompts_fingerprint(prompts), *settings], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def rewards_by_row(written: Trajectories) -> dict[int, float]:
    """Row -> the reward that the environment has given; 0 for an episode that failed, was cut, or has none. {}: no episode has
    any, and one has ended without it: this environment gives none."""
    ended = written.finish_reasons == FINISH_REASONS.index("stop")
    if np.isnan(written.rewards).all() and ended.any():
        return {}
    return dict(enumerate(np.nan_to_num(written.rewards, nan=0.0).tolist()))


def right_ones(rewards: Mapping[int, float]) -> dict[int, float]:
    """Row -> 1 where its reward is that of a right answer, 0 where it is not."""
    return {row: float(is_right(reward)) for row, reward in rewards.items()}


def tell_failed(counts: Sequence[RolloutCounts], on_event: Callable[..., None], **fields: Any) -> None:
    """Tells episodes of an evaluation that have failed; their reward is 0. CampaignError: all of them have."""
    episodes = [one for own in counts for one in own.episodes]
    causes = [one.failed for one in episodes if one.failed]
    if causes and len(causes) == len(episodes):
        raise CampaignError(
            f"environment: all {len(causes)} episodes of an evaluation have failed; the last: {causes[-1]}"
        )
    if causes:
        on_event("episodes_failed", count=len(causes), cause=causes[0], evaluation=True, **fields)


class Evaluator:
    """Held-out prompts, and the verifier that judges responses to them."""

    def __init__(
        self,
        prompts: PromptSet,
        tokenizer: Any,
        judge: Judge,
        teachers: Teachers,
        *,
        seed: int,
        sampling: SamplingConfig,
        stop_token_ids: list[int],
        keep_trajectories: int,
        on_event: Callable[..., None],
    ):
        self._prompts, self._tokenizer, self._judge, self._teachers = prompts, tokenizer, judge, teachers
        self._seed, self._sampling, self._stop = seed, sampling, stop_token_ids
        self._keep, self._on_event = keep_trajectories, on_event
        self._judged: list[int] = prompts.judged().tolist()
        """The prompts that a verifier judges: those that have a reference answer, where it needs one."""
        self.trajectories = (2 if self._judged else 1) * len(prompts)
        """Responses that the student gives in one evaluation."""
        self.tallies: Tallies = {}
        """The scores of the last evaluation of the student, prompt by prompt."""

    def identity(self) -> str:
        """See `identity`."""
        return identity(self._prompts, self._judge.settings, self._sampling.max_response_tokens, self._seed)

    async def student(self, rollout: Fleet) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, float]]:
        """Evaluates the weights that the rollout actors hold now.

        Without teachers there is no reverse KL. Returns the metrics `eval/...`, rows for trajectories/ (up to `keep_trajectories`), and role -> seconds of work.
        `eval/reverse_kl` is a Monte-Carlo estimate of KL(pi || q) in nats a token: the mean of log pi(y_t) - log q(y_t)
        over the tokens y_t that pi has sampled, without those that lack a score.
        """
        # Both at once: the engines batch them, and a long response of one does not delay the other.
        drawn = await asyncio.gather(
            *(self._sample(rollout, how) for how in (SAMPLED, GREEDY)[: 2 if self._judged else 1])
        )
        tell_failed([counts for _, own in drawn for counts in own], self._on_event)
        sampled = drawn[0][0]
        ids = self._ids(SAMPLED)
        written = select_trajectories(ids, await fetched(sampled))
        scores: TeacherScores | None = None
        busy = {"rollout": sum(counts.busy_seconds for _, own in drawn for counts in own), "teacher": 0.0}
        if self._teachers.fleets:
            scored = await self._teachers.score(ids, sampled)
            scores = select_scores(ids, await fetched(each_once(itertools.chain(*scored.references))))
            busy["teacher"] = scored.busy_seconds
        rewards: dict[int, float] = {}
        of_greedy: dict[int, float] = {}
        self.tallies = {}
        if self._judged:
            best = select_trajectories(self._ids(GREEDY), await fetched(drawn[1][0]))
            of_greedy = await self._rewards_of(best)
            rewards = await self._rewards_of(written)
        if rewards and of_greedy:  # an environment need not give any
            self.tallies |= {"accuracy": self._by_prompt(of_greedy), "accuracy_sampled": self._by_prompt(rewards)}
            if are_graded([*of_greedy.values(), *rewards.values()]):
                self.tallies["right"] = self._by_prompt(right_ones(of_greedy))
        if scores is not None:
            apart = np.where(written.trained, written.student_logprobs - scores.logprobs, np.nan)
            self.tallies |= {"reverse_kl": tally(np.split(apart, written.response_offsets[1:-1]))}  # type: ignore[arg-type]
        metrics = {f"eval/{name}": mean_of(own) for name, own in self.tallies.items()}
        metrics["eval/response_length_mean"] = float(written.trained_lengths.mean())
        return metrics, await asyncio.to_thread(self._rows, written, scores, rewards), busy

    async def teacher(self) -> Tallies:
        """The accuracy of the teachers' own greedy responses, by the same verifier; {} without references or teachers, and with
        an environment, which teachers do not play."""
        if not self._judged or not self._teachers.fleets or self._prompts.played:
            return {}
        tokens, offsets = await self._teachers.generate(self._prompts, self._sampling.max_response_tokens, self._stop)
        rewards = await self._rewards(tokens, offsets)
        right = {"right": self._by_prompt(right_ones(rewards))} if are_graded(rewards.values()) else {}
        return {"accuracy": self._by_prompt(rewards), **right}

    def _by_prompt(self, rewards: dict[int, float]) -> Tally:
        return tally([[rewards[row]] if row in rewards else [] for row in range(len(self._prompts))])

    def _ids(self, sample: int) -> np.ndarray:
        return np.array([(EVALUATION_EPOCH, prompt, sample) for prompt in range(len(self._prompts))], np.int64)

    async def _sample(self, rollout: Fleet, sample: int) -> tuple[list[Any], list[RolloutCounts]]:
        """References of the trajectories, one for each rollout actor's part, and their counts."""
        ids = self._ids(sample)
        answers = await asyncio.gather(
            *(
                rollout.call(
                    "generate",
                    requests(self._prompts, ids[list(part)], self._seed),
                    sample == GREEDY,
                    self._sampling,
                    returns=2,
                    units=len(part) * self._sampling.max_response_tokens,
                )
                for part in split_evenly(len(ids), len(rollout.replicas))
            )
        )
        return [reference for _, reference in answers], [counts for counts, _ in answers]

    async def _rewards_of(self, written: Trajectories) -> dict[int, float]:
        """Prompt -> reward of the response to it, from the environment or the verifier."""
        if self._prompts.played:
            return rewards_by_row(written)
        return await self._rewards(written.response_tokens, written.response_offsets, written.turns)

    async def _rewards(
        self, tokens: np.ndarray, offsets: np.ndarray, turns: np.ndarray | None = None
    ) -> dict[int, float]:
        """Prompt -> reward of the response to it, of the held-out prompts with a reference. turns: see `texts_to_judge`."""
        references = [self._prompts.references[row] for row in self._judged]
        asides = [self._prompts.aside(row) for row in self._judged]

        def verdicts() -> Verdicts:
            texts = texts_to_judge(self._tokenizer, tokens, offsets, turns)
            return self._judge.rewards([texts[row] for row in self._judged], references, asides)

        # In a thread: decoding and judging take their time, and the loop has a checkpoint to write when it is interrupted.
        found = await asyncio.to_thread(verdicts)
        if found.failed:
            self._on_event("unjudged", count=len(found.failed), cause=found.failed[0], evaluation=True)
        return dict(zip(self._judged, found.rewards.tolist(), strict=True))

    def _rows(
        self, written: Trajectories, scores: TeacherScores | None, rewards: dict[int, float]
    ) -> list[dict[str, Any]]:
        kept = select_trajectories(written.ids[: self._keep], [written])
        unknown = np.full(len(kept.response_tokens), np.nan, np.float32)
        logprobs = (
            unknown if scores is None else scores.logprobs[: len(unknown)]
        )  # both are in the order of the prompts
        judged = [rewards.get(int(prompt)) for prompt in kept.ids[:, 1]]
        return readable_rows(kept, logprobs, self._tokenizer, self._prompts, judged)
