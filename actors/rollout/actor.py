"""The rollout actor: samples trajectories with the newest weights it was given. A plain class, values in, values out."""

import asyncio
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from actors.config import LoraConfig, RolloutConfig, SamplingConfig, VerifierConfig
from actors.data.tokenizer import load_tokenizer
from actors.data.verifiers import make_verifier, rewards_of
from actors.errors import EngineError
from actors.rollout.batched_calls import BatchedCalls
from actors.rollout.engine import make_engine
from actors.trajectory import FINISH_REASONS, Requests, RolloutCounts, Trajectories
from actors.weights.buckets import WeightVersion, join
from actors.weights.delta import DeltaVersion, Receiver


@contextmanager
def _ends_with_the_engine() -> Iterator[None]:
    """Ends the process when its engine has failed: whoever supervises it sees a dead actor, and replaces it."""
    try:
        yield
    except EngineError:
        traceback.print_exc()
        os._exit(13)


class RolloutActor(BatchedCalls):
    """One vLLM engine. Methods are coroutines, so that calls overlap and the engine batches them together."""

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
        adapter: LoraConfig | None = None,
    ):
        """keep_weights: a copy of the weights stays on the host, which deltas are applied to. verifier: of the rewards that
        are given to responses whose requests come with a reference. adapter: what is published are adapters like it."""
        super().__init__()
        self._sampling = sampling
        self._reported_seconds = 0.0
        self._receiver = Receiver(keep_weights)
        self._judge = verifier and (
            load_tokenizer(model, trust_remote_code, "student.model"),
            make_verifier(verifier, "evaluation.verifier"),
        )
        self._engine = make_engine(
            model,
            config,
            sampling,
            stop_token_ids=stop_token_ids,
            support_size=support_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
        )

    async def generate(self, requests: Requests, greedy: bool = False) -> tuple[RolloutCounts, Trajectories]:
        """Samples every request; returns when the last has finished."""
        with _ends_with_the_engine():
            trajectories = await asyncio.wrap_future(self._engine.generate(requests, self._sampling, greedy=greedy))
        if self._judge and requests.references:
            rewards = await asyncio.to_thread(
                rewards_of,
                *self._judge,
                trajectories.response_tokens,
                trajectories.response_offsets,
                requests.references,
            )
            trajectories = replace(trajectories, rewards=rewards.astype(np.float32))
        busy_seconds = self._engine.busy_seconds - self._reported_seconds
        self._reported_seconds += busy_seconds
        counts = RolloutCounts(
            trajectories.lengths,
            np.minimum.reduceat(trajectories.policy_versions, trajectories.response_offsets[:-1]),
            trajectories.finish_reasons == FINISH_REASONS.index("length"),
            busy_seconds,
        )
        return counts, trajectories

    async def prefetch(self, bucket: np.ndarray) -> None:
        """Nothing: to call it, Ray has brought the bucket to this node, while the learner still fills the next one."""

    async def load_weights(self, *published: np.ndarray | WeightVersion | DeltaVersion) -> float:
        """Verifies and loads a weight version, or what changed since the one before; returns the seconds that the
        engine stood still for it. published: of each rank of the learner its buckets, and then their manifest.

        What needs no engine, the checksums and the decoding, is done while the engine goes on. WeightError: it is not
        whole, does not fit the model, or is a change of a version that is not here; the engine keeps what it has.
        """
        ranks = await asyncio.to_thread(self._receiver.receive, *published)
        loaded = await asyncio.to_thread(self._engine.load_weights, *join(ranks))
        with _ends_with_the_engine():
            stood_still = await asyncio.wrap_future(loaded)
        self._receiver.hold(ranks)
        return stood_still or 0.0

    async def abort(self, ids: np.ndarray | None = None) -> None:
        """Gives up what is being generated, or of it these ids [B, 3]; the calls that asked for it end in AbortedError."""
        await asyncio.wrap_future(self._engine.abort(ids))
        if ids is None:
            self.discard()

    async def status(self) -> dict[str, float | int | None]:
        """Version of the weights, tokens sampled and busy seconds: what tells a working actor from a hung one; and how
        many responses it writes at a time."""
        return {
            "seats": self._engine.seats,
            "policy_version": self._engine.version,
            "tokens_sampled": self._engine.tokens_sampled,
            "busy_seconds": self._engine.busy_seconds,
        }

    async def close(self) -> None:
        """Ends the engine's thread."""
        self._engine.close()
