"""Size and cost of weight deltas after real AdamW steps: prints a Markdown table.

    python -m benchmarks.delta [--steps 12] [--lr 1e-6 1e-5 5e-5 1e-4]

fp32 masters of about 10M parameters (normal, scale 0.02, as models are initialised), gradients of a changing noise
around a fixed direction, cast to bf16 after each step. The last `MEASURED` steps are coded, when the moments are warm.
The bound holds for independent elements: the entropy of "changed or not" at each position, plus that of the steps.
Times are the best of several, over one memcpy of the new weights in the same process. OMP_NUM_THREADS sets the threads.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from actors.weights.buckets import WeightVersion, pack
from actors.weights.delta import apply_delta, encode_delta

MEASURED = 3
TARGETS = {1e-6: 0.02, 1e-5: 0.08, 5e-5: 0.18, 1e-4: 0.25}
HIDDEN, INNER, LAYERS, VOCABULARY = 512, 1408, 3, 2048


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a small decoder."""
    found: dict[str, tuple[int, ...]] = {"embed": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        found |= {f"{layer}.{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "o")}
        found |= {f"{layer}.gate": (INNER, HIDDEN), f"{layer}.up": (INNER, HIDDEN), f"{layer}.down": (HIDDEN, INNER)}
        found |= {f"{layer}.norm": (HIDDEN,)}
    return found


def version(number: int, parameters: dict[str, torch.nn.Parameter]) -> tuple[WeightVersion, list[np.ndarray]]:
    """The parameters in bf16, as they are published: (manifest, buckets)."""
    *buckets, manifest = pack(number, list(parameters.items()), "bfloat16", 64 << 20)
    assert isinstance(manifest, WeightVersion)
    return manifest, [bucket for bucket in buckets if isinstance(bucket, np.ndarray)]


def best(call: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of several calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def entropy(counts: np.ndarray) -> float:
    """Entropy of all symbols together, in bits."""
    counts = counts[counts > 0].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def bound(old: list[np.ndarray], new: list[np.ndarray]) -> tuple[float, float]:
    """(bytes, share of changed elements). Derives the order of floats independently of the codec."""

    def order(buckets: list[np.ndarray]) -> np.ndarray:
        bits = np.concatenate(buckets).view(np.uint16).astype(np.int64)
        return np.where(bits >= 0x8000, 0x7FFF - bits, bits)

    steps = order(new) - order(old)
    _, counts = np.unique(steps, return_counts=True)
    changed = np.count_nonzero(steps)
    _, moved = np.unique(steps[steps != 0], return_counts=True)
    assert counts.sum() == len(steps)
    return (entropy(np.array([changed, len(steps) - changed])) + entropy(moved)) / 8, changed / len(steps)


def measure(rate: float, steps: int, repeats: int) -> tuple[float, ...]:
    """(changed, bytes over dense, over the bound, encode and apply over memcpy, GB/s of it), means of the last steps."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.nn.Parameter(
            torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
        )
        for name, shape in shapes().items()
    }
    direction = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    rows = []
    old_manifest, old = version(0, parameters)
    for step in range(1, steps + 1):
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = 1e-3 * (0.3 * direction[name] + noise)
        optimizer.step()
        manifest, new = version(step, parameters)
        if step > steps - MEASURED:
            delta, payload = encode_delta(old_manifest, old, manifest, new)
            _, applied = apply_delta(delta, payload, old_manifest, old)
            assert all(np.array_equal(a, b) for a, b in zip(applied, new, strict=True))
            flat = np.concatenate(new)
            target = np.zeros_like(flat)
            copy = best(partial(np.copyto, target, flat), 4 * repeats)
            arguments = (old_manifest, old, manifest, new)
            encode = best(partial(encode_delta, *arguments), repeats)
            given = (delta, payload, old_manifest, old)
            decode = best(partial(apply_delta, *given), repeats)
            least, changed = bound(old, new)
            sizes = (changed, len(payload) / manifest.nbytes, len(payload) / least)
            rows.append((*sizes, encode / copy, decode / copy, manifest.nbytes / copy / 1e9))
        old_manifest, old = manifest, new
    return tuple(float(column) for column in np.mean(rows, axis=0))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, nargs="+", default=list(TARGETS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    count = sum(int(np.prod(shape)) for shape in shapes().values())
    print(f"{count / 1e6:.1f}M parameters, bf16, AdamW steps {arguments.steps - MEASURED + 1}-{arguments.steps}\n")
    print(
        "| learning rate | changed | delta / dense | target | delta / bound | encode / memcpy | apply / memcpy | memcpy GB/s |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for rate in arguments.lr:
        changed, share, over, encode, decode, copy = measure(rate, arguments.steps, arguments.repeats)
        target = f"{TARGETS[rate]:.0%}" if rate in TARGETS else "-"
        print(
            f"| {rate:g} | {changed:.1%} | {share:.2%} | {target} | {over:.3f} | {encode:.1f} | {decode:.1f} | {copy:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
