"""An update's processor seconds over those of its arithmetic alone, at the matrix speed of this machine.

    OMP_NUM_THREADS=1 python -m benchmarks.learner --model DIRECTORY [--trajectories 16] [--updates 3]

One learner in this process, float32, AdamW, the reverse KL over the whole vocabulary to a teacher that sends hidden states (its
head is applied by the learner). Responses have log-normal lengths (median 64, cut at --tokens) and random tokens. Everything
from the trajectories to the new weights is counted: packing, both heads, the objective, backward pass, clipping, AdamW,
metrics. The arithmetic is that of the matrix products: for each weight of the layers one forward and two backward, the same
for the student's head on the responses, one for the teacher's, and the causal half of attention three times. Its seconds are those
at the speed of one large product (`peak`), and those of the very shapes of the layers and heads, each product timed by itself
(`shapes`). `by_operation` is where an update's processor time goes, from torch's profiler, in a further update.
Prints JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.config import StudentConfig, TeacherConfig
from actors.teacher.local import LocalTeacher
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories
from benchmarks.trl_comparison import trajectories
from learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from learner.learner import Learner

PROMPT_TOKENS = 30
LARGE = 1024
"""Rows and columns of the product that gives the machine's matrix speed."""


def processor_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of one call, the median."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def product_seconds(rows: int, inner: int, columns: int, repeats: int = 5) -> float:
    """Of one product [rows, inner] x [inner, columns] in float32."""
    left, right, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    return processor_seconds(lambda: torch.mm(left, right, out=out), repeats)


def answers(count: int, longest: int, vocabulary: int, draw: np.random.Generator) -> Trajectories:
    """Random tokens; lengths are log-normal."""
    lengths = np.exp(draw.normal(np.log(64), 1.0, count)).round().clip(1, longest).astype(int)
    prompts = [draw.integers(3, vocabulary, PROMPT_TOKENS).astype(np.int32) for _ in range(count)]
    return trajectories(prompts, [draw.integers(3, vocabulary, length).astype(np.int32) for length in lengths])


def arithmetic(model: Any, written: Trajectories, microbatch_tokens: int, chunk_tokens: int) -> dict[str, float]:
    """Floating-point operations of an update's matrix products, and their seconds as the module says."""
    head = model.get_output_embeddings()
    responses = len(written.response_tokens)
    lengths = np.diff(written.prompt_offsets) + np.diff(written.response_offsets)
    tokens = int(lengths.sum())
    rows = min(microbatch_tokens, tokens)
    operations, by_shapes = 0.0, 0.0
    timed: dict[tuple[int, int, int], float] = {}

    def add(count: int, at_once: int, inner: int, columns: int, passes: int = 3) -> None:
        """`count` tokens through a layer, `at_once` at a time; of the passes the first is forward, then two backward."""
        nonlocal operations, by_shapes
        operations += 2.0 * passes * count * inner * columns
        products = [(at_once, inner, columns), (at_once, columns, inner), (inner, at_once, columns)][:passes]
        for shape in products:
            if shape not in timed:
                timed[shape] = product_seconds(*shape)
            by_shapes += timed[shape] * count / at_once

    for layer in model.base_model.modules():
        if isinstance(layer, torch.nn.Linear):
            add(tokens, rows, layer.in_features, layer.out_features)
    vocabulary, hidden = head.weight.shape
    chunk = min(chunk_tokens, responses)
    add(responses, chunk, hidden, vocabulary)  # the student's head
    add(responses, chunk, hidden, vocabulary, passes=1)  # the teacher's
    config = model.config
    heads = config.num_attention_heads * getattr(config, "head_dim", hidden // config.num_attention_heads)
    attention = 3 * config.num_hidden_layers * 2.0 * heads * float((lengths.astype(float) ** 2).sum())
    speed = 2.0 * LARGE**3 / product_seconds(LARGE, LARGE, LARGE, 9)
    return {
        "operations": operations + attention,
        "attention_share": attention / (operations + attention),
        "operations_a_second": speed,
        "peak_seconds": (operations + attention) / speed,
        "shapes_seconds": by_shapes + attention / speed,
    }


def by_operation(update: Callable[[], Any]) -> dict[str, float]:
    """Share of each operation in the processor time of an update, the largest twelve, and of what is not in torch."""
    began = time.process_time()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        update()
    whole = time.process_time() - began
    events = sorted(profile.key_averages(), key=lambda one: -one.self_cpu_time_total)
    return {one.key: round(one.self_cpu_time_total / 1e6 / whole, 3) for one in events[:12]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The JSON."""
    teacher = LocalTeacher(
        TeacherConfig(options.model, signal="hidden", dtype="float32", microbatch_tokens=options.microbatch_tokens)
    )
    learner = Learner(
        StudentConfig(options.model),
        LearnerConfig(
            compute_dtype="float32",
            microbatch_tokens=options.microbatch_tokens,
            head_chunk_tokens=options.chunk_tokens,
            objective=ObjectiveConfig(estimator="full"),
            optimizer=OptimizerConfig(learning_rate=1e-6, warmup_updates=0),
        ),
        teachers={"default": TeacherConfig(options.model, signal="hidden")},
        total_updates=options.updates + 2,
        temperature=1.0,
        publish_dtype="float32",
        bucket_bytes=1 << 24,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="meta")
    vocabulary = model.config.vocab_size
    draw = np.random.default_rng(0)
    found = []

    def work() -> tuple[Trajectories, TeacherScores]:
        written = answers(options.trajectories, options.tokens, vocabulary, draw)
        return written, teacher.score(written.ids, written)[1]

    for number in range(options.updates + 1):
        written, scores = work()
        began, wall = time.process_time(), time.perf_counter()
        learner.update(written.ids, written, scores)
        spent, passed = time.process_time() - began, time.perf_counter() - wall
        if number == 0:
            continue  # allocates the moments, and compiles kernels
        needed = arithmetic(model, written, options.microbatch_tokens, options.chunk_tokens)
        found.append({
            "tokens": len(written.prompt_tokens) + len(written.response_tokens), "processor_seconds": spent, "wall_seconds": passed,
            **needed, "over_peak": spent / needed["peak_seconds"], "over_shapes": spent / needed["shapes_seconds"],
        })  # fmt: skip
    written, scores = work()
    return {
        **{key: statistics.median(one[key] for one in found) for key in ("over_peak", "over_shapes")},
        "updates": found,
        "by_operation": by_operation(lambda: learner.update(written.ids, written, scores)),
    }


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256, help="of a response at most")
    parser.add_argument("--microbatch-tokens", type=int, default=512)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    torch.set_num_threads(1)
    print(json.dumps(measure(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
