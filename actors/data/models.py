"""Finds and loads Hugging Face models; every fault in their files becomes a UserError of one line.

A hub name is resolved to a local directory first. torch and transformers, which take seconds to import, are imported
only inside the functions that need them. `key` is always the configuration key that names the model, for example
"student.model". Shapes: V vocabulary size of the model, H hidden size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from actors.data import hub
from actors.data.weight_files import (
    FLOATS,
    Headers,
    blaming_memory,
    opened,
    refuse_misfit,
    refuse_quantised,
    refuse_two_heads,
    stored_tensors,
    weight_file_names,
)
from actors.errors import UserError
from actors.heartbeat import BUILDS, LOADS, beat, does, phase
from actors.quick_imports import quick_imports

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
STUBS = "understudy-headers-"
"""Beginning of the names of folders whose weight files have headers only (`with_headers`)."""
MODEL_DIRECTORY = "a Hugging Face model directory (config.json, safetensors, tokenizer)"


def looks_local(name: str) -> bool:
    """Whether a name is a path and not a hub name: it exists, has more than one slash, or its parent folder exists."""
    path = Path(name).expanduser()
    if path.exists():
        return True
    name, _ = hub.split(name)
    return name.count("/") > 1 or ("/" in name and path.parent.exists())


def find_model(model: str, key: str, *, weights: bool = True, code: bool = False) -> Path:
    """The directory of a model: the path itself, or the hub's snapshot (downloaded unless it is in the cache).

    model: a path, or a hub name, with its revision after an @. weights: download the safetensors, too: those that the
    index names, since many repositories hold the weights several times. code: download Python files, too.
    UserError: no such directory, no config.json, or see `hub_errors`.
    """
    if looks_local(model):
        path = Path(model).expanduser().absolute()
        if not path.is_dir():
            siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
            raise UserError(key, path, "an existing directory: " + MODEL_DIRECTORY, siblings)
    else:
        path = hub.snapshot(model, [*SMALL_FILES, *(["*.py"] if code else [])], key)
        if weights and not _all_there(path):
            path = hub.snapshot(model, weight_file_names(path, key), key)
    if not (path / "config.json").is_file():
        raise UserError(key, f"{path} without config.json", MODEL_DIRECTORY)
    return path


def _all_there(path: Path) -> bool:
    try:
        return all((path / name).is_file() for name in weight_file_names(path, ""))
    except UserError:  # an index that cannot be read is told where it is read
        return False


@contextmanager
def with_headers(model: str, key: str, *, code: bool = False) -> Iterator[Path]:
    """Within the block: a directory that holds all that `stored_tensors` and `check_fit` read of the model.

    That is the model's own directory, or the hub's snapshot if it holds the weights. Of other hub names it is a folder
    with the small files, and safetensors files that have their headers and lengths, and holes for the tensors: a few
    megabytes are downloaded, whatever the model's size. UserError: see `find_model` and `hub.headers`.
    """
    path = find_model(model, key, weights=False, code=code)
    if looks_local(model) or _all_there(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=STUBS) as parent:
        folder = Path(parent, model.replace("/", "--"))
        folder.mkdir()
        for file in path.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        there, names = hub.file_names(model, key), weight_file_names(path, key)
        known = [name for name in names if name in there]
        for name, (header, size) in zip(known, hub.headers(model, known, key), strict=True):
            with (folder / name).open("wb") as stub:
                stub.write(header)
                stub.truncate(size)
        # What a directory of files would be refused for, too: several sets of weights, or none but pickled ones.
        for name in there:
            if "/" not in name and name.endswith((".safetensors", ".bin")) and not (folder / name).exists():
                (folder / name).touch()
        yield folder


def load_config(model: str, trust_remote_code: bool, key: str) -> PreTrainedConfig:
    """The model's configuration. UserError: see `find_model`; or config.json is unreadable or of an unknown type."""
    with quick_imports():
        from transformers import AutoConfig

    path = find_model(model, key, weights=False, code=trust_remote_code)
    file = path / "config.json"
    own_code = ", or trust_remote_code: true to run the code it names" if b"auto_map" in file.read_bytes() else ""
    with as_user_error(key, file, f"a configuration that transformers can read{own_code}"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def vocabulary_rows(model: str, trust_remote_code: bool, key: str) -> int:
    """Rows of the model's output layer. There may be more of them than tokens. UserError: see `load_config`."""
    return load_config(model, trust_remote_code, key).get_text_config().vocab_size


def tensor_parallel_plan(model: str, trust_remote_code: bool, key: str) -> dict[str, str]:
    """The model's tensor-parallel plan in transformers: layer name pattern -> style. UserError: it has none."""
    text = load_config(model, trust_remote_code, key).get_text_config()
    plan = dict(getattr(text, "base_model_tp_plan", None) or {})
    if not plan:
        expected = "a model that transformers has a tensor-parallel plan for, or backend: vllm"
        raise UserError(key, f"a {text.model_type} model, with tensor_parallel_size above 1", expected)
    return plan


def load_model(
    model: str, dtype: str | None, device: str, trust_remote_code: bool, key: str, *, ranks: int = 1
) -> PreTrainedModel:
    """Loads the causal language model in evaluation mode, with sdpa attention, on `device` ("cpu", "cuda:0").

    dtype: "float32", "bfloat16" or "float16". None: a float32 model whose weights are still bfloat16 where the files hold
    nothing else, for the caller to cast; on the CPU they stay in the mapped files until then. ranks: number of processes that share the model's layers by its
    tensor-parallel plan; this process is one of them (torch.distributed). Every weight comes from the files: a missing
    tensor is an error, never a random initialisation. UserError: see `find_model` and `check_weights`; or the weights
    do not match config.json, or are not finite.
    """
    import torch

    path = find_model(model, key, code=trust_remote_code)
    config = load_config(str(path), trust_remote_code, key)
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None:  # transformers leaves the cap out without a word
        raise UserError(key, f"{path} with attn_logit_softcapping={cap}", "null: sdpa attention has no soft cap")
    split: dict[str, Any] = {}
    if ranks > 1:
        from transformers.distributed import DistributedConfig

        split = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=ranks)}
    phase(LOADS)
    does(f"loads {model}")
    network: Any = _load(path, config, dtype, trust_remote_code, key, **split)
    beat()
    if dtype is None and network.dtype != torch.float32:
        _set_float32_buffers(network, config, trust_remote_code)
    network = network.to(device).eval()
    beat()
    refuse_not_finite(network, key)
    does("")
    phase(BUILDS)
    return network


def _set_float32_buffers(network: PreTrainedModel, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Gives a model of 16 bits the constants of a float32 model, unrounded: a scale of the embeddings, for example."""
    import torch
    from transformers import AutoModelForCausalLM

    stored = network.state_dict().keys()
    rounded = [name for name, buffer in network.named_buffers() if buffer.dtype == network.dtype and name not in stored]
    if not rounded:
        return
    register = torch.nn.Module.register_parameter

    def without_memory(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, parameter if parameter is None else torch.nn.Parameter(parameter.to("meta")))

    with mock.patch.object(torch.nn.Module, "register_parameter", without_memory):
        exact = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    for name in rounded:
        module, _, own = name.rpartition(".")
        setattr(network.get_submodule(module), own, exact.get_buffer(name))


def refuse_not_finite(network: PreTrainedModel, key: str) -> None:
    """UserError: a weight is NaN or infinite. Otherwise an engine, a self-test or a loss would be blamed for it."""
    import torch

    for name, parameter in network.named_parameters():
        values: Any = parameter.detach()
        values = values.to_local() if hasattr(values, "to_local") else values  # a rank's part of it
        # Quantised weights are other types, which have no NaN or no test for it.
        if values.dtype in (torch.float32, torch.bfloat16, torch.float16) and not values.isfinite().all():
            kind = "NaN" if values.isnan().any() else "an infinite number"
            raise UserError(key, f"{kind} in {name}", "weights that are finite numbers")


def _load(
    path: Path, config: PreTrainedConfig, dtype: str | None, trust_remote_code: bool, key: str, **how: Any
) -> PreTrainedModel:
    """Loads a model, and refuses files that do not hold what config.json describes. how: more for `from_pretrained`."""
    with quick_imports():
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

    stored = stored_tensors(path, key)
    refuse_quantised(path, stored, config, key)
    if dtype is None:
        dtype = "bfloat16" if {tensor.dtype for tensor in stored.values()} == {"BF16"} else "float32"
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    try:
        # transformers would print a table of the faults that are reported below in one line.
        logging.set_verbosity_error()
        with as_user_error(key, path, "a causal language model with sdpa attention"), blaming_memory(key, path):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # shapes that differ are then in the report, and refused below
                output_loading_info=True,
                generation_config=GenerationConfig(),  # nothing here generates with it, and transformers refuses some
                **how,
            )
    finally:
        logging.set_verbosity(verbosity)
    network, report = loaded
    refuse_misfit(path, report, network, key)
    if not path.parent.name.startswith(STUBS):  # holes would be equal; the actors compare the tensors when they load
        refuse_two_heads(path, stored, network, key)
    return network


def load_head(
    model: str, dtype: str, device: str, trust_remote_code: bool, key: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [V, H], bias [V] or None) of the model's output layer, without loading the other layers.

    The learner needs it where a teacher sends hidden states. UserError: see `find_model` and `check_weights`; or the
    files do not hold the tensor.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = find_model(model, key, code=trust_remote_code)
    config = load_config(str(path), trust_remote_code, key)
    stored = stored_tensors(path, key)
    # On the device "meta" a model has names and shapes, and no memory.
    with torch.device("meta"), as_user_error(key, path, "a causal language model"):
        network: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        network.tie_weights()
    head = network.get_output_embeddings()
    # With duplicates: the files hold a tied weight under only one of its names.
    named = list(network.named_parameters(remove_duplicate=False))

    def read(wanted: torch.Tensor) -> torch.Tensor:
        names = [name for name, parameter in named if parameter is wanted]
        prefix = f"{network.base_model_prefix}."
        for name in (*names, *(name.removeprefix(prefix) for name in names)):  # files may lack the prefix
            if name in stored and stored[name].dtype in FLOATS:
                with blaming_memory(key, stored[name].file), opened(stored[name].file, "pt") as tensors:
                    return tensors.get_tensor(name).to(device, getattr(torch, dtype))
        raise UserError(
            key, f"{path} without {' or '.join(names)} in floating point", "the weights of the output layer"
        )

    return read(head.weight), None if head.bias is None else read(head.bias)


def check_weights(model_dir: Path | str, key: str) -> None:
    """Reads the header of every safetensors file. UserError: see `stored_tensors`."""
    stored_tensors(model_dir, key)


def check_fit(
    model: str,
    trust_remote_code: bool,
    key: str,
    *,
    quantised: Literal["refused", "transformers", "elsewhere"] = "transformers",
) -> None:
    """Checks that the files hold the weights that config.json describes. Reads headers, and needs no memory.

    quantised: what reads weights that config.json calls quantised. `elsewhere`: an engine, which checks them itself.
    UserError: see `load_model`.
    """
    with with_headers(model, key, code=trust_remote_code) as path:
        config = load_config(str(path), trust_remote_code, key)
        if quantised == "transformers" or getattr(config, "quantization_config", None) is None:
            # transformers maps the files, and a machine that only checks them may have no room for that.
            with mock.patch("transformers.modeling_utils.safe_open", Headers):
                _load(path, config, "float32", trust_remote_code, key, device_map="meta")
        elif quantised == "elsewhere":
            stored_tensors(path, key)
        else:
            found = f"{path} with quantised weights (quantization_config)"
            raise UserError(key, found, f"weights of {', '.join(FLOATS)}")


def response_head(model: PreTrainedModel, key: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor | None]:
    """(body, weight [V, H], bias [V] or None) with logits = body(input_ids).last_hidden_state @ weight.T + bias.

    `chunked_head` computes the logits from these three, so the architecture must not change them in another way. To
    verify this, the model runs once on four tokens while a hook replaces the head's output by known numbers. The head's
    input must equal the body's output, and the model's logits must equal the known numbers, exactly: a scale or a soft
    cap changes them. UserError: the architecture does more, or the weights are not finite.
    """
    import torch

    body, head = model.base_model, model.get_output_embeddings()
    seen: dict[str, Any] = {}

    def keep_body(_module: Any, _arguments: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state

    def replace_logits(_module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        seen["input"] = arguments[0]
        # Not the real output: logits of an untrained model are so close to 0 that a soft cap would round to nothing.
        seen["output"] = (
            torch.linspace(-200, 200, output.numel(), device=output.device).to(output.dtype).view_as(output)
        )
        return seen["output"]

    plain = isinstance(head, torch.nn.Linear) and body is not model
    if plain:
        hooks = [body.register_forward_hook(keep_body), head.register_forward_hook(replace_logits)]
        try:
            with torch.no_grad():
                logits = model(torch.arange(4, device=head.weight.device)[None], use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if "hidden" in seen and not seen["hidden"].isfinite().all():
            raise UserError(key, "a model whose hidden states are not finite", "weights that are finite numbers")
        plain = {"hidden", "output"} <= seen.keys() and all(
            torch.equal(a, b.to(a.dtype)) for a, b in ((seen["input"], seen["hidden"]), (logits, seen["output"]))
        )
    if not plain:
        raise UserError(
            key,
            f"the architecture {type(model).__name__}, which does more than its output layer on the way to the logits",
            "logits = weight @ hidden state + bias (no soft cap, no scaling)",
        )
    return body, head.weight, head.bias


@contextmanager
def as_user_error(key: str, what: object, expected: str) -> Iterator[None]:
    """Turns any exception that a library raises in this context into a UserError: `key`: found `what`, expected ..."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # code of the user's own may also end the process
        # Two lines: libraries put the cause first, and then pages of advice.
        reason = " ".join(str(error).strip().splitlines()[:2])[:200]
        raise UserError(key, f"{what} ({type(error).__name__}: {reason})", expected) from error


def expected_tensors(model: str, trust_remote_code: bool, key: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters that config.json describes; tied parameters once. Reads no weights."""
    with quick_imports():  # the model's code is imported in `from_config`
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(
                load_config(model, trust_remote_code, key), trust_remote_code=trust_remote_code
            )
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
