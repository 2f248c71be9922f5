"""Learner update, teacher scoring and publishing at the shapes of real models, next to plain loops: prints JSON.

    python -m benchmarks.gpu smoke [--out DIR]       everything that one card can show, in nine minutes: smoke/runner.py

    python -m benchmarks.gpu all --shape 4b [--tokens 16384] [--length 4096] [--parts learner plain teacher]
    python -m benchmarks.gpu learner --shape tiny --tokens 512 --length 128 --device cpu

Random weights and tokens. `all` runs each part in a process of its own. Parts:
  learner    one update as a campaign takes it: bfloat16 passes, float32 masters, chunked head, gradient checkpointing
  plain      the same loss in transformers alone: padded batches, whole logits, gradient checkpointing, fused AdamW
  liger      the same with Liger's kernels in the layers, where liger_kernel is installed
  teacher    scoring, and a prefill of the same tokens without the output layer
  publish    a version: laid out, checksummed, verified and copied into a model, and the bare copies of as many bytes
  head       the chunked head alone, forward and backward, at the shape's vocabulary
MFU counts what forward_flops counts, three times for an update, over the vendor's dense bfloat16 peak; null on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def timed(do: Callable[[], Any], repeats: int) -> tuple[float, int]:
    """(median seconds, highest memory in bytes over what was there before), after one run that is not counted."""
    import torch

    from benchmarks.ranks import reset_peak, resident

    on_gpu = torch.cuda.is_available()
    do()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else reset_peak()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        do()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    highest = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    # The kernel's highest count of pages may be a few below what it has counted just before.
    return sorted(seconds)[len(seconds) // 2], max(highest - before, 0)


def speed(options: argparse.Namespace, seconds: float, passes: int, *, head: bool) -> Result:
    """Tokens a second, and the share of the device's peak that this is."""
    import torch

    from benchmarks.gpu.shapes import PEAK_FLOPS, forward_flops

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    needed = passes * forward_flops(options.shape, options.tokens, options.length, head=head)
    return {
        "seconds": round(seconds, 4),
        "tokens_a_second": round(options.tokens / seconds),
        "mfu": peak and round(needed / seconds / peak, 4),
        "device": name,
    }


def held() -> float:
    """GB on the device."""
    import torch

    from benchmarks.ranks import resident

    return (torch.cuda.memory_allocated() if torch.cuda.is_available() else resident("VmRSS")) / 1e9


def learner_of(options: argparse.Namespace, model: Path) -> Any:
    """The learner of a campaign with the model as its student."""
    from actors.config import StudentConfig
    from learner.config import LearnerConfig, OptimizerConfig
    from learner.learner import Learner

    config = LearnerConfig(
        gradient_checkpointing=True,
        compile=options.compile,
        microbatch_tokens=options.tokens,
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_updates=0),
    )
    student = StudentConfig(str(model))
    return Learner(
        student, config, total_updates=100, temperature=1.0, publish_dtype="bfloat16", bucket_bytes=256 << 20
    )


def measure_learner(options: argparse.Namespace, model: Path) -> Result:
    """One update."""
    from benchmarks.gpu.shapes import make_work

    learner = learner_of(options, model)
    written, scores = make_work(options.shape, options.tokens, options.length, options.prompt)
    seconds, extra = timed(lambda: learner.update(written.ids, written, scores), options.repeats)
    return {**speed(options, seconds, 3, head=True), "held_gb": held(), "extra_gb": extra / 1e9}


def measure_plain(options: argparse.Namespace, model: Path, *, liger: bool = False) -> Result:
    """One step of the same loss as most scripts take it."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.gpu.shapes import make_work

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(fused_linear_cross_entropy=False, cross_entropy=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").to(device)
    network.gradient_checkpointing_enable({"use_reentrant": False})
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=device == "cuda")
    written, scores = make_work(options.shape, options.tokens, options.length, options.prompt)
    count, prompt = len(written), options.prompt
    own = [
        torch.from_numpy(x.astype("int64")).view(count, -1) for x in (written.prompt_tokens, written.response_tokens)
    ]
    tokens = torch.cat(own, 1).to(device)
    teacher = torch.from_numpy(scores.logprobs).view(count, -1).to(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for row in range(count):
            with torch.autocast(device, torch.bfloat16):
                logits = network(tokens[row : row + 1], use_cache=False).logits
            logprobs = torch.log_softmax(logits[:, prompt - 1 : -1].float(), -1)
            chosen = logprobs.gather(-1, tokens[row : row + 1, prompt:, None])[..., 0]
            cost = (chosen - teacher[row : row + 1]).detach()
            ((chosen - chosen.detach()).exp() * cost).sum().div(teacher.numel()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    seconds, extra = timed(step, options.repeats)
    return {**speed(options, seconds, 3, head=True), "held_gb": held(), "extra_gb": extra / 1e9}


def measure_liger(options: argparse.Namespace, model: Path) -> Result:
    """As `plain`, with Liger's layers."""
    from importlib.util import find_spec

    if find_spec("liger_kernel") is None:
        return {"skipped": "liger_kernel is not installed"}
    return measure_plain(options, model, liger=True)


def measure_teacher(options: argparse.Namespace, model: Path) -> Result:
    """Scoring over prefill."""
    import torch

    from actors.config import TeacherConfig
    from actors.forward.packing import hidden_states
    from actors.teacher.local import LocalTeacher
    from benchmarks.gpu.shapes import make_work

    written, _ = make_work(options.shape, options.tokens, options.length, options.prompt)
    teacher = LocalTeacher(TeacherConfig(str(model), microbatch_tokens=options.tokens), "teachers.teacher")
    seconds, extra = timed(lambda: teacher.score(written.ids, written), options.repeats)
    import numpy as np

    count = len(written)
    tokens = np.concatenate(
        [written.prompt_tokens.reshape(count, -1), written.response_tokens.reshape(count, -1)], 1
    ).reshape(-1)
    lengths = np.full(count, options.length)
    with torch.inference_mode():
        prefill, _ = timed(lambda: hidden_states(teacher._body, tokens, lengths, teacher._device), options.repeats)
    found = speed(options, seconds, 1, head=True)
    return {**found, "held_gb": held(), "extra_gb": extra / 1e9, "of_prefill_speed": round(prefill / seconds, 3)}


def measure_publish(options: argparse.Namespace, model: Path) -> Result:
    """A version from the learner's weights into another model's, on one machine."""
    import numpy as np
    import torch

    from actors.data.models import load_model
    from actors.weights.buckets import unpack, verify

    learner = learner_of(options, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    other = dict(load_model(str(model), "bfloat16", device, False, "student.model").named_parameters())
    masters = [parameter.detach() for parameter in learner._model.parameters()]
    host = [np.empty(p.numel(), np.uint16) for p in masters]

    @torch.no_grad()
    def version() -> None:
        *buckets, manifest = learner.publish()
        verify(manifest, buckets)
        for name, tensor in unpack(manifest, buckets):
            other[name].copy_(tensor)

    @torch.no_grad()
    def copies() -> None:
        for parameter, space, target in zip(masters, host, other.values(), strict=True):
            there = torch.from_numpy(space).view(torch.bfloat16).view(parameter.shape)
            there.copy_(parameter)
            target.copy_(there)

    (seconds, extra), (bare, _) = timed(version, options.repeats), timed(copies, options.repeats)
    nbytes = sum(x.nbytes for x in host)
    return {"seconds": round(seconds, 4), "gb": nbytes / 1e9, "gb_a_second": nbytes / seconds / 1e9,
            "over_bare_copies": round(seconds / bare, 2), "extra_gb": extra / 1e9}  # fmt: skip


def measure_head(options: argparse.Namespace, model: Path) -> Result:
    """Forward and backward pass of the mean log-prob of given tokens."""
    import torch

    from actors.forward.logprobs import chunked_head, token_logprobs
    from benchmarks.gpu.shapes import SHAPES

    size, device = SHAPES[options.shape], "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shapes = [(options.tokens, size["hidden_size"]), (size["vocab_size"], size["hidden_size"])]
    states, weight = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)
    weight = weight.mul_(size["hidden_size"] ** -0.5).requires_grad_()
    states.requires_grad_()
    tokens = torch.randint(size["vocab_size"], (options.tokens,), device=device)

    def both() -> None:
        states.grad = weight.grad = None
        (chosen,) = chunked_head(
            states, weight, None, lambda lp, rows: (token_logprobs(lp, tokens[rows]),), chunk_tokens=1024
        )
        chosen.mean().backward()

    seconds, extra = timed(both, options.repeats)
    return {
        "seconds": round(seconds, 4),
        "extra_gb": extra / 1e9,
        "gradients_gb": 2 * (states.numel() + weight.numel()) / 1e9,
    }


PARTS: dict[str, Callable[[argparse.Namespace, Path], Result]] = {
    "learner": measure_learner,
    "plain": measure_plain,
    "liger": measure_liger,
    "teacher": measure_teacher,
    "publish": measure_publish,
    "head": measure_head,
}


def main() -> None:
    """Prints one line of JSON for each part; or runs the smoke test."""
    if sys.argv[1:2] == ["smoke"]:
        from benchmarks.gpu.smoke.runner import main as smoke

        sys.exit(smoke(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "smoke", *PARTS])
    parser.add_argument("--shape", default="0.6b")
    for name, default in (("tokens", 16384), ("length", 4096), ("prompt", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--compile", action="store_true", help="learner.compile")
    parser.add_argument("--model", type=Path, help="a model directory of this shape; else one is written")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from benchmarks.gpu.shapes import SHAPES, make_model

    if options.shape not in SHAPES:
        parser.error(f"--shape {options.shape}: one of {', '.join(SHAPES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --device cpu --shape tiny, or a machine with one")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder), options.shape)
        if options.what != "all":
            print(json.dumps({"part": options.what, "shape": options.shape, **PARTS[options.what](options, model)}))
            return
        more = [word for word in sys.argv[1:] if word != "all"]
        for part in options.parts:
            command = [sys.executable, "-m", "benchmarks.gpu", part, *more, "--model", str(model)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
