"""Checks options of vLLM's engine by its source: without importing vLLM, which takes ten seconds. Standard library only."""

import ast
import difflib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from actors.errors import UserError
from actors.gpu_share import LARGEST_CARD_BYTES, engine_fraction, is_share

PLAIN: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}
"""Types of options that are checked here. vLLM checks the others when the engine is built."""


SAMPLING_KEYS = ("temperature", "top_p", "top_k")
"""Settings of a request that have a key of their own, in the section `sampling`."""
SAMPLERS = (
    *("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words"),
    *("allowed_token_ids", "min_tokens", "logits_processors", "override_generation_config", "speculative_config"),
    *("spec_method", "spec_model", "spec_tokens", "watermark_config", "enable_trace_replay", "reasoning_config"),
)
"""Options that change what a token is drawn from, or forced to be, in a way that the recorded log-probs do not tell."""
OWNED = (
    *("logprobs_mode", "max_logprobs", "worker_extension_cls", "worker_cls", "scheduler_cls", "return_sampling_mask"),
    *("weight_transfer_config", "skip_tokenizer_init", "runner", "convert"),
)
"""Options that this package sets, and relies on."""
ALIKE = ("hf_overrides", "hf_config_path", "tokenizer", "revision", "code_revision", "tokenizer_revision")
"""Options that make the student's model or tokenizer another one than the learner's."""
RANGES: dict[str, tuple[float, float]] = {
    "max_num_seqs": (1, float("inf")),
    "max_num_batched_tokens": (1, float("inf")),
    "gpu_memory_utilization": (0.01, 1.0),
}
"""Option -> the least and the greatest value."""
KEYS = ("model", "dtype", "tensor_parallel_size", "trust_remote_code")
"""Options that have a key of their own in the sections of the configuration."""


def refuse_samplers(options: Mapping[str, Any], key: str) -> None:
    """UserError, on `key` and the option, for one that would make samples or log-probs others than the objective takes
    them for. vLLM's values for a request from the model's generation_config.json are never used."""
    for name, value in options.items():
        if name in SAMPLING_KEYS:
            raise UserError(f"{key}.{name}", value, f"sampling.{name}, which the objective knows of")
        if name == "generation_config" and value not in ("auto", "vllm"):
            raise UserError(f"{key}.{name}", value, "auto or vllm: its sampler settings would not be used")
        if name in SAMPLERS and value not in (None, {}, []):
            expected = "no such option: the learner would take its effect on the samples for training"
            raise UserError(f"{key}.{name}", value, expected)
        if name in OWNED:
            raise UserError(
                f"{key}.{name}", value, "no such option: it is set here, and the recorded log-probs depend on it"
            )
        if name in ALIKE and key.startswith("rollout") and value not in (None, {}, ""):
            raise UserError(
                f"{key}.{name}",
                value,
                "no such option: the learner trains the model and reads the tokenizer without it",
            )
        if name in KEYS:
            raise UserError(f"{key}.{name}", value, "the key of this name in the configuration, which everything reads")


def check_options(options: Mapping[str, Any], key: str) -> None:
    """UserError for the first option that vLLM does not have, or whose value has another type than vLLM says; or see
    `refuse_samplers`.

    key: of the options, for example "rollout.engine". Types are not compared where vLLM is not installed.
    """
    refuse_samplers(options, key)
    for name, (least, greatest) in RANGES.items():
        value = options.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value <= greatest:
            expected = f"at least {least:g}" + (f" and at most {greatest:g}" if greatest < float("inf") else "")
            raise UserError(f"{key}.{name}", value, expected)
    known = _known_options() if options else {}
    for name, value in options.items() if known else ():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            expected = f"an option of vLLM's engine{f', {near[0]!r} perhaps' if near else ''}"
            raise UserError(f"{key}.{name}", "an option that does not exist", expected)
        kinds = known[name].split(" | ")
        # True is an int for Python, and no number of anything.
        fits = any(
            isinstance(value, PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool))
            for kind in kinds
            if kind in PLAIN
        )
        if set(kinds) <= PLAIN.keys() and not fits:
            raise UserError(f"{key}.{name}", repr(value), f"a value of the type {known[name]}")


def share_options(options: Mapping[str, Any], gpus: float | None, card_bytes: int, key: str) -> dict[str, Any]:
    """Options that keep an engine to its share of a GPU; none for whole GPUs.

    options: the user's own. gpus: `gpus_per_replica`. card_bytes: of the GPU; 0: not known here, so that the reserve for
    the process is left out. UserError, on `key` and the option: it asks for more than the share.
    """
    if gpus is None or not is_share(gpus):
        return {}
    most = engine_fraction(gpus, card_bytes) if card_bytes else gpus
    share = f"the share of {gpus:g} GPUs" + (f" of {card_bytes / 1e9:.1f} GB" if card_bytes else "")
    if most <= 0:
        section = key.rpartition(".")[0]
        raise UserError(f"{section}.gpus_per_replica", f"{gpus:g}", f"more: nothing is left for an engine in {share}")
    expected = f"at most {most:g} in {share} (gpus_per_replica), or nothing: it is set from the share"
    if isinstance(asked := options.get("gpu_memory_utilization"), int | float) and asked > most:
        raise UserError(f"{key}.gpu_memory_utilization", asked, expected)
    cache = options.get("kv_cache_memory_bytes")
    room = most * (card_bytes or LARGEST_CARD_BYTES)
    if isinstance(cache, int) and cache > room:
        of = "" if card_bytes else " of the largest GPU there is"
        fits = f"less than the {room / 1e9:.1f} GB in {share}{of}, or nothing: it is set from the share"
        raise UserError(f"{key}.kv_cache_memory_bytes", f"{cache} ({cache / 1e9:.1f} GB)", fits)
    return {"gpu_memory_utilization": most}


@cache
def _known_options() -> dict[str, str]:
    """Name -> type, as text, of the fields of EngineArgs and the arguments of LLM; {} where they cannot be read."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return {}
    root = Path(next(iter(found.submodule_search_locations)))
    try:
        engine = _class(root / "engine" / "arg_utils.py", "EngineArgs")
        llm = _class(root / "entrypoints" / "llm.py", "LLM")
    except (OSError, SyntaxError, StopIteration):  # another release has them elsewhere
        return {}
    known: dict[str, str] = {}
    for node in llm.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.args[1:], *node.args.kwonlyargs]
            known |= {one.arg: ast.unparse(one.annotation) if one.annotation else "Any" for one in arguments}
    return known | {
        node.target.id: ast.unparse(node.annotation)
        for node in engine.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _class(path: Path, name: str) -> ast.ClassDef:
    body = ast.parse(path.read_text("utf-8")).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
