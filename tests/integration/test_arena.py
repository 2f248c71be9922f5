"""Games of TextArena as an environment: examples/arena."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from actors.environment.base import Episode
from cluster.records.writer import read_jsonl
from examples.arena.arena import Arena
from tests.documented import ROOT
from tests.tiny_models import make_tiny_model
from tests.waiting import PATIENCE_SECONDS

SEEDS = range(5)


async def play(seed: int) -> list[str]:
    """Halves what is left; what the game said, and the reward at its end."""
    game, low, high = Arena("GuessTheNumber-v0"), 1, 20
    said = [await game.reset({"seed": seed}, Episode((0, 0, 0), 1, 0))]
    while True:
        await asyncio.sleep(0)  # the next game's turn
        guess = (low + high) // 2
        told, over, reward = await game.step({"role": "assistant", "content": f"I say [{guess}]."})
        if over:
            return [*said, str(reward)]
        said.append(told)
        low, high = (guess + 1, high) if "higher" in told else (low, guess - 1)


def test_a_game_is_the_same_alone_and_beside_others() -> None:
    async def together() -> list[list[str]]:
        return await asyncio.gather(*map(play, SEEDS))

    alone = [asyncio.run(play(seed)) for seed in SEEDS]
    assert asyncio.run(together()) == alone
    assert all(game[-1] == "1.0" and "between 1 and 20" in game[0] for game in alone)
    assert len({len(game) for game in alone}) > 1  # not all seeds hide the same number


def test_games_that_draw_in_each_move_do_not_share_their_draws() -> None:
    async def slide(moves: int) -> list[str]:
        game = Arena("2048-v0")
        said = [await game.reset({"seed": 3}, Episode((0, 0, 0), 1, 0))]
        for i in range(moves):
            await asyncio.sleep(0)
            said.append((await game.step({"content": ("[Left]", "[Down]", "[Right]")[i % 3]}))[0])
        return said

    async def together() -> list[list[str]]:
        return await asyncio.gather(slide(12), slide(12), slide(5))

    alone = asyncio.run(slide(12))
    assert asyncio.run(together()) == [alone, alone, alone[:6]]
    assert len(set(map(str, alone))) > 10


@pytest.mark.integration
def test_the_recipe_trains_on_games(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "student", context=1400)
    make_tiny_model(tmp_path / "teacher", context=1400, seed=1)
    light = {"cpus_per_replica": 0.2}
    changes = {
        "output_dir": str(tmp_path / "runs"),
        "student.model": str(tmp_path / "student"),
        "teachers.default": {"model": str(tmp_path / "teacher"), "dtype": "float32", **light},
        "prompts.max_prompt_tokens": 900,  # one token a character
        "evaluation.prompts": {"max_prompt_tokens": 900, "limit": 2},
        "sampling": {"max_response_tokens": 400, "stop_token_ids": list(range(7, 60))},
        "rollout": {"dtype": "float32", "engine": {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 26}, **light},
        "learner": {"compute_dtype": "float32", **light},
        "environment": light,
        "pipeline": {"updates": 1, "prompts_per_update": 2, "samples_per_prompt": 2},
        "ray.object_store_mebibytes": 100,
    }
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    command = [sys.executable, "-m", "cluster", "run", "examples/arena/distill.yaml", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "arena"
    [update] = [row for row in read_jsonl(run / "metrics.jsonl") if row["step"] == 1]
    # An untrained model's first move is invalid, and so is its second, which ends the game.
    assert update["turns_mean"] > 1 and update["ratio_mean"] == pytest.approx(1, abs=1e-4)
    samples = [row for path in (run / "trajectories").glob("*.jsonl") for row in read_jsonl(path)]
    assert samples and all("You are playing Guess The Number" in row["prompt"] for row in samples)
    assert any(re.search("attempted an invalid move", row["response"]) for row in samples)
