"""`understudy compare` in one process, without Ray and vLLM: many short campaigns of very small models in minutes.

The loop, the learner, the teacher and the records are those of any campaign. Only the engine is another one: a plain batch of
transformers with a cache, which samples a response from its prompt, its seed and the weights. What a method learns from a
token is the same; seconds and processor time are those of this process.

    python -m benchmarks.methods examples/carries/distill.yaml --methods opd,sft --seeds 0,1,2,3,4
"""

import asyncio
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

import actors.rollout.actor
import actors.teacher.base
import cluster.cli
import cluster.roles
import learner.learner
from actors.heartbeat import beat
from actors.processor_time import ProcessorTime
from actors.rollout.engine import Response, trajectories_of
from actors.trajectory import Requests
from tests.light_campaign import LocalFleet, Reference, without_ray
from tests.light_engine import LightEngine

GATHER_SECONDS = 0.01
"""How long the engine waits for more requests before it begins a batch."""


class Asked(NamedTuple):
    """A call of `generate` that has no answer yet."""

    requests: Requests
    sampling: Any
    greedy: bool
    answer: Future


class BatchEngine(LightEngine):
    """Answers all requests that wait in one batch for each length of prompt, without filters of sampling."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.seats, self._asked = 4096, []

    def generate(self, requests: Requests, sampling: Any, *, greedy: bool = False) -> Future:
        """See Engine: answered with all other calls that wait for the same kind of sampling."""
        asked = Asked(requests, sampling, greedy, Future())
        self._asked.append(asked)
        self._thread.submit(self._answer)
        return asked.answer

    def _answer(self) -> None:
        """Answers everything that waits; later calls then find nothing left."""
        if not self._asked:
            return
        time.sleep(GATHER_SECONDS)
        first = self._asked[0]
        alike = [one for one in self._asked if (one.greedy, one.sampling) == (first.greedy, first.sampling)]
        self._asked = [one for one in self._asked if all(one is not other for other in alike)]
        began, found = time.monotonic(), {}
        for number, one in enumerate(alike):
            offsets = one.requests.prompt_offsets
            for row, seed in enumerate(one.requests.seeds):
                prompt = one.requests.prompt_tokens[offsets[row] : offsets[row + 1]].tolist()
                found[number, row] = (prompt, int(seed))
        responses: dict[tuple[int, int], Response] = {}
        with self._weights:
            for length in sorted({len(prompt) for prompt, _ in found.values()}):
                keys = [key for key, (prompt, _) in found.items() if len(prompt) == length]
                rows = self._batch([found[key] for key in keys], first.sampling, first.greedy)
                responses |= dict(zip(keys, rows, strict=True))
        self.busy_seconds += time.monotonic() - began
        for number, one in enumerate(alike):
            own = [responses[number, row] for row in range(len(one.requests.seeds))]
            one.answer.set_result(trajectories_of(one.requests, own))

    @torch.no_grad()
    def _batch(self, asked: list[tuple[list[int], int]], sampling: Any, greedy: bool) -> list[Response]:
        """Responses to prompts of one length, each with its seed."""
        draws = [np.random.default_rng(seed) for _, seed in asked]
        cache, read = DynamicCache(), torch.tensor([prompt for prompt, _ in asked])
        tokens: list[list[int]] = [[] for _ in asked]
        logprobs: list[list[float]] = [[] for _ in asked]
        alive = np.ones(len(asked), bool)
        for _ in range(sampling.max_response_tokens):
            beat()
            logits_BV = self._model(read, past_key_values=cache, use_cache=True).logits[:, -1].float()
            policy_BV = (logits_BV / sampling.temperature).log_softmax(-1).double().numpy()
            noise_BV = [draw.gumbel(size=policy_BV.shape[1]) for draw in draws]
            chosen_B = np.argmax(policy_BV if greedy else policy_BV + np.array(noise_BV), 1)
            for row in np.flatnonzero(alive):
                tokens[row].append(int(chosen_B[row]))
                logprobs[row].append(float(policy_BV[row, chosen_B[row]]))
                alive[row] = tokens[row][-1] not in self._stop
            if not alive.any():
                break
            read = torch.tensor(chosen_B)[:, None]
        self.tokens_sampled += sum(map(len, tokens))
        return [
            Response(own, found, np.full(len(own), self.version, np.int32), "length" if going else "stop", None, None)
            for own, found, going in zip(tokens, logprobs, alive, strict=True)
        ]


class OverlappingFleet(LocalFleet):
    """Rollout actors answer several calls at a time, as under Ray."""

    async def ask(self, requests: Requests, *, units: int, at: Any) -> Any:
        """See Fleet.ask: does not wait for the calls before."""
        replica = at or self.replicas[0]
        replica.under_way += units
        try:
            counts, written = await replica.actor.generate(requests)
        finally:
            replica.under_way -= units
        await asyncio.sleep(0)
        return counts, Reference(written)


class OneClock(ProcessorTime):
    """The processor time of a process in which all roles are: it counts once, for the role that reports next."""

    _reported, _turn = 0.0, threading.Lock()

    def __init__(self) -> None:
        self.since_report()  # what was spent before is the start's

    def since_report(self) -> float:
        """See ProcessorTime: seconds since the last call of any role."""
        with OneClock._turn:
            now = time.process_time()
            spent, OneClock._reported = now - OneClock._reported, now
        return spent


ENGINE = ("rollout.backend=benchmarks.methods:BatchEngine", "rollout.engine={}")
"""Settings of a campaign that runs in this process."""


def in_one_process() -> None:
    """Campaigns that this process runs from now on need neither Ray nor vLLM; their configurations need ENGINE."""
    without_ray()
    roles: Any = cluster.roles
    roles.Fleet = OverlappingFleet
    modules: tuple[Any, ...] = (actors.rollout.actor, actors.teacher.base, learner.learner)
    for module in modules:
        module.ProcessorTime = OneClock


def main(arguments: list[str]) -> None:
    """Runs the comparison. arguments: those of `understudy compare`."""
    in_one_process()
    cluster.cli.main(["compare", *arguments, *ENGINE])


if __name__ == "__main__":
    main(sys.argv[1:])
