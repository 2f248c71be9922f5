"""Packed rows against padded batches with transformers' own attention."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, MistralConfig, PreTrainedModel

from actors.forward import packing as attention
from actors.forward.packing import Packing, hidden_states, use_packed_attention
from tests.tiny_models import make_tiny_model

LENGTHS = np.array([3, 3, 5, 9, 9, 9, 1])
TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def from_config(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def loaded(folder: Path, architecture: Any) -> PreTrainedModel:
    path = make_tiny_model(folder, architecture=architecture)
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()


@pytest.fixture(params=["qwen3", "qwen3_moe", "llama", "mistral with a window of 4"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    if request.param.startswith("mistral"):
        return from_config(MistralConfig(**TINY, **HEADS, sliding_window=4))
    return loaded(tmp_path, request.param)


def padded_states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """[T, H] hidden states of the sequences as a batch, padded on the right and masked."""
    rows = torch.nn.utils.rnn.pad_sequence(list(tokens.split(LENGTHS.tolist())), batch_first=True)
    mask = torch.arange(rows.shape[1]) < torch.from_numpy(LENGTHS)[:, None]
    model.set_attn_implementation("sdpa")
    return model.base_model(input_ids=rows, attention_mask=mask.long(), use_cache=False).last_hidden_state[mask]


def test_packed_equals_padded_in_states_and_gradients(model: PreTrainedModel) -> None:
    tokens = torch.randint(6, 40, (LENGTHS.sum(),), generator=torch.Generator().manual_seed(1))
    assert use_packed_attention(model)
    found = []
    for run in (
        lambda: hidden_states(model.base_model, tokens.numpy(), LENGTHS, "cpu"),
        lambda: padded_states(model, tokens),
    ):
        model.zero_grad()
        states = run()
        (states * torch.arange(states.numel()).view_as(states).cos()).sum().backward()
        grads = [p.grad for p in model.base_model.parameters() if p.grad is not None]
        found.append(torch.cat([states.detach().reshape(-1), *(grad.reshape(-1) for grad in grads)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_one_sequence_and_padded_generation_are_as_before(model: PreTrainedModel) -> None:
    tokens = torch.randint(6, 40, (9,), generator=torch.Generator().manual_seed(1))
    rows = torch.stack([tokens, torch.cat([torch.zeros(4, dtype=torch.long), tokens[:5]])])
    mask = (rows != 0).long()
    found = []
    for packed in (False, True):
        assert not packed or use_packed_attention(model)
        logits = model(tokens[None], use_cache=False).logits
        written = model.generate(rows, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=-1)
        found.append((logits, written))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", ["convolutions", "attention of its own", "a bias of positions"])
def test_a_model_whose_sequences_would_mix_is_left_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "convolutions":
        model = from_config(Lfm2Config(**TINY, **HEADS, layer_types=["conv", "full_attention"]))
    else:
        model = from_config(MistralConfig(**TINY, **HEADS))
        layer = type(model.base_model.layers[0].self_attn)
        plain = layer.forward

        def forward(self: Any, packing: Any = None, **named: Any) -> Any:
            if kind == "a bias of positions":
                length = named["hidden_states"].shape[1]
                named |= {"packing": packing, "position_bias": torch.zeros(1, 4, length, length)}
            return plain(self, **named)

        monkeypatch.setattr(layer, "forward", forward)
    before = model.config._attn_implementation
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == before


def test_how_attention_is_computed_is_not_saved_with_the_model(tmp_path: Path) -> None:
    model = loaded(tmp_path / "a", "qwen3")
    assert use_packed_attention(model)
    model.save_pretrained(tmp_path / "b")
    assert "packed" not in (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize("takes_groups", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_of_gpus_is_asked_for_what_the_cpu_computes(
    window: int | None, takes_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaces the kernel, which needs a GPU, by what its documentation says, one token at a time."""

    def documented(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, most_q: int, most_k: int, **how: Any) -> torch.Tensor:
        (left, right), out, groups = how["window_size"], torch.empty_like(q), q.shape[1] // k.shape[1]
        assert right == 0 and most_q == most_k == LENGTHS.max() and cu_q.dtype == torch.int32
        # torch 2.11 does not know the argument, and takes as many heads of keys as of queries.
        assert (how["enable_gqa"] and groups == 2) if takes_groups else ("enable_gqa" not in how and groups == 1)
        for start, end in zip(cu_q.tolist(), cu_k.tolist()[1:], strict=False):
            for at in range(start, end):
                first = start if left == -1 else max(start, at - left)
                for head in range(q.shape[1]):
                    scores = k[first : at + 1, head // groups] @ q[at, head] * how["scale"]
                    out[at, head] = scores.softmax(0) @ v[first : at + 1, head // groups]
        return out

    monkeypatch.setattr(attention, "_kernel", lambda: (documented, takes_groups))
    generator = torch.Generator().manual_seed(0)
    total, module = int(LENGTHS.sum()), torch.nn.Module()
    module.num_key_value_groups = 2
    query, key, value = (
        torch.randn(1, heads, total, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    packing = Packing.of(LENGTHS, "cpu")
    how = {"scaling": 0.3, "sliding_window": window}
    ours, _ = attention._attend(module, query, key, value, None, packing, **how)
    torch.testing.assert_close(attention._attend_flash(query, key, value, packing, **how), ours)
