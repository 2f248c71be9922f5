"""Chained deltas under faults: checks that a reader always holds the old version or the new one. Prints counts.

    python -m benchmarks.delta_chain [--deltas 1000] [--seed 0]

A writer changes weights a little and publishes deltas. On the way each may be damaged (a flipped bit in the payload, or in
a field of the manifest), come twice, out of order, or not at all. A reader may be killed, and then holds nothing, before or
after it has applied one. After every event the reader's bytes are hashed and looked up among those of all versions. A
reader that cannot apply a delta asks for the last dense version and the deltas after it, as a new actor does.
"""

import argparse
import hashlib
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from actors.errors import WeightError
from actors.weights.buckets import WeightVersion, pack_all
from actors.weights.delta import DeltaVersion, Receiver, encode_delta

ANCHOR_EVERY = 20
Version = tuple[WeightVersion, list[np.ndarray]]
Delta = tuple[DeltaVersion, np.ndarray]


def digest(buckets: list[np.ndarray]) -> str:
    """SHA-256 of all bytes."""
    found = hashlib.sha256()
    for bucket in buckets:
        found.update(bucket)
    return found.hexdigest()


def damaged(delta: Delta, draw: random.Random) -> Delta:
    """A copy with one wrong bit or one wrong field."""
    manifest, payload = delta
    if draw.random() < 0.7 and len(payload):
        wrong = payload.copy()
        wrong[draw.randrange(len(wrong))] ^= 1 << draw.randrange(8)
        return manifest, wrong
    entries = list(manifest.entries)
    place = draw.randrange(len(entries))
    entries[place] = replace(entries[place], base_checksum=entries[place].base_checksum ^ 1)
    return replace(manifest, entries=tuple(entries)), payload


def apply(receiver: Receiver, delta: Delta) -> None:
    """Applies a delta as a rollout actor does: completely, or not at all with WeightError."""
    receiver.hold(receiver.receive(delta[1], delta[0]))


def run(deltas: int, seed: int) -> Counter[str]:
    """Publishes that many deltas; counts of what happened."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    weights = torch.from_numpy(rng.normal(0, 0.02, 60_000).astype(np.float32))
    counts: Counter[str] = Counter()
    receiver, known, chain = Receiver(True), set(), []
    last: Version | None = None

    def catch_up() -> None:
        (manifest, buckets), *others = chain
        receiver.hold(receiver.receive(*buckets, manifest))
        for delta in others:
            apply(receiver, delta)

    for number in range(deltas + 1):
        weights += torch.from_numpy(rng.normal(0, 1e-5, len(weights)).astype(np.float32))
        named = [("a", weights[:20_000]), ("b", weights[20_000:])]
        new = pack_all(number, named, "bfloat16", 50_000)
        known.add(digest(new[1]))
        delta = encode_delta(*last, *new) if last else None
        chain = [new] if delta is None or number % ANCHOR_EVERY == 0 else [*chain, delta]
        last = new
        if delta is None:
            catch_up()
            continue
        event = draw.choice(["good"] * 4 + ["flip", "twice", "early", "lost", "killed before", "killed after"])
        counts[event] += 1
        try:
            if event == "flip":
                apply(receiver, damaged(delta, draw))
                counts["damage not noticed"] += 1
            elif event == "early" and len(chain) > 2:
                receiver = Receiver(True)
                receiver.hold(receiver.receive(*chain[0][1], chain[0][0]))
                apply(receiver, delta)
                counts["wrong order not noticed"] += 1
            elif event == "killed before":
                receiver = Receiver(True)
                apply(receiver, delta)
                counts["missing base not noticed"] += 1
            elif event != "lost":
                apply(receiver, delta)
                if event == "twice":
                    apply(receiver, delta)
                if event == "killed after":
                    receiver = Receiver(True)
        except WeightError:
            counts["refused"] += 1
            for _, buckets in receiver._held:
                counts["neither old nor new"] += digest(list(buckets)) not in known
            catch_up()
        if not receiver._held or receiver._held[0][0].version != number:
            counts["caught up"] += 1
            catch_up()
        [(_, held)] = receiver._held
        counts["neither old nor new"] += digest(list(held)) != digest(new[1])
    return counts


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deltas", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = run(options.deltas, options.seed)
    for name in ("neither old nor new", "damage not noticed", "wrong order not noticed", "missing base not noticed"):
        counts.setdefault(name, 0)
    print("| what | times |\n|---|---|")
    for name, count in sorted(counts.items()):
        print(f"| {name} | {count} |")


if __name__ == "__main__":
    main()
