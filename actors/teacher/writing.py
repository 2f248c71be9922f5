"""Responses that a teacher writes in the student's place, for `estimator: sft` and for exposure bias.

A backend says how a text is written (`write`); what the campaign gets of it is the same for all of them.
"""

import time
from abc import abstractmethod
from dataclasses import replace

import numpy as np

from actors.config import SamplingConfig
from actors.teacher.base import Teacher, known_prompts
from actors.trajectory import FINISH_REASONS, Limits, Prompts, Requests, RolloutCounts, Trajectories, offsets_of


class WritingTeacher(Teacher):
    """A teacher with `sample`. A backend implements `write`, beside the methods of Teacher."""

    @abstractmethod
    def write(
        self, prompts: Prompts, limits: Limits, sampling: SamplingConfig, seeds: np.ndarray
    ) -> list[np.ndarray | str]:
        """One sampled response to each of B prompts: its token ids, with the stop token that ended it; or, as text, why a
        prompt has none.

        sampling: temperature (of the model's own logits), top-p and top-k. seeds: [B], one for each response.
        """
        raise NotImplementedError

    def sample(
        self,
        requests: Requests,
        policy_version: int,
        sampling: SamplingConfig,
        stop_token_ids: list[int],
        prompts: Prompts | None = None,
    ) -> tuple[RolloutCounts, Trajectories]:
        """Samples the B requested responses from the teacher, for the student to copy (`estimator: sft`).

        sampling: as for the student, but for a temperature of the teacher's own. prompts: the B prompts that the teacher
        reads in place of the student's, where it has privileged information. Tokens get this policy version, since the
        teacher's responses do not become stale, and the behaviour log-prob 0, which sft does not read. The trajectories
        lack those that are refused in the counts: the teacher did not answer, or with a token that it shares no row for
        with the student.
        """
        start = time.perf_counter()
        asked = prompts or Prompts(requests.prompt_tokens, requests.prompt_offsets)
        limits = Limits(sampling.max_response_tokens, stop_token_ids)
        temperature = sampling.temperature if self.config.temperature is None else self.temperature
        answers = self.write(
            *known_prompts(asked, limits, self.vocabulary), replace(sampling, temperature=temperature), requests.seeds
        )
        refused = {
            row: cause for row, answer in enumerate(answers) if (cause := unusable(answer, self.vocabulary)) is not None
        }
        rows = [row for row in range(len(answers)) if row not in refused]
        responses = [np.asarray(answers[row], np.int32) for row in rows]
        tokens = np.concatenate([*responses, np.zeros(0, np.int32)])
        lengths = np.zeros(len(answers), np.int64)
        lengths[rows] = list(map(len, responses))
        stopped = np.ones(len(answers), bool)  # of one that is refused it does not matter
        stopped[rows] = [response[-1] in stop_token_ids for response in responses]
        student_prompts = Prompts(requests.prompt_tokens, requests.prompt_offsets).rows()
        reason = np.where(stopped[rows], FINISH_REASONS.index("stop"), FINISH_REASONS.index("length"))
        written = Trajectories(
            ids=requests.ids[rows],
            prompt_tokens=np.concatenate([*(student_prompts[row] for row in rows), np.zeros(0, np.int32)]),
            prompt_offsets=offsets_of(len(student_prompts[row]) for row in rows),
            response_tokens=tokens,
            response_offsets=offsets_of(lengths[rows]),
            behaviour_logprobs=np.zeros(len(tokens), np.float32),
            policy_versions=np.full(len(tokens), policy_version, np.int32),
            finish_reasons=reason.astype(np.uint8),
        )
        seconds = time.perf_counter() - start
        self._busy_seconds += seconds
        versions = np.full(len(answers), policy_version, np.int32)
        spent = self._processor.since_report()
        return RolloutCounts(lengths, versions, ~stopped, seconds, processor_seconds=spent, refused=refused), written


def unusable(answer: np.ndarray | str, vocabulary: int) -> str | None:
    """Why an answer of `write` cannot be trained on; None: it can. vocabulary: ids below it are the student's, too."""
    if isinstance(answer, str):
        return answer
    if not len(answer):
        return "an answer without a token"
    if (most := int(np.max(answer))) >= vocabulary:
        return f"an answer with the token {most}, which student and teacher do not share ({vocabulary} tokens)"
    return None
