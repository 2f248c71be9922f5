"""Which checkpoint a campaign goes on from: the newest that is sound, or the one that the user names.

A checkpoint is sound if every file has its checksum (learner/student/checksums.py), the campaign's state can be read, is of
the step in the directory's name, and fits ledger.jsonl. One that is not is set aside under another name, and said.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from actors.data.weight_files import blaming_memory, opened
from actors.errors import UserError
from actors.json_files import bytes_of, parsed, read_json
from cluster.config import CampaignConfig
from cluster.records.writer import LEDGER_FILE, read_jsonl
from cluster.state.campaign_state import STATE_FILE, CampaignState
from learner.student.checkpoint import STEP_NAME, checkpoint_steps, restore_replaced, set_aside, step_directory
from learner.student.checksums import damage, has_checksum, is_sealed

OnEvent = Callable[..., None]
"""Called with the kind of an event and its fields."""
REQUIRED = ("config.json", "model.safetensors", "training/learner.json", "training/optimizer.safetensors")
"""Files of every checkpoint, also of releases without checksums."""


class Found(NamedTuple):
    """Where a campaign goes on."""

    state: CampaignState
    checkpoint: Path | None
    """None: there is none, and the campaign begins with the untrained student."""
    damaged: Sequence[tuple[Path, str]] = ()
    """Newer checkpoints that are damaged, and how."""
    newer: Sequence[Path] = ()
    """Newer checkpoints that the user does not want."""


def newest_sound(config: CampaignConfig, on_event: OnEvent, resume_from: str | None = None) -> Found:
    """The newest sound checkpoint of the run directory. Changes nothing; `clear_the_way` sets newer ones aside.

    resume_from: the step, or the directory, of the checkpoint to take.
    UserError: there are checkpoints, and none is sound; or the one that was asked for is not there, or not sound.
    """
    checkpoints = config.run_dir / "checkpoints"
    try:
        restore_replaced(checkpoints)
        steps = checkpoint_steps(checkpoints)
    except OSError as error:
        raise UserError(str(checkpoints), error.strerror or error, "a directory to read and to write") from error
    wanted = steps if resume_from is None else [step_of(resume_from, checkpoints, steps)]
    rows = read_jsonl(config.run_dir / LEDGER_FILE, checked=True)
    damaged: list[tuple[Path, str]] = []
    for step in reversed(wanted):
        checkpoint = step_directory(checkpoints, step)
        found = examined(checkpoint, rows)
        if isinstance(found, str):
            if found.startswith(LEDGER_FILE) and resume_from is None:
                _demand_whole_ledger(config.run_dir / LEDGER_FILE, rows, step, found)
            damaged.append((checkpoint, found))
            continue
        if not is_sealed(checkpoint):
            on_event("unchecked_checkpoint", step=step, path=str(checkpoint))
        newer = [step_directory(checkpoints, later) for later in steps if resume_from is not None and later > step]
        return Found(found, checkpoint, damaged, newer)
    if damaged:
        raise _nothing_sound(config, damaged, resume_from)
    return Found(CampaignState(), None)


def clear_the_way(found: Found, on_event: OnEvent) -> None:
    """Renames the newer checkpoints, whose steps the campaign will write again, and tells it. UserError: it cannot."""
    for path, cause in found.damaged:
        on_event("damaged_checkpoint", cause=cause, path=str(_aside(path, "damaged")), to_step=found.state.step)
    for path in found.newer:
        on_event("checkpoint_set_aside", path=str(_aside(path, "set_aside")), to_step=found.state.step)


def _demand_whole_ledger(path: Path, rows: Sequence[Mapping[str, Any]], step: int, why: str) -> None:
    """UserError: the ledger lacks updates up to `step`, or has one twice, so it is at fault and not the checkpoint.

    Every update has one row, which is on disk before the update's checkpoint.
    """
    trained = sorted(row["step"] for row in rows if "trained" in row and row.get("step", step + 1) <= step)
    if trained != list(range(1, step + 1)):
        expected = "the file as the campaign left it, together with its checkpoints: put back a copy of it, or name a"
        raise UserError(str(path), why, f"{expected} checkpoint that it fits with --resume-from")


def _nothing_sound(config: CampaignConfig, damaged: list[tuple[Path, str]], resume_from: str | None) -> UserError:
    (where, why), others = damaged[0], len(damaged) - 1
    if all(cause.startswith(LEDGER_FILE) for _, cause in damaged):
        expected = "the file as the campaign left it, together with its checkpoints"
        return UserError(str(config.run_dir / LEDGER_FILE), why, expected)
    if resume_from is not None:
        return UserError(str(where), why, "a whole checkpoint; name another step")
    more = f" (and {others} older ones are damaged too)" if others else ""
    return UserError(str(where), why + more, f"a whole checkpoint; remove {where.parent} to begin anew")


def examined(checkpoint: Path, ledger_rows: Iterable[Mapping[str, Any]]) -> CampaignState | str:
    """The state in a checkpoint, or in one line what is wrong with the checkpoint. UserError: a later release wrote it."""
    try:
        text = bytes_of(checkpoint / STATE_FILE).decode()
        content = parsed(text)
        new = has_checksum(text)
        state = CampaignState.from_json(content)
        learner = read_json(checkpoint / "training" / "learner.json")
        version, step = learner["policy_version"], int(STEP_NAME.fullmatch(checkpoint.name)[1])  # type: ignore[index]
    except OSError as error:
        return f"{error.filename}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{STATE_FILE} or learner.json cannot be read ({type(error).__name__}: {error})"
    if not state.step == version == step:
        return f"it holds the state of update {state.step} and the weights of update {version}"
    if new or is_sealed(checkpoint):
        fault = damage(checkpoint, besides=[str(STATE_FILE)])
    else:
        absent = [name for name in REQUIRED if not (checkpoint / name).is_file()]
        fault = f"{absent[0]} is missing" if absent else _torn_tensors(checkpoint)
    if fault is None:
        try:
            state.ledger.check_rows(row for known in ledger_rows if (row := state.ledger.as_known(known)) is not None)
        except ValueError as error:
            return f"{LEDGER_FILE} is not the ledger of this checkpoint: {error}"
        except (KeyError, TypeError, AttributeError) as error:
            return f"{LEDGER_FILE} cannot be read ({type(error).__name__}: {error})"
    return fault or state


def step_of(resume_from: str, checkpoints: Path, steps: list[int], option: str = "--resume-from") -> int:
    """The step that `--resume-from` names: `100`, `step_00000100`, or the directory's path. UserError: it is not there.

    option: by which it was named, for the message.
    """
    name = Path(resume_from).name
    match = STEP_NAME.fullmatch(name) or re.fullmatch(r"([0-9]{1,9})", resume_from)
    step = int(match[1]) if match else -1
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(option, resume_from, f"a checkpoint in {checkpoints}, by its step: {known}")
    return step


def _torn_tensors(checkpoint: Path) -> str | None:
    for file in checkpoint.rglob("*.safetensors"):
        try:
            with blaming_memory(str(file), file.name), opened(file, "numpy"):
                pass  # opening compares the file's size with its header
        except UserError:  # not the file's fault
            raise
        except Exception as error:
            return f"{file.relative_to(checkpoint)}: {type(error).__name__}: {error}"
    return None


def _aside(directory: Path, why: str) -> Path:
    """Renames a checkpoint whose step the campaign will write again."""
    try:
        return set_aside(directory, why)
    except OSError as error:
        raise UserError(str(directory), error.strerror or error, "a directory that can be renamed") from error
