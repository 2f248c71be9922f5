"""What a turn of an episode costs the rollout actor beside the same tokens in a single answer, in one process.

python -m benchmarks.turns [--rounds 6] [--profile]
    Single answers and episodes of short and of long turns, by turns: processor milliseconds for 1,000 tokens, and for each turn
    after the first beyond what its tokens take in single answers. The environments are in this process, and answer at once.
    --profile: the functions that take most time, of the engine's thread and of the episodes'.

Real vLLM; a model made from a seed, untrained. Processor time, so a machine that others use will do. Prints JSON.
"""

import argparse
import asyncio
import cProfile
import io
import json
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from actors.config import EnvironmentConfig, RolloutConfig, SamplingConfig
from actors.environment.actor import EnvironmentActor
from actors.rollout.actor import RolloutActor
from actors.rollout.vllm_engine import VllmEngine
from actors.trajectory import Aside, Requests
from benchmarks.environments import TURNS, engine_of, environment_of, make_folder, sampling_of
from tests.light_campaign import LocalEnvironments
from tests.tiny_engine import publish

EPISODES, SEATS = 32, 64
SHOWN = 30
"""Functions of a profile."""


def actor_of(model: Path, turns: str) -> RolloutActor:
    """A rollout actor that plays episodes of such turns, or writes single answers."""
    section, environment, there = environment_of(turns, 0.0), None, None
    if section is not None:
        environment = EnvironmentConfig(**section)
        there = LocalEnvironments([EnvironmentActor(environment)])
    sampling = SamplingConfig(**sampling_of(turns))
    config = RolloutConfig(dtype="float32", engine=engine_of(SEATS))
    return RolloutActor(str(model), config, sampling, [1], 0, environment=environment, environments=there)


async def play(actor: RolloutActor, first: int) -> tuple[int, int, int, float]:
    """(tokens, the student's, turns, processor seconds) of some episodes, or answers, at once."""
    before = time.process_time()
    found = await asyncio.gather(*(actor.generate(request(first + number)) for number in range(EPISODES)))
    spent = time.process_time() - before
    written = [trajectories for _, trajectories in found]
    turns = sum(int(one.turn_counts.sum()) for one in written)
    tokens = sum(len(one.response_tokens) for one in written)
    return tokens, sum(int(one.trained.sum()) for one in written), turns, spent


def request(number: int) -> Requests:
    """The request for one trajectory."""
    prompt = np.arange(20, 30, dtype=np.int32)
    return Requests(
        ids=np.array([[0, number, 0]]),
        seeds=np.array([number]),
        prompt_tokens=prompt,
        prompt_offsets=np.array([0, len(prompt)]),
        asides=(Aside(record="{}"),),
    )


def profiled_engine(profile: cProfile.Profile) -> None:
    """Engines that are made from now on run their thread under the profile."""
    run = VllmEngine._run
    VllmEngine._run = lambda self: profile.runcall(run, self)  # type: ignore[method-assign]


def top(profile: cProfile.Profile) -> str:
    """The lines of the functions that took most time by themselves."""
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(SHOWN)
    return text.getvalue()


def measure(folder: Path, rounds: int, which: list[str], profile: bool) -> dict[str, Any]:
    """As the module says."""
    of_engine, of_loop = cProfile.Profile(), cProfile.Profile()
    if profile:
        profiled_engine(of_engine)
    manifest, buckets = publish(AutoModelForCausalLM.from_pretrained(folder / "student"), 0)
    actors = {turns: actor_of(folder / "student", turns) for turns in which}
    seen: dict[str, list[tuple[int, int, int, float]]] = {turns: [] for turns in which}

    async def run() -> None:
        for actor in actors.values():
            await actor.load_weights(*buckets, manifest)
            await play(actor, 10**6)  # warm
        if profile:
            of_loop.enable()
        for number in range(rounds):
            for turns, actor in actors.items():
                seen[turns].append(await play(actor, number * EPISODES))
        of_loop.disable()

    asyncio.run(run())
    for actor in actors.values():
        asyncio.run(actor.close())
    if profile:
        print(top(of_engine), top(of_loop), file=sys.stderr)
    found: dict[str, Any] = {}
    for turns, own in seen.items():
        students, count = (sum(one[place] for one in own) for place in (1, 2))
        found[turns] = {
            "milliseconds_per_1000_tokens": statistics.median(1e6 * one[3] / one[0] for one in own),
            "milliseconds_per_1000_tokens_of_the_student": statistics.median(1e6 * one[3] / one[1] for one in own),
            "turns_mean": count / len(own) / EPISODES,
            "tokens_of_a_turn": students / count,
        }
        if turns != "single" and "single" in found:
            by_tokens, by_students = (key for key in found[turns] if key.startswith("milliseconds"))
            beyond = (found[turns][by_students] - found["single"][by_students]) * students / 1000
            found[turns] |= {
                "ratio": found[turns][by_tokens] / found["single"][by_tokens],
                "milliseconds_of_a_turn": beyond / (count - len(own) * EPISODES),
            }
    return found


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--of", choices=list(TURNS), help="only these")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = make_folder(Path(temporary), options.hidden, options.layers)
        which = [options.of] if options.of else list(TURNS)
        print(json.dumps(measure(folder, options.rounds, which, options.profile), indent=1))


if __name__ == "__main__":
    main()
