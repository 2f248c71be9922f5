"""`understudy export`: one checkpoint as a directory that transformers and vLLM load, with a model card.

The directory gets its name when it is complete and its weights fit its config.json. The run directory is only read, but for a
line in exports.jsonl, so a campaign may go on meanwhile.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from actors.data.models import check_fit
from actors.data.weight_files import opened
from actors.errors import UserError
from cluster.commands.model_card import model_card
from cluster.commands.older_transformers import readable_by_both
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.records.metric_table import is_evaluation
from cluster.records.writer import CONFIG_FILE, LEDGER_FILE, METRICS_FILE, read_jsonl, record_export
from cluster.state.campaign_state import CampaignState
from cluster.state.checkpoints import best_first
from cluster.state.soundness import examined, step_of
from learner.student.checkpoint import checkpoint_steps, commit, discard, new_directory, step_directory, write_json
from learner.student.lora import ADAPTER_FILE
from learner.student.model_files import read_model_files, write_model_files
from learner.student.tensor_files import DTYPES

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"


def export(
    run_dir: Path,
    out: Path,
    *,
    step: str | None = None,
    best: bool = False,
    dtype: str | None = None,
    adapter_only: bool = False,
) -> tuple[int, str]:
    """Writes the directory `out`; returns the checkpoint's step and the dtype.

    step: a checkpoint's step. best: the evaluated checkpoint with the highest held-out accuracy, or the lowest reverse KL.
    Neither: the newest that is sound. dtype: of the weights; None: that of the engines, `rollout.dtype`. adapter_only: the
    adapter alone, in peft's format. UserError: no such checkpoint, one that is damaged, or a directory that is not empty.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError("RUN", run_dir, f"a run directory: one with {CONFIG_FILE}")
    _demand_room(run_dir, out)
    config = load_config(run_dir / CONFIG_FILE, environment=False)
    config.output_dir, config.name = str(run_dir.resolve().parent), run_dir.resolve().name
    if adapter_only and config.student.lora is None:
        raise UserError("--adapter-only", "a campaign that trained all weights", "one with student.lora")
    checkpoint, state = chosen_checkpoint(run_dir, step, config.best_by if best else None)
    dtype = dtype or config.rollout.dtype
    try:
        partial = new_directory(out)
    except OSError as error:
        raise UserError("OUT", f"{out} ({error.strerror})", "a directory that can be made") from error
    try:
        write = _write_adapter if adapter_only else _write_model
        write(config, checkpoint, partial, dtype)
        card = model_card(config, state, _evaluations(run_dir), dtype, adapter_only=adapter_only)
        (partial / CARD).write_text(card, "utf-8")
        commit(partial, out)
    except BaseException as error:  # also Ctrl-C: nothing half is left
        discard(partial)
        if isinstance(error, OSError):
            found = f"{error.strerror or error} ({error.filename or checkpoint})"
            raise UserError(str(out), found, "room to write to, and a checkpoint that stays meanwhile") from error
        raise
    record_export(run_dir, state.step, out, dtype)
    return state.step, dtype


def _demand_room(run_dir: Path, out: Path) -> None:
    """UserError: `out` is not empty, or inside the run directory, whose files are the campaign's."""
    try:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        inside = out.resolve().is_relative_to(run_dir.resolve())
    except OSError as error:  # no name that a file can have, or a directory that is not ours
        raise UserError("OUT", f"{out} ({error.strerror})", "a directory that can be made") from error
    if not free:
        raise UserError("OUT", out, "a directory that is empty or does not exist")
    if inside:
        raise UserError("OUT", f"{out}, which is inside the run {run_dir}", "a directory outside it")


def chosen_checkpoint(run_dir: Path, wanted: str | None, best_by: str | None) -> tuple[Path, CampaignState]:
    """The checkpoint that was asked for, and its state; nothing is renamed or removed.

    wanted: its step. best_by: the best one by this evaluation set (`CampaignConfig.best_by`). Both None: the newest that is
    sound. UserError: there is none, or it is damaged.
    """
    checkpoints = run_dir / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    if not steps:
        raise UserError(str(checkpoints), "no checkpoint", "a campaign that has written one (checkpoint.every_updates)")
    order = steps[::-1]
    if wanted is not None:
        order = [step_of(wanted, checkpoints, steps, "--step")]
    elif best_by is not None and not (order := best_first(steps, _evaluations(run_dir), best_by)):
        raise UserError("--best", "no checkpoint of an update that was evaluated", "--step, or none for the newest")
    rows = read_jsonl(run_dir / LEDGER_FILE)
    faults = []
    for step in order:
        found = examined(step_directory(checkpoints, step), rows)
        if not isinstance(found, str):
            return step_directory(checkpoints, step), found
        faults.append(f"{step_directory(checkpoints, step)}: {found}")
        if best_by is not None:
            break  # another than the best was not asked for
    raise UserError("RUN", faults[0], "a whole checkpoint; name another with --step")


def _evaluations(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> metrics of that evaluation, the untrained student's included."""
    return {row["step"]: row for row in read_jsonl(run_dir / METRICS_FILE, checked=True) if is_evaluation(row)}


def _write_model(config: CampaignConfig, checkpoint: Path, out: Path, dtype: str) -> None:
    write_model_files(readable_by_both(read_model_files(checkpoint, "RUN")), out, dtype)
    for file in sorted(checkpoint.glob("*.safetensors")):
        cast_file(file, out / file.name, getattr(torch, dtype))
    for index in checkpoint.glob("*.safetensors.index.json"):
        (out / index.name).write_bytes(index.read_bytes())
    # Before it gets its name: whether all that config.json describes is there.
    check_fit(str(out), config.student.trust_remote_code, "OUT", quantised="refused")


def _write_adapter(config: CampaignConfig, checkpoint: Path, out: Path, dtype: str) -> None:
    """The adapter, and the tokenizer's files, which vLLM looks for beside it."""
    for name, content in readable_by_both(read_model_files(checkpoint, "RUN")).items():
        if re.match(r"(tokenizer|chat_template|special_tokens|vocab|merges|added_tokens)", Path(name).name):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
    peft = json.loads((checkpoint / "adapter" / ADAPTER_CONFIG).read_text("utf-8"))
    write_json(out / ADAPTER_CONFIG, {**peft, "base_model_name_or_path": config.student.model})
    cast_file(checkpoint / "adapter" / ADAPTER_FILE, out / ADAPTER_FILE, getattr(torch, dtype))


def cast_file(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copies a safetensors file with its floating-point tensors in another dtype, one tensor in memory at a time."""
    with opened(source, "pt") as stored:
        header: dict[str, Any] = {"__metadata__": stored.metadata() or {"format": "pt"}}
        kinds = {name: _dtype(stored.get_slice(name).get_dtype(), dtype) for name in stored.keys()}  # noqa: SIM118
        # Largest elements first, so that every tensor is aligned to its element size.
        names = sorted(kinds, key=lambda name: (-kinds[name].itemsize, name))
        offset = 0
        for name in names:
            shape = list(stored.get_slice(name).get_shape())
            end = offset + kinds[name].itemsize * math.prod(shape)
            header[name] = {"dtype": DTYPES[kinds[name]], "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for data in _bytes(stored, names, kinds):
                file.write(data)


def _dtype(stored: str, wanted: torch.dtype) -> torch.dtype:
    """The dtype that a stored tensor gets; whole numbers keep theirs."""
    own = next(dtype for dtype, name in DTYPES.items() if name == stored)
    return wanted if own.is_floating_point else own


def _bytes(stored: Any, names: list[str], kinds: Mapping[str, torch.dtype]) -> Iterator[memoryview]:
    for name in names:
        tensor = stored.get_tensor(name).to(kinds[name]).contiguous()
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
