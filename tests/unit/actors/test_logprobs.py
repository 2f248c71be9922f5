"""The chunked head against the full [N, V] array."""

import pytest
import torch

from actors.forward.logprobs import chunked_head, entropy, token_logprobs


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


def test_gradients_flow_through_what_reduce_does_not_detach_alone() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    upstream = torch.randn(6, 9)
    before = upstream.clone()

    def reduce(logprobs: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        return logprobs, entropy(logprobs.detach()), entropy(logprobs)

    whole, entropies, _unused = chunked_head(hidden, weight, None, reduce, chunk_tokens=4)
    (found,) = torch.autograd.grad([whole, entropies], [hidden], [upstream, torch.ones(6)])
    (wanted,) = torch.autograd.grad(torch.log_softmax(hidden @ weight.T, -1), [hidden], [upstream])
    torch.testing.assert_close(found, wanted)
    assert torch.equal(upstream, before)  # what the caller gave is not worked on in place


def test_what_is_only_measured_is_computed_once_and_has_no_gradient() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    measured: list[slice] = []

    def measure(logprobs: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        measured.append(rows)
        return (entropy(logprobs),)

    first, entropies = chunked_head(hidden, weight, None, lambda lp, rows: (lp[:, 0],), chunk_tokens=4, measure=measure)
    plain = torch.log_softmax(hidden @ weight.T, -1)
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=plain).entropy())
    (found,) = torch.autograd.grad([first, entropies], [hidden], [torch.ones(6), torch.full((6,), 3.0)])
    (wanted,) = torch.autograd.grad(plain[:, 0].sum(), hidden)
    torch.testing.assert_close(found, wanted)
    assert measured == [slice(0, 4), slice(4, 8)]


def test_the_last_chunk_is_not_computed_again_but_in_a_second_backward_pass() -> None:
    torch.manual_seed(5)
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    reduced: list[int] = []

    def reduce(logprobs: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        reduced.append(rows.start)
        return (logprobs.exp().square().sum(-1), entropy(logprobs))

    squares, entropies = chunked_head(hidden, weight, None, reduce, chunk_tokens=4, temperature=0.7)
    assert reduced == [0, 4, 8]
    loss = squares.sum() + 2 * entropies.sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    assert reduced == [0, 4, 8, 0, 4]
    second = torch.autograd.grad(loss, [hidden, weight])
    assert sorted(reduced[5:]) == [0, 4, 8]
    plain = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    wanted = torch.autograd.grad(plain.exp().square().sum() + 2 * entropy(plain).sum(), [hidden, weight])
    for found, again, exact in zip(first, second, wanted, strict=True):
        torch.testing.assert_close(found, exact)
        assert torch.equal(found, again)

    reduced.clear()
    with torch.no_grad():
        chunked_head(hidden, weight, None, reduce, chunk_tokens=4)
    assert reduced == [0, 4, 8]


def test_under_autocast_the_weights_gradient_is_summed_in_single_precision() -> None:
    torch.manual_seed(3)
    hidden, weight = torch.randn(512, 8), torch.randn(16, 8, requires_grad=True)
    hidden.requires_grad_()

    def gradient(chunk_tokens: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            (chosen,) = chunked_head(hidden, weight, None, lambda lp, rows: (lp[:, 0],), chunk_tokens=chunk_tokens)
        return torch.autograd.grad(chosen.sum(), weight)[0]

    whole = torch.log_softmax((hidden.bfloat16() @ weight.bfloat16().T).float(), -1)
    (wanted,) = torch.autograd.grad(whole[:, 0].sum(), weight)
    # A product of one token is rounded to 8 bits; their sum is not, so the roundings average out.
    assert (gradient(1) - wanted).abs().max() < 0.004 * wanted.abs().max()
