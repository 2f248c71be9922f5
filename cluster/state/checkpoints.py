"""Writes the campaign's checkpoints while training goes on: the learner's tensors and the campaign's state of one step.

    save     the learner copies its tensors, the state becomes JSON      the campaign waits
    write    both are written to a directory with a temporary name       nobody waits
    commit   it is flushed to disk and renamed; old ones are removed     nobody waits
    mirror   it is copied to `checkpoint.mirror`, if that is set         only the end of the campaign waits

The learner writes its files into the directory itself, so it and the campaign must share a file system. At most one
checkpoint is being written at a time; the end of the campaign, or an interrupt, waits for it. One that finds a full disk
is written again, of the update that is newest then, and training waits until it is complete.
"""

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from actors.errors import CheckpointError, DiskFullError, is_full_disk
from cluster.config import CampaignConfig, CheckpointConfig
from cluster.fleet.ray_fleet import Fleet
from cluster.records.disk import Disk
from cluster.records.writer import RunRecords
from cluster.state.campaign_state import STATE_FILE, CampaignState, state_text
from cluster.state.mirror import Mirror, mirror_of
from learner.student.checkpoint import (
    checkpoint_steps,
    commit,
    discard,
    latest_checkpoint,
    new_directory,
    prune,
    step_directory,
)
from learner.student.checksums import seal

POLL_SECONDS = 0.05
"""Between two calls that ask the learner whether its files are written."""
COPIES = 3
"""How often the copy of one checkpoint is tried."""
CLOSE_SECONDS = 60.0
"""How long a failing campaign waits for a checkpoint that is being written."""


class Checkpoints:
    """Saves one campaign's checkpoints; the methods are called by the loop, in turn."""

    def __init__(self, config: CampaignConfig, records: RunRecords, disk: Disk | None = None):
        """disk: waits while the run directory cannot be written to; by default one that only the records tell of."""
        self._directory = config.run_dir / "checkpoints"
        self._last_step, self._config, self._best_by = config.pipeline.updates, config.checkpoint, config.best_by
        self._records, self._disk = records, disk or Disk(records, records.event)
        self._owed = False
        """Whether the last checkpoint has found a full disk."""
        self._newest: tuple[CampaignState, Fleet]
        """The arguments of the last `save`."""
        self._mirror = mirror_of(config)
        self._mirrored = -1
        """The newest step that is copied."""
        self._copied_now = -1
        """The step whose copy is under way; its checkpoint must stay until then."""
        self._copy_failures: Counter[int] = Counter()
        self._task: asyncio.Task[None] | None = None
        self._copying: asyncio.Task[None] | None = None

    async def save_if_due(self, state: CampaignState, learner: Fleet) -> None:
        """After an update: saves if the configuration asks for it. CheckpointError: the one before could not be written."""
        if self._task is not None and self._task.done():
            await self.finish()
        if self._owed or state.step == self._last_step or state.step % self._config.every_updates == 0:
            await self.save(state, learner)

    def exists(self, step: int) -> bool:
        """Whether this step has a complete checkpoint."""
        return step in checkpoint_steps(self._directory)

    async def save(self, state: CampaignState, learner: Fleet) -> None:
        """Begins the checkpoint of this step, unless it exists; returns when the learner has copied its tensors.

        Waits for the checkpoint before. Where that has found a full disk, this one is waited for too, until there is room:
        the learner must not change meanwhile. CheckpointError: one could not be written; earlier ones are intact.
        """
        self._newest = state, learner
        await self.finish()
        if not self._owed:
            await self._begin(state, learner)
            if self._task is not None and self._task.done():
                await self.finish()
        await self._pay()

    async def _pay(self) -> None:
        """Writes the checkpoint that is owed because the disk was full, and waits until it is complete."""
        if self._owed:
            self._owed = False
            await self._disk.patiently(partial(self._save_completely, *self._newest))

    async def _save_completely(self, state: CampaignState, learner: Fleet) -> None:
        await self._begin(state, learner)
        await self._written()

    async def _begin(self, state: CampaignState, learner: Fleet) -> None:
        if state.step == 0 or self.exists(state.step):
            return
        copied = asyncio.Event()
        # JSON now: training changes the state while the files are written.
        content = state_text(state)
        self._task = asyncio.create_task(self._write(state.step, content, state, learner, copied))
        self._task.add_done_callback(lambda _: copied.set())  # also after an error before the copy, so that `save` ends
        await copied.wait()

    async def finish(self) -> None:
        """Waits for the checkpoint that is being written. CheckpointError: it could not be written, and not because the
        disk is full: then the next call of `save`, `save_if_due` or `settle` saves again."""
        try:
            await self._written()
        except DiskFullError:
            self._owed = True

    async def _written(self) -> None:
        if (task := self._task) is not None:
            await asyncio.wait([task])  # not `await task`: cancelling one that waits would cancel the checkpoint
            self._task = None
            task.result()

    async def settle(self) -> None:
        """At the end of the campaign: waits for the checkpoint that is being written, and for its copy."""
        await self.finish()
        await self._pay()
        self._mirror_newest()  # a copy that has failed is made again
        while self._copying is not None and not self._copying.done():
            await asyncio.wait([self._copying])
            self._mirror_newest()

    async def close(self) -> None:
        """At the end of the loop, after an error too: completes a checkpoint that is being written, if it still can."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_SECONDS)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)  # until its partial directory is removed
        if self._copying is not None:
            await asyncio.wait([self._copying], timeout=CLOSE_SECONDS)
            self._copying.cancel()

    async def _write(
        self, step: int, content: str, state: CampaignState, learner: Fleet, copied: asyncio.Event
    ) -> None:
        target, began = step_directory(self._directory, step), time.monotonic()
        try:
            partial = await asyncio.to_thread(new_directory, target)
            try:
                # Absolute: the learner's process may have another working directory than the campaign's.
                await learner.call("save", str(partial.resolve()))
                copied.set()
                # Polled: the learner runs one call at a time, so one long call would keep it from training.
                while not await learner.call("saved"):
                    await asyncio.sleep(POLL_SECONDS)
                (partial / STATE_FILE).parent.mkdir(exist_ok=True)
                (partial / STATE_FILE).write_text(content, "utf-8")
                await asyncio.to_thread(seal, partial, [str(STATE_FILE)])
                await asyncio.to_thread(self._records.flush)  # the state assumes that these rows are on disk
                await asyncio.to_thread(commit, partial, target)
            except BaseException:  # also CancelledError, from `close`
                discard(partial)
                raise
            took = time.monotonic() - began
            seconds = round(took, 1)
            self._records.event("checkpoint", step=step, path=str(target), seconds=seconds)
            grace = self._config.grace_seconds
            if grace is not None and took > grace:
                self._records.event("slow_checkpoint", step=step, seconds=seconds, grace_seconds=grace)
            # The mirrored checkpoint may still be being copied.
            keep = steps_to_keep(checkpoint_steps(self._directory), state, self._config, self._best_by)
            await asyncio.to_thread(prune, self._directory, {*keep, self._copied_now})
            self._mirror_newest()
        except (OSError, CheckpointError) as error:
            kind = DiskFullError if is_full_disk(error) else CheckpointError
            raise kind(self._explain(step, error)) from error

    def _mirror_newest(self) -> None:
        """Begins to copy the newest checkpoint, unless it is copied, or another copy is under way."""
        steps = checkpoint_steps(self._directory)
        if self._mirror is None or not steps or steps[-1] <= self._mirrored:
            return
        if self._copy_failures[steps[-1]] < COPIES and (self._copying is None or self._copying.done()):
            self._copied_now = steps[-1]
            self._copying = asyncio.create_task(self._copy(self._mirror, steps))

    async def _copy(self, mirror: Mirror, steps: list[int]) -> None:
        """Copies the newest checkpoint. A failure is an event; it is tried again with the next one, and at the end."""
        try:
            await asyncio.to_thread(mirror.push, steps[-1])
            self._mirrored = steps[-1]  # only now: a copy that failed must be made again
            await asyncio.to_thread(mirror.prune, steps)
            self._records.event("mirrored", step=steps[-1])
        except Exception as error:  # each file system has its own errors
            self._copy_failures[steps[-1]] += 1
            self._records.event("mirror_failed", f"{type(error).__name__}: {error}", step=steps[-1])

    def _explain(self, step: int, error: Exception) -> str:
        cause = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) else str(error)
        # The learner's own OSErrors come as text, `No space left on device (file)`; other errors name their type first.
        way_out = "mend this" if re.match(r"\w+Error: ", cause) else "make room"
        return f"the checkpoint of step {step} could not be written: {cause}; {what_is_good(self._directory, way_out)}"


def what_is_good(checkpoints: Path, way_out: str = "make room") -> str:
    """For messages: the newest good checkpoint, and how to go on from it. way_out: what the user does first."""
    good = latest_checkpoint(checkpoints)
    return f"{good} is good: {way_out}, and run the same command again" if good else "there is no checkpoint before it"


def checkpoints_to_hold(config: CampaignConfig) -> int:
    """The most checkpoints that are on the disk at a time: those that are kept, and the one being written."""
    in_all = -(-config.pipeline.updates // config.checkpoint.every_updates)
    return min(in_all, config.checkpoint.keep_last + config.checkpoint.keep_best + 1)


def steps_to_keep(steps: list[int], state: CampaignState, config: CheckpointConfig, best_by: str = "") -> set[int]:
    """The checkpoints to keep: the last `keep_last`, the best `keep_best`, and those that are not evaluated yet.

    steps: all that exist, ascending. best_by: see `best_first`.
    """
    best = best_first(steps, state.evaluations, best_by)[: config.keep_best]
    return {*steps[-config.keep_last :], *best, *(record["step"] for record in state.pending)}


def best_first(steps: Sequence[int], evaluations: Mapping[int, Mapping[str, Any]], best_by: str = "") -> list[int]:
    """The evaluated ones of these steps, the best first.

    Best means highest held-out accuracy, and of equal ones lowest reverse KL; where no accuracy is measured, lowest reverse
    KL; of equal ones, the earlier. An evaluation without a number is the worst. evaluations: step -> its metrics. best_by:
    the evaluation set that decides (`CampaignConfig.best_by`); "": `evaluation.prompts`.
    """
    prefix = f"eval/{best_by}/" if best_by else "eval/"
    measures = {step: one for step, one in evaluations.items() if any(_is_of(key, prefix) for key in one)}
    judged = any(f"{prefix}accuracy" in one for one in measures.values())

    def worst_last(step: int, key: str, sign: int) -> tuple[bool, float]:
        value = measures[step].get(key)
        missing = value is None or math.isnan(value)
        return missing, 0.0 if missing else sign * float(value)  # type: ignore[arg-type]

    def cost(step: int) -> tuple[Any, ...]:
        accuracy = worst_last(step, f"{prefix}accuracy", -1) if judged else (False, 0.0)
        return (*accuracy, *worst_last(step, f"{prefix}reverse_kl", 1), step)

    return sorted((step for step in steps if step in measures), key=cost)


def _is_of(key: str, prefix: str) -> bool:
    """Whether a metric is of the evaluation set whose metrics begin with this."""
    return key.startswith(prefix) and "/" not in key.removeprefix(prefix)
