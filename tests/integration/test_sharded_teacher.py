"""A teacher of two ranks (processes with gloo) gives the scores of a teacher in one process."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import GPT2Config

from actors.config import SamplingConfig, TeacherConfig
from actors.data.models import tensor_parallel_plan
from actors.errors import UserError
from actors.teacher.local import LocalTeacher
from actors.teacher.tensor_parallel import ShardedTeacher
from actors.trajectory import Limits, Prompts, Requests
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_fleet import Fleet
from tests.processes import below, command_of
from tests.tiny_models import make_tiny_model
from tests.unit.actors.test_teacher import written

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration


def compare(path: str) -> None:
    t, shape = written(), (TeacherConfig(path, dtype="float32", signal="topk", top_k=5), "teachers.wise")
    alone, ranks = LocalTeacher(*shape), ShardedTeacher(replace(shape[0], tensor_parallel_size=2), shape[1])
    layers = ranks._teacher._model.model.layers
    assert layers[0].self_attn.q_proj.weight.to_local().shape[0] == layers[0].self_attn.q_proj.weight.shape[0] / 2
    for ids in (t.ids, t.ids[::-1], t.ids[2:3]):
        ours, theirs = (teacher.score(ids, t)[1] for teacher in (ranks, alone))
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours.support_logprobs, theirs.support_logprobs, rtol=0, atol=1e-5)
    ours, theirs = (x.generate(Prompts(t.prompt_tokens, t.prompt_offsets), Limits(8, [1]))[0] for x in (ranks, alone))
    assert np.array_equal(ours, theirs)
    asked = Requests(ids=t.ids, seeds=t.ids[:, 1] + 5, prompt_tokens=t.prompt_tokens, prompt_offsets=t.prompt_offsets)
    ours, theirs = (x.sample(asked, 3, SamplingConfig(max_response_tokens=8), [1])[1] for x in (ranks, alone))
    assert np.array_equal(ours.response_tokens, theirs.response_tokens)

    print("they agree", flush=True)
    [rank] = [child for child in below() if "spawn_main" in " ".join(command_of(child))]
    rank.send_signal(signal.SIGKILL)
    ranks.score(t.ids, t)


def test_two_ranks_score_and_write_what_one_does_and_a_rank_that_is_lost_ends_the_actor(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", heads_of_keys=2)
    code = f"from {__name__} import compare; compare({str(path)!r})"  # a process is a rank of one group only
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert "they agree" in done.stdout and done.returncode == 13, done.stderr[-3000:]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.nightly
def test_an_actor_that_has_lost_a_rank_is_replaced_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path, t, events = make_tiny_model(tmp_path / "m", heads_of_keys=2), written(), []
    config = TeacherConfig(str(path), dtype="float32", signal="sampled", tensor_parallel_size=2)

    async def run() -> None:
        fleet = Fleet(
            "teacher.wise", ShardedTeacher, (config, "teachers.wise"), {}, replicas=1, resources=Resources(0.1, 0.0),
            max_restarts=3, start_timeout_seconds=600, on_event=lambda kind, **_: events.append(kind),
        )  # fmt: skip
        try:
            await fleet.start()
            _, before = await fleet.call("score", t.ids, t, returns=2)
            family = below(fleet.replicas[0].process)
            [rank] = [child for child in family if "spawn_main" in " ".join(command_of(child))]
            rank.kill()
            _, after = await fleet.call("score", t.ids, t, returns=2)
            assert np.array_equal((await before).logprobs, (await after).logprobs)
            assert not psutil.wait_procs(family, timeout=600)[1]
        finally:
            fleet.close()

    asyncio.run(run())
    told = [event for event in events if event not in ("waiting_for_resources", "actor_starting")]  # on a busy machine
    assert told == ["actor_started", "actor_died", "actor_started", "actor_restarted"]


def test_a_model_without_a_plan_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^teachers\.wise\.model: found a gpt2 model.* or backend: vllm"):
        tensor_parallel_plan(str(tmp_path), False, "teachers.wise.model")
