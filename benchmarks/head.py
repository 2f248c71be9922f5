"""Compares the chunked output layer with the full [tokens, vocabulary] array, and prints a Markdown table.

    OMP_NUM_THREADS=2 python -m benchmarks.head [--tokens 4096] [--vocabulary 151936] [--hidden 1024] [--chunks 128 512]

One forward and backward pass of the mean log-prob of given tokens, in float32. Each measurement is a process of its own,
in turn. Extra memory is the growth of the peak resident set minus inputs and gradients, which both variants need; the full
array needs about 14 GiB at the sizes above. The gradient's error is the largest difference from double precision, divided
by the gradient's largest entry, at an eighth of the tokens and of the vocabulary.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from actors.forward.logprobs import chunked_head, token_logprobs

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def full_array(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The loss from the [N, V] array."""
    return token_logprobs(torch.log_softmax(hidden @ weight.T, -1), tokens).mean()


def chunked(chunk_tokens: int) -> Loss:
    """The loss as the learner computes it."""

    def loss(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        (chosen,) = chunked_head(
            hidden, weight, None, lambda lp, rows: (token_logprobs(lp, tokens[rows]),), chunk_tokens=chunk_tokens
        )
        return chosen.mean()

    return loss


def inputs(tokens: int, vocabulary: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and weights for which the logits have variance 1, the order of magnitude of a trained model."""
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden)
    weight = torch.randn(vocabulary, hidden).mul_(hidden**-0.5)
    return states.requires_grad_(), weight.requires_grad_(), torch.randint(vocabulary, (tokens,))


def measure(loss: Loss, sizes: tuple[int, int, int]) -> dict[str, float]:
    """Seconds, CPU seconds and extra bytes of one pass in this process, which must not have run another before."""
    arguments = inputs(*sizes)
    needed = sum(x.nbytes for x in arguments[:2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start, cpu = time.perf_counter(), time.process_time()
    loss(*arguments).backward()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu": cpu, "bytes": peak - before - needed}


def error(loss: Loss, sizes: tuple[int, int, int]) -> float:
    """Largest error of a gradient's entry, relative to that gradient's largest entry."""
    states, weight, tokens = inputs(*sizes)
    found = torch.autograd.grad(loss(states, weight, tokens), (states, weight))
    exact = [x.detach().double().requires_grad_() for x in (states, weight)]
    wanted = torch.autograd.grad(full_array(*exact, tokens), exact)
    return max(((f - w).abs().max() / w.abs().max()).item() for f, w in zip(found, wanted, strict=True))


def main() -> None:
    """Prints one row for each chunk size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("vocabulary", 151936), ("hidden", 1024), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.tokens, options.vocabulary, options.hidden)
    if options.measure is not None:
        print(json.dumps(measure(chunked(options.measure) if options.measure else full_array, sizes)))
        return
    results: dict[int, list[dict[str, float]]] = {chunk: [] for chunk in (0, *options.chunks)}
    for _ in range(options.repeats):
        for chunk, found in results.items():
            command = [sys.executable, "-m", "benchmarks.head", "--measure", str(chunk)]
            command += [f"--{name}={getattr(options, name)}" for name in ("tokens", "vocabulary", "hidden")]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    best = {chunk: {key: min(r[key] for r in found) for key in found[0]} for chunk, found in results.items()}
    small = (sizes[0] // 8, sizes[1] // 8, sizes[2])
    print("| head | seconds | CPU seconds | extra MiB | time / full | CPU / full | memory / full | gradient's error |")
    print("|---|---|---|---|---|---|---|---|")
    for chunk, row in best.items():
        ratios = [row[key] / best[0][key] for key in ("seconds", "cpu", "bytes")]
        wrong = np.max(error(chunked(chunk) if chunk else full_array, small))
        print(
            f"| {f'chunks of {chunk}' if chunk else 'full'} | {row['seconds']:.1f} | {row['cpu']:.1f} "
            f"| {row['bytes'] / 2**20:.0f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} | {wrong:.1e} |"
        )


if __name__ == "__main__":
    main()
