"""Copies checkpoints and records to another file system (`checkpoint.mirror`, any URL that fsspec knows), and back.

    <mirror>/<name>/step_00000100/...       the checkpoint, and in records/ the run directory's records at that time
    <mirror>/<name>/record/...              the shards of a record, each once
    <mirror>/<name>/step_00000100/COMPLETE  written last: the size of every file; without it the copy does not count

A run directory without a checkpoint is filled from the newest complete copy before the campaign starts. After the loss
of a disk, the same command on another machine continues the campaign.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from actors.data.trajectory_shards import SHARD_NAME, fault_in, shards_in
from actors.errors import UserError
from actors.json_files import parsed
from cluster.config import CampaignConfig
from cluster.records.writer import (
    CONFIG_FILE,
    EVENTS_FILE,
    LEDGER_FILE,
    METRICS_FILE,
    ORIGIN_FILE,
    RECORD_DIRECTORY,
    TRAJECTORIES_DIRECTORY,
    UNDONE_FILE,
)
from cluster.state.campaign_state import STATE_FILE
from learner.student.checkpoint import STEP_NAME, checkpoint_steps, commit, discard, new_directory, step_directory
from learner.student.checksums import damage, is_sealed

COMPLETE = "COMPLETE"
RECORDS = "records"
KEPT = (CONFIG_FILE, METRICS_FILE, EVENTS_FILE, LEDGER_FILE, UNDONE_FILE)
KEY = "checkpoint.mirror"


class Mirror:
    """The copies of one campaign. The methods raise what the file system raises, usually OSError."""

    def __init__(self, url: str, run_dir: Path):
        """UserError: fsspec does not know the URL or lacks its library, or the URL cannot be read."""
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
            self._root = PurePosixPath(root, run_dir.name)
            self.steps()  # reads once, so that a wrong URL is an error now and not at the first checkpoint
        except Exception as error:  # each file system has its own errors
            raise UserError(
                KEY, f"{url} ({type(error).__name__}: {error})", "a URL that fsspec can write to"
            ) from error
        self._run_dir = run_dir
        self.damaged: list[tuple[int, UserError]] = []
        """Copies that `pull` has passed over, and why."""

    def steps(self) -> list[int]:
        """Steps with a complete copy, ascending."""
        self._fs.invalidate_cache()  # fsspec caches listings, and would not see what `push` has added since
        if not self._fs.exists(str(self._root)):
            return []
        names = [PurePosixPath(path).name for path in self._fs.ls(str(self._root), detail=False)]
        found = [int(match[1]) for name in names if (match := STEP_NAME.fullmatch(name))]
        return sorted(step for step in found if self._fs.exists(str(self._of(step) / COMPLETE)))

    def push(self, step: int) -> None:
        """Copies the checkpoint of this step and today's records; replaces an unfinished copy of it."""
        checkpoint, target = step_directory(self._run_dir / "checkpoints", step), self._of(step)
        self._push_record(step)
        if self._fs.exists(str(target)):
            self._fs.rm(str(target), recursive=True)
        files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
        records = [self._run_dir / name for name in KEPT]
        records += (self._run_dir / TRAJECTORIES_DIRECTORY).glob("*.jsonl")
        files |= {f"{RECORDS}/{path.relative_to(self._run_dir)}": path for path in records if path.is_file()}
        sizes = {}
        for name, path in files.items():
            self._fs.makedirs(str((target / name).parent), exist_ok=True)
            self._fs.put_file(str(path), str(target / name))
            sizes[name] = self._fs.size(str(target / name))
        self._fs.pipe_file(str(target / COMPLETE), json.dumps(sizes).encode())

    def _push_record(self, step: int) -> None:
        """Copies the shards of updates up to this step that are not there; removes those that are not of this record."""
        directory, target = self._run_dir / RECORD_DIRECTORY, self._root / RECORD_DIRECTORY
        wanted = {Path(one.path).name for update, of in shards_in(directory).items() if update <= step for one in of}
        if not wanted:
            return
        self._fs.makedirs(str(target), exist_ok=True)
        self._fs.put_file(str(directory / ORIGIN_FILE), str(target / ORIGIN_FILE))
        there = {PurePosixPath(path).name: path for path in self._fs.ls(str(target), detail=False)}
        for name in sorted(wanted - there.keys()):
            partial = f"{target / name}.partial"
            self._fs.put_file(str(directory / name), partial)
            self._fs.mv(partial, str(target / name))
        for name in there.keys() - wanted - {ORIGIN_FILE}:
            self._fs.rm_file(there[name])

    def _pull_record(self, step: int) -> None:
        """Brings back the shards of updates up to this step. UserError: one is damaged."""
        source, directory = self._root / RECORD_DIRECTORY, self._run_dir / RECORD_DIRECTORY
        if not self._fs.exists(str(source)):
            return
        directory.mkdir(parents=True, exist_ok=True)
        for path in self._fs.ls(str(source), detail=False):
            name = PurePosixPath(path).name
            match = SHARD_NAME.fullmatch(name)
            if name == ORIGIN_FILE or (match and int(match[1]) <= step):
                self._fs.get_file(str(source / name), str(directory / name))
        for update, of in shards_in(directory).items():
            if fault := fault_in(of):
                raise UserError(KEY, f"the copy of update {update} of the record: {fault}", "a whole copy")

    def prune(self, keep: Collection[int]) -> None:
        """Removes the copies of all other steps."""
        for step in self.steps():
            if step not in keep:
                self._fs.rm_file(str(self._of(step) / COMPLETE))  # first: a copy that is half removed must not count
                self._fs.rm(str(self._of(step)), recursive=True)

    def pull(self) -> int | None:
        """Fills the run directory from the newest whole copy, if it has no checkpoint; returns that copy's step.

        A copy that is damaged is passed over, and listed in `damaged`. None: nothing was to be done.
        UserError: every complete copy is damaged.
        """
        steps, checkpoints = self.steps(), self._run_dir / "checkpoints"
        if not steps or checkpoint_steps(checkpoints):
            return None
        for step in reversed(steps):
            try:
                self._pull(step, checkpoints)
                self._pull_record(step)
                return step
            except UserError as error:
                self.damaged.append((step, error))
        raise self.damaged[0][1]

    def _pull(self, step: int, checkpoints: Path) -> None:
        source, target = self._of(step), step_directory(checkpoints, step)
        try:
            sizes = {
                _within(str(name)): int(size)
                for name, size in parsed(self._fs.cat_file(str(source / COMPLETE))).items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(KEY, f"{source / COMPLETE} ({error})", "the sizes of the files of the copy") from error
        partial = new_directory(target)
        try:
            # File by file, not get(recursive=True): only names that COMPLETE lists, and none that leads out of the folder.
            for name, size in sizes.items():
                self._fetch(source / name, partial / name, size)
            kept = partial / RECORDS
            records = kept.rename(target.with_name(f"{partial.name}.records")) if kept.exists() else None
            try:
                if is_sealed(partial) and (fault := damage(partial, [str(STATE_FILE)])):
                    raise UserError(KEY, f"{source} ({fault})", "a whole copy; remove this one to use the one before")
                if records is not None:
                    shutil.copytree(records, self._run_dir, dirs_exist_ok=True)
            finally:
                if records is not None:
                    shutil.rmtree(records, ignore_errors=True)
            commit(partial, target)
        except BaseException:
            discard(partial)
            raise

    def try_out(self) -> None:
        """Writes a small file, reads it back and removes it. UserError: one of these fails."""
        place = str(self._root.parent / f".{self._root.name}.trial")
        try:
            self._fs.makedirs(str(self._root.parent), exist_ok=True)
            self._fs.pipe_file(place, b"understudy")
            found = self._fs.cat_file(place)
            self._fs.rm_file(place)
        except Exception as error:  # each file system has its own errors
            raise UserError(
                KEY, f"{self._root.parent} ({type(error).__name__}: {error})", "a directory that can be written to"
            ) from error
        if found != b"understudy":
            raise UserError(KEY, f"{place} with other bytes than were written", "a file system that keeps them")

    def _fetch(self, source: PurePosixPath, target: Path, size: int) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        found: Any = "nothing"
        if self._fs.exists(str(source)):
            self._fs.get_file(str(source), str(target))
            found = target.stat().st_size
        if found != size:
            raise UserError(
                KEY, f"{source} with {found} bytes", f"{size} bytes; remove this copy to use the one before"
            )

    def _of(self, step: int) -> PurePosixPath:
        return self._root / f"step_{step:08d}"


def mirror_of(config: CampaignConfig) -> Mirror | None:
    """The campaign's mirror, or None."""
    return Mirror(config.checkpoint.mirror, config.run_dir) if config.checkpoint.mirror else None


def _within(name: str) -> Path:
    """The relative path of a file in a copy. UserError: it leads out of the checkpoint."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(KEY, f"a copy with a file {name!r}", "names within the checkpoint")
    return Path(path)
