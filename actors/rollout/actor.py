"""The rollout actor: samples trajectories with the newest weights that it has. A plain class, values in, values out."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from actors.config import EnvironmentConfig, LoraConfig, RolloutConfig, SamplingConfig, VerifierConfig
from actors.data.judge import Judge, Verdicts, texts_to_judge
from actors.data.tokenizer import load_tokenizer
from actors.environment.base import Environments
from actors.environment.continuation import Continuation
from actors.errors import CampaignError
from actors.memory import give_back
from actors.processor_time import ProcessorTime
from actors.rollout.batched_calls import BatchedCalls
from actors.rollout.engine import PromptLengths, check_answer, make_engine, told_apart
from actors.rollout.episodes import NO_LIMITS, EpisodeLimits, Episodes
from actors.trajectory import FINISH_REASONS, EpisodeCounts, LoadSeconds, Requests, RolloutCounts, Trajectories
from actors.weights.buckets import WeightVersion, join
from actors.weights.delta import DeltaVersion, Receiver


class RolloutActor(BatchedCalls):
    """One engine. Methods are coroutines, so that calls overlap and the engine batches their requests."""

    def __init__(
        self,
        model: str,
        config: RolloutConfig,
        sampling: SamplingConfig,
        stop_token_ids: list[int],
        seed: int,
        support_size: int = 0,
        trust_remote_code: bool = False,
        keep_weights: bool = False,
        verifier: VerifierConfig | None = None,
        verifiers: Mapping[str, VerifierConfig] | None = None,
        adapter: LoraConfig | None = None,
        vocabulary: int | None = None,
        prompts: PromptLengths | None = None,
        environment: EnvironmentConfig | None = None,
        limits: EpisodeLimits = NO_LIMITS,
        template_arguments: Mapping[str, Any] | None = None,
        environments: Environments | None = None,
    ):
        """Builds the engine, without weights: `load_weights` comes before `generate`.

        model, config, sampling, stop_token_ids, seed, support_size, trust_remote_code, adapter: see Engine.__init__.
        keep_weights: keep a copy of the weights on the host, which deltas are applied to.
        vocabulary: tokens of the tokenizer, beyond which nothing is sampled; None: the rows of the model.
        prompts: see `make_engine`.
        verifier, verifiers: compute the rewards of responses whose requests have references; by domain.
        environment, limits, template_arguments: each request begins an episode. environments: see `use_environments`.
        UserError: the engine or the verifier refuses its configuration.
        """
        super().__init__()
        self._sampling = sampling
        self._reported_seconds, self._reported_preemptions, self._reported_waiting = 0.0, 0, 0.0
        self._receiver = Receiver(keep_weights)
        self._loading = asyncio.Lock()
        self._judge: Judge | None = None
        if verifier is not None:
            self._judge = Judge(verifier, by_domain=verifiers)
            self._tokenizer = load_tokenizer(model, trust_remote_code, "student.model")
            self._judge.start()  # its faults are told before the engine starts
        self._engine = make_engine(
            model,
            config,
            sampling,
            stop_token_ids=stop_token_ids,
            support_size=support_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
            vocabulary=vocabulary,
            prompts=prompts,
        )
        self._processor = ProcessorTime()
        self._episodes: Episodes | None = None
        if environment is not None:
            tokenizer = load_tokenizer(model, trust_remote_code, "student.model")
            stop = frozenset({*stop_token_ids, *sampling.stop_token_ids})
            write = Continuation(tokenizer, stop, template_arguments or {})
            self._episodes = Episodes(self._engine, environment, write, limits, environments)

    async def use_environments(self, environments: Environments) -> None:
        """The processes that host environments from now on."""
        if self._episodes is not None:
            self._episodes.reach(environments)

    async def generate(
        self, requests: Requests, greedy: bool = False, sampling: SamplingConfig | None = None
    ) -> tuple[RolloutCounts, Trajectories]:
        """Samples B requests: (counts for the campaign process, their Trajectories in the same order).

        sampling: of an evaluation that has its own; None: that of training.
        Returns when the last response has ended. Responses are judged where the requests have references, by a process
        of its own that a helper thread waits for. Errors: AbortedError after `abort`; WeightError before the first `load_weights`. An EngineError ends
        the process.
        """
        sampling = sampling or self._sampling
        if requests.max_response_tokens is not None:
            sampling = replace(sampling, max_response_tokens=requests.max_response_tokens)
        episodes: tuple[EpisodeCounts, ...] = ()
        if self._episodes is not None:
            trajectories, episodes = await self._episodes.play(requests, sampling, greedy)
        else:
            trajectories = await asyncio.wrap_future(self._engine.generate(requests, sampling, greedy=greedy))
            check_answer(requests, trajectories)
        trajectories = told_apart(trajectories, sampling, greedy)
        unjudged: list[str] = []
        parts: tuple[dict[str, float], ...] = ()
        if self._judge and requests.references:
            verdicts = await asyncio.to_thread(self._verdicts, requests, trajectories)
            unjudged, parts = verdicts.failed, verdicts.parts
            trajectories = replace(trajectories, rewards=verdicts.rewards.astype(np.float32))
        # Calls overlap, so an engine's seconds belong to no single call: each reports those since the last report.
        busy_seconds = self._engine.busy_seconds - self._reported_seconds
        self._reported_seconds += busy_seconds
        preempted = getattr(self._engine, "preempted", 0)  # an engine of the user's own need not count them
        self._reported_preemptions, more = preempted, preempted - self._reported_preemptions
        waited, at_once = 0.0, 0
        if self._episodes is not None:
            thinking = self._episodes.thinking
            self._reported_waiting, waited = thinking.idle_seconds, thinking.idle_seconds - self._reported_waiting
            at_once = thinking.at_once(self._engine.seats)
        counts = RolloutCounts(
            trajectories.lengths,
            trajectories.oldest_versions,
            trajectories.finish_reasons == FINISH_REASONS.index("length"),
            busy_seconds,
            tuple(unjudged),
            self._engine.seats,
            more,
            parts,
            () if trajectories.trained.all() else tuple((trajectories.lengths - trajectories.trained_lengths).tolist()),
            self._processor.since_report(),
            {row: one.failed for row, one in enumerate(episodes) if one.failed},
            episodes,
            waited,
            at_once,
        )
        return counts, trajectories

    def _verdicts(self, requests: Requests, written: Trajectories) -> Verdicts:
        assert self._judge is not None
        texts = texts_to_judge(self._tokenizer, written.response_tokens, written.response_offsets, written.turns)
        return self._judge.rewards(texts, requests.references, requests.asides)

    async def prefetch(self, bucket: np.ndarray) -> None:
        """Does nothing: passing the argument makes Ray pull the bucket to this node before `load_weights` needs it."""

    async def load_weights(self, *published: np.ndarray | WeightVersion | DeltaVersion) -> LoadSeconds:
        """Verifies and loads a weight version, dense or as a delta. One at a time: the next waits.

        published: for each rank of the learner its buckets ([bytes] uint8), then their manifest. Checksums are verified,
        deltas decoded and buckets copied to where the engine loads from in helper threads, while the engine goes on.
        WeightError: damaged, for another model, or a delta from a version that is not held; the engine then keeps the
        weights that it has.
        """
        async with self._loading:
            start = time.perf_counter()
            ranks = await asyncio.to_thread(self._receiver.receive, *published)
            manifest, buckets = join(ranks)
            loaded = await asyncio.to_thread(self._engine.load_weights, manifest, buckets)
            prepared = time.perf_counter() - start
            stood_still = await asyncio.wrap_future(loaded)
            if self._engine.version != manifest.version:
                found = f"after a load the engine's version is {self._engine.version}"
                raise CampaignError(f"rollout.backend: {found}, expected {manifest.version} (docs/extending.md)")
            self._receiver.hold(ranks)  # only now: after an error the old version is still the base of the next delta
            await asyncio.to_thread(give_back)
            return LoadSeconds(prepared, stood_still or 0.0)

    async def abort(self, ids: np.ndarray | None = None) -> None:
        """Aborts the requests with these ids [B, 3], or all of them. Their calls end with AbortedError."""
        if self._episodes is not None:  # first: what waits for an environment is no request of the engine
            self._episodes.abort(ids)
        await asyncio.wrap_future(self._engine.abort(ids))
        if ids is None:  # the campaign starts again: nobody will collect the answers of the one before
            self.discard()

    async def status(self) -> dict[str, float | int | None]:
        """The engine's attributes: responses at a time, version of the weights, tokens sampled, seconds of work."""
        return {
            "seats": self._engine.seats,
            "policy_version": self._engine.version,
            "tokens_sampled": self._engine.tokens_sampled,
            "busy_seconds": self._engine.busy_seconds,
        }

    async def close(self) -> None:
        """Closes the engine and ends the verifier's process."""
        if self._judge is not None:
            self._judge.close()
        self._engine.close()
