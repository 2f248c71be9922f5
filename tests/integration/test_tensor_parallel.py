"""A rollout engine over two ranks: weights reach its workers through shared memory."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config import RolloutConfig, SamplingConfig
from actors.rollout.actor import RolloutActor
from actors.rollout.vllm_engine import VllmEngine
from actors.trajectory import Requests, offsets_of
from actors.weights.buckets import WeightVersion, join, pack, pack_all
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_fleet import Fleet
from tests.processes import below
from tests.tiny_engine import Brake
from tests.tiny_models import make_tiny_model
from tests.waiting import until


def of_ranks(model: torch.nn.Module, version: int) -> list[tuple[WeightVersion, list[np.ndarray]]]:
    """The parts of a version that three ranks of a learner publish. The last rank has no rows."""
    cut = {name: [*tensor.detach().chunk(2), tensor.detach()[:0]] for name, tensor in model.named_parameters()}
    return [
        pack_all(version, [(name, parts[rank]) for name, parts in cut.items()], "float32", 50_000) for rank in range(3)
    ]


@pytest.mark.integration
def test_two_ranks_sample_from_the_published_weights(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"), dtype=torch.float32).eval()
    config = RolloutConfig(
        dtype="float32", tensor_parallel_size=2, engine={"max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    )
    sampling = SamplingConfig(max_response_tokens=12)
    engine = VllmEngine(str(tmp_path / "model"), config, sampling, stop_token_ids=[2])
    try:
        for version in range(2):
            engine.load_weights(*join(of_ranks(model, version))).result(timeout=600)
            requests = Requests(
                ids=np.array([(0, i, 0) for i in range(4)]),
                seeds=np.arange(4),
                prompt_tokens=np.arange(6, 26, dtype=np.int32),
                prompt_offsets=offsets_of([5] * 4),
            )
            written = engine.generate(requests, sampling).result(timeout=600)
            assert set(written.policy_versions.tolist()) == {version}
            for row in range(4):
                response = slice(*written.response_offsets[row : row + 2])
                text = np.concatenate([written.prompt_tokens[5 * row : 5 * row + 5], written.response_tokens[response]])
                tokens = torch.from_numpy(text.astype(np.int64))
                with torch.no_grad():
                    logprobs = torch.log_softmax(model(tokens[None]).logits[0, 4:-1], -1)
                expected = logprobs.gather(-1, tokens[5:, None])[:, 0].numpy()
                np.testing.assert_allclose(written.behaviour_logprobs[response], expected, atol=1e-4)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
    finally:
        engine.close()


class HeldActor(RolloutActor):
    """The first one stops in the middle of its first response, until there is a file `go`."""

    def __init__(self, folder: Path, *arguments: Any):
        super().__init__(*arguments)
        if not (folder / "first").exists():
            (folder / "first").touch()
            brake = Brake(self._engine, steps=5)
            threading.Thread(target=lambda: (until((folder / "go").exists, "a signal"), brake.release())).start()


@pytest.mark.integration
@pytest.mark.usefixtures("ray_session")
@pytest.mark.nightly
def test_an_actor_whose_engine_process_dies_is_replaced_and_leaves_nothing_behind(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    *buckets, manifest = pack(0, list(model.named_parameters()), "float32", 50_000)
    sampling = SamplingConfig(max_response_tokens=40)
    config = RolloutConfig(
        dtype="float32", tensor_parallel_size=2, engine={"max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    )
    asked = Requests(
        ids=np.array([(0, 0, 0)]),
        seeds=np.arange(1),
        prompt_tokens=np.arange(6, 11, dtype=np.int32),
        prompt_offsets=offsets_of([5]),
    )
    events: list[str] = []

    async def prepare(handle: Any) -> None:
        await handle.load_weights.remote(*buckets, manifest)

    async def run() -> None:
        fleet = Fleet(
            "rollout",
            HeldActor,
            (tmp_path, str(tmp_path / "model"), config, sampling, [], 0),
            {},
            replicas=1,
            resources=Resources(0.1, 0.0, {"OMP_NUM_THREADS": "1"}),
            max_restarts=3,
            start_timeout_seconds=600,
            hang_timeout_seconds=600.0,
            on_event=lambda kind, **_: events.append(kind),
        )
        fleet.prepare = prepare
        try:
            await fleet.start()
            family = below(fleet.replicas[0].process)
            assert len(family) >= 2, "an engine of two ranks has a process for each"
            call = asyncio.create_task(fleet.call("generate", asked))
            while not (await fleet.replicas[0].handle.status.remote())["busy_seconds"]:  # at work
                await asyncio.sleep(0.01)
            assert not call.done()
            family[-1].kill()
            (tmp_path / "go").touch()
            await call
            assert fleet.replicas[0].restarts == 1
            _, left = psutil.wait_procs(family, timeout=600)
            assert not left
        finally:
            fleet.close()

    asyncio.run(run())
    told = [event for event in events if event not in ("waiting_for_resources", "actor_starting")]  # on a busy machine
    assert told == ["actor_started", "actor_failed", "actor_started", "actor_restarted"]
