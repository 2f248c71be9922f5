"""Resumes a run directory: locks it, checks that the configuration fits, and cuts its records back to the checkpoint."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from actors.errors import UserError
from cluster.config import CampaignConfig, prompt_sources
from cluster.config_file import load_config, of_this_run
from cluster.pins import hold
from cluster.records.metric_table import is_evaluation
from cluster.records.run_lock import locked
from cluster.records.writer import CONFIG_FILE, LEDGER_FILE, METRICS_FILE, RunRecords, read_jsonl
from cluster.state.campaign_state import CampaignState
from cluster.state.changes import WHERE
from cluster.state.mirror import KEY, Mirror, mirror_of
from cluster.state.soundness import Found, clear_the_way, newest_sound
from cluster.state.taken_over import TakenOver


def config_of(run_dir: Path, overrides: Sequence[str]) -> CampaignConfig:
    """The configuration in a run directory with overrides `key=value`. The directory may have been moved.

    A relative path of prompts or models that leads nowhere from here is looked for in the directory where the campaign was
    begun, and becomes absolute if it is there.

    UserError: it is no run directory, or an override names a key of WHERE.
    """
    run_dir = Path(os.path.abspath(run_dir))  # `.` has no name, and the name of the directory becomes the campaign's
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError("--resume", run_dir, f"a run directory: one with {CONFIG_FILE}")
    for override in overrides:
        if override.partition("=")[0] in WHERE:
            raise UserError("override", repr(override), "none of name and output_dir: the run directory says them")
    config = load_config(run_dir / CONFIG_FILE, overrides)
    _find_again(config, of_this_run(run_dir).get("begun_in"))
    config.output_dir, config.name = str(run_dir.parent), run_dir.name
    return config


def _find_again(config: CampaignConfig, begun_in: Any) -> None:
    sources: list[tuple[Any, str]] = [(config.student, "model")]
    sources += [(source, "path") for source in prompt_sources(config).values()]
    sources += [(config, "replay")]
    sources += [(teacher, name) for teacher in config.teachers.values() for name in ("model", "tokenizer")]
    for owner, name in sources:
        path = getattr(owner, name)
        if path and begun_in and not Path(path).exists() and Path(str(begun_in), path).exists():
            setattr(owner, name, str(Path(str(begun_in), path)))


def refuse_output(config: CampaignConfig) -> None:
    """UserError: the run directory cannot be made or written to, as far as that is known without making anything."""
    run_dir = Path(os.path.abspath(config.run_dir))
    nearest = next(path for path in (run_dir, *run_dir.parents) if os.path.lexists(path))
    why = "Not a directory" if not nearest.is_dir() else "" if os.access(nearest, os.W_OK | os.X_OK) else "not writable"
    if why:
        found = f"{config.output_dir} ({nearest}: {why})"
        raise UserError("output_dir", found, "a directory to write to")


@contextmanager
def claimed(config: CampaignConfig, allow_change: Sequence[str] = ()) -> Iterator[TakenOver]:
    """Creates and locks the run directory; within the block no other process can run a campaign in it.

    Yields what its last run was configured with, and what is other now. allow_change: keys and sections that may be other,
    though they change the mathematics. UserError: the directory cannot be written to, another process holds it, or it holds
    a campaign with another configuration.
    """
    run_dir = config.run_dir
    with ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run_dir))
        except BlockingIOError as error:
            raise UserError(
                str(run_dir), "a campaign that another process is running", "another name, or that it ends first"
            ) from error
        except OSError as error:
            raise UserError(
                "output_dir", f"{config.output_dir} ({error.strerror})", "a directory to write to"
            ) from error
        if mirror := mirror_of(config):
            _bring_back(mirror, run_dir)
            hold(config)  # the copy's commits, where the run directory had none
        yield TakenOver.of(config, allow_change)


def _bring_back(mirror: Mirror, run_dir: Path) -> None:
    """Fills a run directory without checkpoints from the mirror."""
    try:
        step = mirror.pull()
    except OSError as error:
        raise UserError(KEY, error, "copies that can be read") from error
    if step is not None:
        records = RunRecords(run_dir)
        for damaged, fault in mirror.damaged:
            records.event("damaged_copy", str(fault), step=damaged)
        records.event("brought_back", step=step)


def take_up(
    config: CampaignConfig, records: RunRecords, on_event: Callable[..., None] | None = None, found: Found | None = None
) -> tuple[CampaignState, Path | None]:
    """The state and path of the newest sound checkpoint (a new state and None if there is none); records are cut back to it.

    on_event: told of damaged checkpoints; by default events.jsonl is. found: what `newest_sound` has found already.
    UserError: see `newest_sound`; or ledger.jsonl does not fit.
    """
    told = on_event or records.event
    found = found or newest_sound(config, told)
    clear_the_way(found, told)
    if found.newer:  # the user goes back: what is undone stays on record, as after a rollback
        records.set_aside_after(found.state.step, [])
    fit_records(config, records, found.state)
    return found.state, found.checkpoint


def fit_records(config: CampaignConfig, records: RunRecords, state: CampaignState) -> None:
    """Removes the records of steps after this state, and adds to the state evaluations that came after its checkpoint."""
    # -1: without the evaluation of the untrained student in the state, it is repeated, and its line written again.
    records.truncate_after(state.step if state.step or state.start else -1)
    # A step is evaluated after its checkpoint is written, so the newest evaluation may be in the metrics only.
    for row in read_jsonl(config.run_dir / METRICS_FILE):
        if row["step"] and is_evaluation(row):
            state.evaluations[row["step"]] = {key: row[key] for key in row if key.startswith("eval/")}
    try:
        state.ledger.check_rows(records.keep_closed(state.ledger.as_known))
    except ValueError as error:
        raise UserError(
            str(config.run_dir / LEDGER_FILE), error, "the file as the campaign left it, together with its checkpoints"
        ) from error
    state.ledger.on_close = records.closed
