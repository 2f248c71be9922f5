"""The chunked head against the whole array."""

import pytest
import torch

from actors.logprobs import chunked_head, entropy, token_logprobs


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_whole_array(chunk_tokens: int, temperature: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, requires_grad=True)
    weight, bias = torch.randn(11, 5, requires_grad=True), torch.randn(11, requires_grad=True)
    tokens = torch.randint(11, (7,))
    widest = 0

    def reduce(logprobs: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        nonlocal widest
        widest = max(widest, len(logprobs))
        return token_logprobs(logprobs, tokens[rows]), entropy(logprobs)

    chosen, entropies = chunked_head(hidden, weight, bias, reduce, chunk_tokens=chunk_tokens, temperature=temperature)
    whole = torch.log_softmax((hidden @ weight.T + bias) / temperature, -1)
    expected = whole[torch.arange(7), tokens], torch.distributions.Categorical(logits=whole).entropy()
    torch.testing.assert_close((chosen, entropies), expected)
    assert widest <= chunk_tokens
    grads = torch.autograd.grad((chosen * torch.arange(7)).sum() + entropies.sum(), (hidden, weight, bias))
    wanted = torch.autograd.grad((expected[0] * torch.arange(7)).sum() + expected[1].sum(), (hidden, weight, bias))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)


def test_a_chunk_is_not_kept_for_the_backward_pass() -> None:
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_head(hidden, weight, None, lambda lp, rows: (lp[:, 0],), chunk_tokens=8)
    assert max(kept, default=0) <= weight.numel()  # the weights themselves, never [chunk, vocabulary]


def test_no_tokens_give_empty_results() -> None:
    (found,) = chunked_head(torch.zeros(0, 4), torch.randn(9, 4), None, lambda lp, rows: (lp[:, 0],), chunk_tokens=8)
    assert found.shape == (0,)


def test_gradients_are_those_of_double_precision_to_single_precision() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(50, 16, dtype=torch.float64), torch.randn(300, 16, dtype=torch.float64)
    tokens = torch.randint(300, (50,))

    def gradients(dtype: torch.dtype, chunk_tokens: int | None) -> tuple[torch.Tensor, ...]:
        h, w = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight))
        if chunk_tokens is None:
            chosen = token_logprobs(torch.log_softmax(h @ w.T, -1), tokens)
        else:
            (chosen,) = chunked_head(
                h, w, None, lambda lp, rows: (token_logprobs(lp, tokens[rows]),), chunk_tokens=chunk_tokens
            )
        return torch.autograd.grad(chosen.sum(), (h, w))

    exact = gradients(torch.float64, None)
    for chunk_tokens in (1, 7, 50):
        for found, wanted in zip(gradients(torch.float32, chunk_tokens), exact, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_an_impossible_token_adds_nothing_to_the_entropy() -> None:
    logprobs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    torch.testing.assert_close(entropy(logprobs), torch.tensor([0.6931472, 0.0]))
