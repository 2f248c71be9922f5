"""Tries before the first update what would otherwise be done for the first time later: a checkpoint, the summary, the report.

What evaluates and publishes before the first update is tried by doing it (loop/campaign.py: the student's first evaluation,
and its weights in every engine); trackers connect when they are made. What remains is here, and each failure is one line.
"""

import asyncio
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from actors.data.models import check_fit
from actors.errors import CampaignError, CheckpointError, UserError
from cluster.config import CampaignConfig
from cluster.console.screen import summary_table
from cluster.fleet.ray_fleet import Fleet
from cluster.records.writer import REPORT_FILE, SUMMARY_FILE, RunRecords
from cluster.report.page import write_report
from cluster.state.campaign_state import STATE_FILE, CampaignState, state_text
from cluster.state.checkpoints import checkpoints_to_hold
from cluster.state.mirror import mirror_of
from cluster.state.summary import summarise
from learner.student.checkpoint import checkpoint_steps, discard, flush, new_directory, step_directory
from learner.student.checksums import damage, seal

WHOLE_BYTES = 1 << 30
"""A checkpoint up to this size is tried as a whole; of a larger one the tensors of SAMPLE_BYTES."""
SAMPLE_BYTES = 64 << 20
POLL_SECONDS = 0.05


async def try_out(
    config: CampaignConfig,
    state: CampaignState,
    learner: Fleet,
    records: RunRecords,
    needed: dict[str, Any],
    on_event: Callable[..., None],
) -> None:
    """Tries everything. UserError: a disk or the mirror. CheckpointError: a checkpoint. CampaignError: the records."""
    began = time.monotonic()
    nbytes = int(await learner.call("checkpoint_bytes"))
    await asyncio.to_thread(demand_room, config, nbytes)
    whole = nbytes <= WHOLE_BYTES
    measured = await _checkpoint(config, state, learner, whole)
    takes = measured.seconds if whole else measured.seconds * nbytes / max(measured.nbytes, 1)
    demand_time(config, nbytes, takes, measured)
    await asyncio.to_thread(_records, config, state, records, needed)
    if (mirror := mirror_of(config)) is not None:
        await asyncio.to_thread(mirror.try_out)
    part = "" if whole else f", with {SAMPLE_BYTES / 1e6:.0f} MB of its {nbytes / 1e9:.3g} GB"
    what = f"a checkpoint{part}, summary, report" + (", mirror" if mirror is not None else "")
    takes_seconds = round(takes, 1)
    on_event("tried", seconds=time.monotonic() - began, what=what, checkpoint_seconds=takes_seconds, nbytes=nbytes)


def demand_room(config: CampaignConfig, nbytes: int) -> None:
    """UserError: the disk has no room for the checkpoints that are kept at a time, of so many bytes each."""
    directory = config.run_dir / "checkpoints"
    there = checkpoint_steps(directory)
    number = checkpoints_to_hold(config)
    free = shutil.disk_usage(config.run_dir).free
    if free < nbytes * max(number - len(there), 1):
        raise UserError(
            "checkpoint.keep_last",
            f"{config.checkpoint.keep_last}, with {free / 1e9:.2f} GB free at {config.run_dir}",
            f"room for {number} checkpoints of {nbytes / 1e9:.3g} GB (keep_last, keep_best and the one being written)",
        )


class Measured(NamedTuple):
    """A checkpoint, or a part of one, that was written to the disk."""

    nbytes: int
    seconds: float
    """From the call to the flushed files, without reading them back."""


def demand_time(config: CampaignConfig, nbytes: int, seconds: float, measured: Measured) -> None:
    """UserError: a checkpoint of so many bytes takes so many seconds, and an interrupted campaign is given fewer."""
    grace = config.checkpoint.grace_seconds
    if grace is not None and seconds > grace:
        rate = measured.nbytes / max(measured.seconds, 1e-9) / 1e9
        found = f"{grace:g}, and a checkpoint of {nbytes / 1e9:.3g} GB takes {seconds:.3g} s ({config.run_dir} took {rate:.3g} GB/s)"
        raise UserError(
            "checkpoint.grace_seconds",
            found,
            f"at least {math.ceil(1.5 * seconds)}, here and in the scheduler (docs/operating.md), or a faster disk",
        )


async def _checkpoint(config: CampaignConfig, state: CampaignState, learner: Fleet, whole: bool) -> Measured:
    """Writes a checkpoint as in training, reads it back, and removes it."""
    began = time.monotonic()
    try:
        partial = await asyncio.to_thread(new_directory, step_directory(config.run_dir / "checkpoints", 0))
        try:
            await learner.call("save", str(partial.resolve()), None if whole else SAMPLE_BYTES)
            while not await learner.call("saved"):
                await asyncio.sleep(POLL_SECONDS)
            nbytes = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
            measured = Measured(nbytes, time.monotonic() - began)
            await asyncio.to_thread(_read_back, config, state, partial, whole)
            return measured
        finally:
            discard(partial)
    except (OSError, CheckpointError) as error:
        cause = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"a checkpoint, tried before the first update, could not be written: {cause}") from error


def _read_back(config: CampaignConfig, state: CampaignState, partial: Path, whole: bool) -> None:
    (partial / STATE_FILE).parent.mkdir(exist_ok=True)
    (partial / STATE_FILE).write_text(state_text(state), "utf-8")
    seal(partial, [str(STATE_FILE)])
    flush(partial)
    if fault := damage(partial, [str(STATE_FILE)]):
        raise CheckpointError(f"it was not read back as it was written: {fault}")
    CampaignState.from_json(state.to_json())
    if whole:
        try:
            check_fit(str(partial), config.student.trust_remote_code, "student.model")
        except UserError as error:
            raise CheckpointError(f"it would not be loaded: {error}") from error


def _records(config: CampaignConfig, state: CampaignState, records: RunRecords, needed: dict[str, Any]) -> None:
    """Writes summary and report under other names, and removes them."""
    paths = {name: config.run_dir / f".trial.{name}" for name in (SUMMARY_FILE, REPORT_FILE)}
    try:
        summary = summarise(config, state, records.wall_seconds, needed)
        records.write_summary(summary, paths[SUMMARY_FILE])
        summary_table(summary)
        if (config.run_dir / "metrics.jsonl").exists():
            write_report([config.run_dir], paths[REPORT_FILE])
    except Exception as error:  # of any kind: this is what would end the campaign after its last update
        raise CampaignError(
            f"summary or report, tried before the first update, could not be written: {type(error).__name__}: {error}"
        ) from error
    finally:
        for path in paths.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
