"""A rollout engine over two ranks: weights reach its workers through shared memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config import RolloutConfig, SamplingConfig
from actors.trajectory import Requests, offsets_of
from actors.vllm_engine import VllmEngine
from actors.weights import pack
from tests.tiny_models import make_tiny_model


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
            *buckets, manifest = pack(version, list(model.named_parameters()), "float32", 50_000)
            engine.load_weights(manifest, buckets).result(timeout=60)
            requests = Requests(
                ids=np.array([(0, i, 0) for i in range(4)]),
                seeds=np.arange(4),
                prompt_tokens=np.arange(6, 26, dtype=np.int32),
                prompt_offsets=offsets_of([5] * 4),
            )
            written = engine.generate(requests, sampling).result(timeout=60)
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
