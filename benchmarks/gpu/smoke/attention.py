"""(a) Packed attention against each sequence alone in float32: outputs, gradients, grouped heads, a sliding window.

The reference is written out here, with a matrix of scores for each sequence, and shares no code with the packed path. Errors
are root mean squares of a sequence's difference, over that of the whole row: one wrong sequence is not averaged away.
Shapes: T tokens of a row, h query heads and g heads of keys of size d, L tokens of a sequence.
"""

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from actors.forward import packing
from actors.forward.packing import Packing, hidden_states, use_packed_attention
from benchmarks.gpu.smoke.report import Report
from benchmarks.gpu.smoke.timing import peak_flops, seconds_of

LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.01, 0.02)}
"""Of outputs and of gradients. In bfloat16 the kernel rounds the probabilities to 2^-9 and its outputs once more."""


class Case(NamedTuple):
    """Heads h and g, their size d, a window, and the lengths of the row's sequences."""

    heads: int
    keys: int
    size: int
    window: int | None
    lengths: list[int]


RAGGED = [1, 2, 7, 64, 64, 129, 500, 1000, 1]
CASES = {
    "equal heads": Case(8, 8, 128, None, RAGGED),
    "grouped heads, as Qwen3-4B": Case(32, 8, 128, None, RAGGED),
    "one head of keys": Case(8, 1, 64, None, RAGGED),
    "a window of 128": Case(16, 8, 128, 128, RAGGED),
    "a window of 2": Case(4, 2, 64, 2, RAGGED[:6]),
    "heads of 256": Case(8, 4, 256, None, RAGGED),
    "one long sequence among short ones": Case(4, 2, 128, None, [3, 4096, 3]),
    "a long sequence with a window": Case(4, 2, 128, 512, [3, 4096, 3]),
}


def attention(report: Report, options: argparse.Namespace) -> None:
    """All cases, then two whole models, then the kernel's speed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    on_gpu = options.device == "cuda"
    cases = CASES if on_gpu else {name: small(case) for name, case in CASES.items()}
    for dtype in (torch.bfloat16, torch.float32):
        for name, case in cases.items():
            errors = compare(case, dtype, options.device)
            for what, error in errors.items():
                limit = LIMITS[dtype][what != "output"]
                report.check(f"{name}, {str(dtype).removeprefix('torch.')}: {what}", error, limit)
    if on_gpu:
        report.holds("16-bit rows take the kernel", kernel_calls(cases["equal heads"]) == 1, "another path was taken")
    for name, config in models(on_gpu).items():
        states, gradients = compare_model(config, options.device)
        report.check(f"{name}, packed under autocast against float32 alone: states", states, 0.03)
        report.check(f"{name}: gradients of the weights", gradients, 0.06)
    if on_gpu:
        speed(report, options.device)


def small(case: Case) -> Case:
    """The same for a CPU, in milliseconds."""
    window = case.window and max(2, case.window // 16)
    return case._replace(size=16, heads=case.heads // 4 * 4 and 4, keys=min(case.keys, 2), window=window,
                         lengths=[max(1, length // 16) for length in case.lengths])  # fmt: skip


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random query [1, h, T, d], key and value [1, g, T, d], and the gradient [1, T, h, d] at the output."""
    generator = torch.Generator(device).manual_seed(0)
    total = sum(case.lengths)

    def random(*shape: int) -> torch.Tensor:  # representable in 16 bits, so that both sides get the same numbers
        return torch.randn(*shape, generator=generator, device=device).bfloat16().to(dtype)

    inputs = [random(1, heads, total, case.size).requires_grad_() for heads in (case.heads, case.keys, case.keys)]
    return inputs, random(1, total, case.heads, case.size)


def packed(case: Case, inputs: list[torch.Tensor], device: str) -> torch.Tensor:
    """The packed path's output: [1, T, h, d]."""
    module: Any = torch.nn.Module()
    module.num_key_value_groups = case.heads // case.keys
    row = Packing.of(np.array(case.lengths), device)
    how = {"scaling": case.size**-0.5, "sliding_window": case.window}
    return packing._attend(module, *inputs, None, row, **how)[0]


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention of one sequence by its definition: q [h, L, d], k and v [g, L, d] -> [L, h, d]."""
    groups = len(q) // len(k)
    scores = q @ k.repeat_interleave(groups, 0).mT * q.shape[-1] ** -0.5
    at = torch.arange(q.shape[1], device=q.device)
    back = at[:, None] - at
    hidden = (back < 0) | (back >= (window or len(at)))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 0)).transpose(0, 1)


def compare(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Name -> largest error of a sequence, of the output and of the three gradients."""
    inputs, weights = draw(case, dtype, device)
    output = packed(case, inputs, device)
    gradients = torch.autograd.grad(output, inputs, weights)
    exact = [x.detach().float()[0].requires_grad_() for x in inputs]
    places = np.split(np.arange(sum(case.lengths)), np.cumsum(case.lengths)[:-1])
    expected = torch.cat([alone(*(x[:, p[0] : p[-1] + 1] for x in exact), case.window) for p in places])
    expected_gradients = torch.autograd.grad(expected, exact, weights[0].float())
    found = {"output": worst(output[0], expected, case.lengths)}
    for name, ours, theirs in zip(("query", "key", "value"), gradients, expected_gradients, strict=True):
        found[f"gradient of the {name}"] = worst(ours[0].transpose(0, 1), theirs.transpose(0, 1), case.lengths)
    return found


def worst(ours: torch.Tensor, theirs: torch.Tensor, lengths: list[int]) -> float:
    """The largest root mean square of a sequence's difference [L, …], over that of all of `theirs` [T, …]."""
    scale = theirs.detach().float().pow(2).mean().sqrt()
    difference = (ours.detach().float() - theirs.detach().float()).split(lengths)
    found = torch.stack([part.pow(2).mean().sqrt() for part in difference]).max() / scale
    return found.item()


def kernel_calls(case: Case) -> int:
    """How often a row in bfloat16 goes through the kernel."""
    calls, kernel = [], packing._attend_flash

    def counted(*arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(1)
        return kernel(*arguments, **keywords)

    packing._attend_flash = counted
    try:
        packed(case, draw(case, torch.bfloat16, "cuda")[0], "cuda")
    finally:
        packing._attend_flash = kernel
    return len(calls)


def models(on_gpu: bool) -> dict[str, Any]:
    """Two small architectures: grouped heads, and a sliding window."""
    size = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128 if on_gpu else 16, "pad_token_id": 0}
    if not on_gpu:
        size |= {"hidden_size": 64, "intermediate_size": 64}
    return {"Qwen3": Qwen3Config(**size), "Mistral with a window": MistralConfig(**size, sliding_window=16)}


def compare_model(config: Any, device: str) -> tuple[float, float]:
    """Errors of (states, gradients of all weights) of a packed row under autocast, against its sequences one by one."""
    torch.manual_seed(0)
    with torch.device(device):
        kind = Qwen3ForCausalLM if isinstance(config, Qwen3Config) else MistralForCausalLM
        model: Any = kind._from_config(config, attn_implementation="sdpa").eval()
    lengths = [5, 40, 17, 1, 100, 100]
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, sum(lengths))
    weights = torch.randn(len(tokens), config.hidden_size, device=device)
    weights[:, 0] += 1
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    expected = torch.cat([hidden_states(model.base_model, part, np.array([len(part)]), device) for part in parts])
    theirs = gradient(model, expected, weights)
    if not use_packed_attention(model):
        return float("nan"), float("nan")
    with torch.autocast(device, torch.bfloat16):
        found = hidden_states(model.base_model, tokens, np.array(lengths), device)
    ours = gradient(model, found.float(), weights)
    return worst(found, expected, lengths), ((ours - theirs).norm() / theirs.norm()).item()


def gradient(model: Any, states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The gradient of sum(states * weights) at all weights of the body, as one vector."""
    model.zero_grad()
    (states * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.base_model.parameters() if p.grad is not None])


def speed(report: Report, device: str) -> None:
    """Four sequences of 4,096 tokens, 32 heads over 8 of keys."""
    case = Case(32, 8, 128, None, [4096] * 4)
    inputs, weights = draw(case, torch.bfloat16, device)
    flops = 2.0 * case.heads * case.size * sum(length**2 for length in case.lengths)  # the causal half of 4 h d L^2
    with torch.no_grad():
        forward = seconds_of(lambda: packed(case, inputs, device))
    both = seconds_of(lambda: torch.autograd.grad(packed(case, inputs, device), inputs, weights))
    peak = peak_flops()
    for name, seconds, times in (("forward", forward, 1.0), ("forward and backward", both, 3.5)):
        report.figure(f"attention kernel, 16,384 tokens, {name}", seconds * 1e3, "ms")
        report.figure(f"attention kernel, {name}, share of the peak", peak and times * flops / seconds / peak)
    first, second = (torch.autograd.grad(packed(case, inputs, device), inputs, weights) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    report.figure("gradients of the kernel repeat bit for bit", "yes" if same else "no")
