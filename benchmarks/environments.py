"""What episodes cost beside single answers, and how busy an engine is while environments think.

python -m benchmarks.environments cost [--runs 2] [--updates 4] [--hidden 128] [--layers 2]
    Campaigns by turns, with responses of the same length: single answers, and episodes of short and of long turns with an
    environment that answers at once. Processor seconds of all processes for each 1,000 tokens, of responses and of the
    student's, and their ratios. --hidden, --layers: of the student and of the teacher.
python -m benchmarks.environments thinking [--seats 16]
    Environments that answer at once, after as long as a turn takes, and after four times as long: tokens a second, the
    share of the loop in which the engine works, and the episodes that it has.

Real Ray, vLLM, learner and teacher; models made from seeds, untrained. Prints JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from actors.environment.base import Episode
from benchmarks.watch import marks, rows
from tests.tiny_models import CHARACTERS, make_tiny_model, make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
LETTERS = [*CHARACTERS, *map(chr, range(0x4E00, 0x4E00 + 3000))]
"""So many that an untrained student ends hardly any answer before its limit."""
TOKENS = 320
"""Of a response: single answers and episodes are cut there, so all are of one length."""
PROMPTS, SAMPLES = 8, 4
WARM = 1
"""Updates before those that are measured."""


TURNS: dict[str, list[int] | None] = {
    "single": None,
    "short turns": list(range(20, 3000, 26)),
    "long turns": list(range(20, 3000, 100)),
}
"""Tokens that end a turn. An untrained student draws one after some 26 tokens, as in a game, or 100, as an agent writes."""


class Answers:
    """Answers every turn with a word of two letters, after so many seconds, without an end."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    async def reset(self, record: dict[str, Any], episode: Episode) -> None:
        """The student reads the record's prompt."""
        self.draw = random.Random(episode.seed)

    async def step(self, message: dict[str, Any]) -> tuple[str, bool, float]:
        """Another to every turn, as nobody could have prepared."""
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return "".join(self.draw.choices(LETTERS, k=2)), False, 0.0


def make_folder(folder: Path, hidden: int, layers: int) -> Path:
    """Student, teacher and prompts."""
    for seed, name in enumerate(("student", "teacher")):
        tokenizer = make_tiny_tokenizer(LETTERS)
        make_tiny_model(folder / name, hidden=hidden, layers=layers, context=1024, seed=seed, tokenizer=tokenizer)
    prompts = [json.dumps({"prompt": f"{number}+{number}=", "answer": str(2 * number)}) for number in range(100, 600)]
    (folder / "train.jsonl").write_text("\n".join(prompts) + "\n")
    return folder


def sampling_of(turns: str) -> dict[str, Any]:
    """The section `sampling`."""
    return {"max_response_tokens": TOKENS, "stop_token_ids": TURNS[turns] or []}


def environment_of(turns: str, seconds: float) -> dict[str, Any] | None:
    """The section `environment`; None for single answers. seconds: that an answer takes."""
    if TURNS[turns] is None:
        return None
    return {"name": "benchmarks.environments:Answers", "arguments": {"seconds": seconds}, "max_turns": 1000}


def engine_of(seats: int) -> dict[str, Any]:
    """The section `rollout.engine`."""
    return {"max_num_seqs": seats, "kv_cache_memory_bytes": 256 << 20, "block_size": 32}


def configuration(
    folder: Path, name: str, turns: str, seats: int, seconds: float, staleness: int, updates: int
) -> Path:
    """seconds: that an environment takes for an answer. updates: that are measured."""
    own = {"cpus_per_replica": 0.2}
    content: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "student": {"model": str(folder / "student")},
        "teachers": {"default": {"model": str(folder / "teacher"), "dtype": "float32", **own}},
        "prompts": {"path": str(folder / "train.jsonl")},
        "sampling": sampling_of(turns),
        "rollout": {"dtype": "float32", "engine": engine_of(seats), **own},
        "learner": {"compute_dtype": "float32", **own},
        "pipeline": {
            "updates": WARM + updates,
            "prompts_per_update": PROMPTS,
            "samples_per_prompt": SAMPLES,
            "max_staleness": staleness,
        },
        "checkpoint": {"every_updates": 1000},
    }
    if environment := environment_of(turns, seconds):
        content["environment"] = {**environment, **own}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


def run(config: Path, folder: Path, updates: int) -> dict[str, Any]:
    """Of the measured updates: wall and processor seconds, the latter by process too, tokens, and what metrics say."""
    run_dir = folder / "runs" / config.stem
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "run", str(config)], cwd=ROOT, stdout=log, stderr=log
        )
        seen = marks(process, run_dir / "metrics.jsonl", (WARM, WARM + updates))
        if process.wait() or len(seen) < 2:
            sys.exit((folder / "log").read_text()[-3000:])
    (_, began, before), (_, ended, after) = seen
    by_kind: dict[str, float] = {}
    for pid, (kind, seconds) in after.items():
        by_kind[kind] = by_kind.get(kind, 0.0) + seconds - before.get(pid, (kind, 0.0))[1]
    every = [row for row in rows(run_dir / "metrics.jsonl") if WARM < row["step"] <= WARM + updates]
    written = sum(row["tokens_trained"] for row in every)
    tokens = written / (1 - statistics.mean(row.get("context_share", 0.0) for row in every))
    turns = statistics.mean(row.get("turns_mean", 1.0) for row in every)
    wall = every[-1]["wall_seconds"] - every[0]["wall_seconds"] or ended - began
    summary = json.loads((run_dir / "summary.json").read_text())
    states = summary["utilisation"]["roles"]["rollout"]
    return {
        "processor_seconds": round(sum(by_kind.values()), 2),
        "milliseconds_per_1000_tokens": {
            "all": round(1e6 * sum(by_kind.values()) / tokens, 1),
            **{kind: round(1e6 * own / tokens, 1) for kind, own in sorted(by_kind.items()) if own > 0.05},
        },
        "milliseconds_per_1000_tokens_of_the_student": round(1e6 * sum(by_kind.values()) / written, 1),
        "tokens": round(tokens),
        "of_the_student": written,
        "turns_mean": round(turns, 2),
        "tokens_of_a_turn": round(written / (len(every) * PROMPTS * SAMPLES) / turns, 1),
        "tokens_per_second": round(tokens * (len(every) - 1) / len(every) / wall),
        "engine_works": round(sum(row["busy_rollout"] for row in every[1:]) / wall, 3),
        "engine_waits_for_environments": round(states.get("environment", 0.0) / sum(states.values()), 3),
        "episodes_at_the_engine": round(statistics.mean(row["queue_sampling"] for row in every), 1),
        "environment_seconds_mean": round(
            statistics.mean(row.get("environment_seconds_mean", 0.0) for row in every), 3
        ),
    }


def told(found: Iterator[tuple[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """All results by name; each is printed to stderr when it is there."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name, one in found:
        results.setdefault(name, []).append(one)
        print(name, json.dumps(one), file=sys.stderr, flush=True)
    return results


def cost(folder: Path, runs: int, updates: int) -> dict[str, Any]:
    """Single answers and episodes by turns, in synchronous campaigns, which drop nothing."""

    def each() -> Iterator[tuple[str, dict[str, Any]]]:
        for number in range(runs):
            for turns in TURNS:
                name = f"{turns.replace(' ', '-')}-{number}"
                yield turns, run(configuration(folder, name, turns, 64, 0.0, 0, updates), folder, updates)

    results = told(each())
    found: dict[str, Any] = {}
    for key in ("milliseconds_per_1000_tokens", "milliseconds_per_1000_tokens_of_the_student"):
        each = {turns: statistics.median(total(one[key]) for one in own) for turns, own in results.items()}
        ratios = {turns: round(own / each["single"], 3) for turns, own in each.items() if turns != "single"}
        found[key] = {**each, "ratios": ratios}
    return {**found, "runs": results}


def total(of: float | dict[str, float]) -> float:
    """The number, or that of all processes."""
    return of["all"] if isinstance(of, dict) else of


def thinking(folder: Path, seats: int, updates: int) -> dict[str, Any]:
    """Environments that take no time, as long as a turn, and four times as long."""

    def campaign(name: str, seconds: float) -> dict[str, Any]:
        return run(configuration(folder, name, "short turns", seats, seconds, 2, updates), folder, updates)

    first = campaign("at-once", 0.0)
    of_a_turn = first["tokens"] / (updates * PROMPTS * SAMPLES) / first["turns_mean"]
    turn = seats * of_a_turn / first["tokens_per_second"]
    waits = {"as long as a turn": turn, "four times as long": 4 * turn}
    results = told((what, campaign(f"waits-{n}", seconds)) for n, (what, seconds) in enumerate(waits.items()))
    return {"seconds_of_a_turn": round(turn, 4), "at once": [first], **results}


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "thinking"])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--seats", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = make_folder(Path(temporary), options.hidden, options.layers)
        if options.what == "cost":
            found = cost(folder, options.runs, options.updates)
        else:
            found = thinking(folder, options.seats, options.updates)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
