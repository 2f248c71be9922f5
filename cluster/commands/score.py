"""`understudy score`: fills the scores of a configuration's teachers into a file of responses, or into a record, without a learner.

The result is a record (cluster/state/recorded.py), which `replay` trains on. It is written shard by shard: one for as many rows
as an update has. A command that was interrupted goes on with the first shard that is not there, so each row is scored once.
"""

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from actors.data.trajectory_shards import Row, counts_of, fault_in, rows_of, shards_in, write_shard
from actors.errors import UserError
from actors.prompts.fingerprint import prompts_fingerprint
from actors.prompts.prompt_set import PromptSet, copied
from actors.teacher_scores import TeacherScores
from actors.trajectory import NO_VERSION, Trajectories, TrajectoryId, select_trajectories
from cluster.config import CampaignConfig, EvaluationConfig
from cluster.fleet.ray_actor import fetched
from cluster.fleet.ray_cluster import connected, room_to_begin
from cluster.inputs import Inputs, read_inputs
from cluster.loop.teachers import PromptRoutes, Teachers, route, routes
from cluster.loop.work import each_once
from cluster.planning.record_size import record_bytes
from cluster.preflight import check_models
from cluster.records.run_lock import locked
from cluster.records.writer import ORIGIN_FILE, RECORD_DIRECTORY, write_atomically
from cluster.roles import build_fleets
from cluster.state import recorded
from cluster.state.recorded import Origin
from cluster.state.same_inputs import Fingerprints, fingerprints
from learner.config import LearnerConfig, ObjectiveConfig

FORGOTTEN = LearnerConfig(gpus_per_replica=0, cpus_per_replica=0.0)
"""In the place of a learner, which is not started."""


class Scored(NamedTuple):
    """What a command has done."""

    updates: int
    """Shards in the record."""
    rows: int
    """Trajectories in them."""
    before: int
    """Trajectories of them that an earlier command had scored."""
    missing: int
    """Tokens without a score, of those that this one has scored."""
    refused: dict[str, str]
    """Trajectory -> why a teacher could not score it; its tokens have no scores."""

    def __str__(self) -> str:
        told = f"{self.rows:,} responses"
        told += f", {self.before:,} of them earlier" if self.before else ""
        told += f", {self.missing:,} tokens without a score" if self.missing else ""
        if not self.refused:
            return told
        first, cause = next(iter(self.refused.items()))
        return f"{told}, {len(self.refused):,} that no teacher scores (the first, {first}: {cause})"


class Source(Protocol):
    """Where the responses are."""

    origin: Origin
    updates: int
    rows: int

    def part(self, update: int) -> tuple[Trajectories, list[Row]]:
        """The trajectories of an update, from 1."""

    def routes(self, rows: list[Row], written: Trajectories) -> PromptRoutes:
        """Their teachers."""


class OfFile:
    """Responses in a file of prompts, one to each."""

    def __init__(self, config: CampaignConfig, inputs: Inputs, now: Fingerprints, file: Path):
        self._config, self._prompts, self._views = config, inputs.prompts, inputs.prompt_routes.privileged
        self._size, self.rows = config.trajectories_per_update, len(inputs.prompts)
        self.updates = -(-self.rows // self._size)
        self.origin = replace(
            Origin.of(config, now, inputs.tokenizer),
            written_by="file",
            rewards=False,
            input=_fingerprint(inputs.prompts),
        )
        reference = config.learner.objective.reference_teacher
        teaching = {name: teacher for name, teacher in config.teachers.items() if name != reference}
        self._routes = routes(self._prompts.domains, teaching, self._prompts.where)
        if reference is not None:
            self._routes = self._routes.each(lambda route: {**route, reference: 0.0})

    def part(self, update: int) -> tuple[Trajectories, list[Row]]:
        """See Source. No version of the student wrote them, and the log-probs of who did are not known: NO_VERSION and NaN."""
        numbers = np.arange((update - 1) * self._size, min(update * self._size, self.rows))
        ids = np.stack([np.zeros_like(numbers), numbers, np.zeros_like(numbers)], axis=1)
        _, written = copied(self._prompts, ids, NO_VERSION, self._config.sampling.max_response_tokens)
        unknown = np.full(len(written.response_tokens), np.nan, np.float32)
        rows = [Row(int(n), place, self._prompts.domains[int(n)], {}) for place, n in enumerate(numbers)]
        return replace(written, behaviour_logprobs=unknown), rows

    def routes(self, rows: list[Row], written: Trajectories) -> PromptRoutes:
        """See Source."""
        return PromptRoutes(self._routes, self._views)


class OfRecord:
    """Trajectories of a record, whose scores are replaced."""

    def __init__(self, config: CampaignConfig, inputs: Inputs, now: Fingerprints, file: Path):
        self._config, self._record = config, recorded.opened(str(file), rest=True)
        before, own = self._record.origin, Origin.of(config, now, inputs.tokenizer)
        if before.tokenizer != own.tokenizer:
            raise UserError("student.model", "another tokenizer than that of the record", f"the one of {file}")
        self.origin = replace(before, teachers=own.teachers, input=self._record.fingerprint)
        self.updates = self._record.updates
        self.rows = sum(rows_of(shard) for of in self._record.shards.values() for shard in of)

    def part(self, update: int) -> tuple[Trajectories, list[Row]]:
        """See Source."""
        shards = self._record.shards[update]
        counts = counts_of(shards)
        ids = np.stack([np.array(counts[name], np.int64) for name in ("epoch", "prompt", "sample")], axis=1)
        written = select_trajectories(ids, [shard.trajectories()[0] for shard in shards])
        rows = zip(counts["number"], counts["row"], counts["domain"], counts["parts"], strict=True)
        return written, [Row(*row) for row in rows]

    def routes(self, rows: list[Row], written: Trajectories) -> PromptRoutes:
        """See Source."""
        reference = self._config.learner.objective.reference_teacher
        teaching = {name: teacher for name, teacher in self._config.teachers.items() if name != reference}
        more = {} if reference is None else {reference: 0.0}
        prompts = written.ids[:, 1].tolist()
        where = str(self._record.directory)
        found: Any = {p: route(row.domain, teaching, where) | more for p, row in zip(prompts, rows, strict=True)}
        return PromptRoutes(found, {})


def _fingerprint(prompts: PromptSet) -> str:
    assert prompts.responses is not None
    digest = xxhash.xxh3_128(prompts_fingerprint(prompts).encode())
    for values in (prompts.responses.tokens, prompts.responses.offsets, prompts.responses.trained):
        digest.update(values.tobytes())
    return digest.hexdigest()


def of_record(file: Path) -> bool:
    """Whether this is a record, or a run directory with one."""
    return file.is_dir() and any(shards_in(directory) for directory in (file, file / RECORD_DIRECTORY))


def to_score(
    config: CampaignConfig, file: Path, prompt_field: str | None = None, response_field: str | None = None
) -> CampaignConfig:
    """The configuration of the teacher actors, with the file as its prompts unless it is a record.

    prompt_field, response_field: of the file; None: as the configuration has them, or `response`. UserError: no such file, or teachers whose scores it cannot have.
    """
    if not file.exists():
        raise UserError("FILE", f"{file}, which is not there", "a file of prompts and responses, or a record")
    record_bytes(config)
    idle = replace(config.rollout, replicas=1, gpus_per_replica=0, cpus_per_replica=0.0, resources={})
    bare = replace(
        config, evaluation=EvaluationConfig(), record=False, replay=None, rollout=replace(idle, tensor_parallel_size=1)
    )
    objective = ObjectiveConfig(reference_teacher=config.learner.objective.reference_teacher)
    bare = replace(bare, learner=replace(FORGOTTEN, objective=objective))
    for name, teacher in config.teachers.items():
        key = f"teachers.{name}"
        if of_record(file) and (teacher.prompt_template is not None or teacher.tokenizer is not None):
            raise UserError(key, f"a template or tokenizer of its own, for the record {file}", "a file of texts for it")
        if teacher.signal == "student_topk" and not of_record(file):
            raise UserError(f"{key}.signal", "student_topk", "another: no student has named tokens for a file of texts")
        if teacher.ema_decay is not None:
            raise UserError(f"{key}.ema_decay", teacher.ema_decay, "null: there is no student to follow")
    if of_record(file):
        return bare
    section = config.prompts
    prompts = replace(section, path=str(file), function=None, sources={}, limit=None, revision=None, shuffle=False)
    fields: dict[str, Any] = {
        "prompt_field": prompt_field or section.prompt_field,
        "response_field": response_field or section.response_field or "response",
        "reference_field": None,
    }
    return replace(bare, prompts=replace(prompts, **fields))


def score(
    config: CampaignConfig, file: Path, output: Path, on_event: Callable[..., None], tell: Callable[[str], None]
) -> Scored:
    """Scores what is not scored yet, and writes the record. config: of `to_score`. UserError: a model, a row or the record there
    is at fault. CampaignError: a teacher broke."""
    check_models(config)
    as_data = replace(config.learner, objective=ObjectiveConfig(estimator="sft"))
    one_each = replace(config.pipeline, samples_per_prompt=1)
    reading = config if of_record(file) else replace(config, learner=as_data, pipeline=one_each)
    inputs = read_inputs(reading)
    inputs.close()
    for remark in [] if of_record(file) else inputs.remarks:
        tell(f"{file}: {remark}")
    now = fingerprints(config, inputs.prompts, None)
    source: Source = (OfRecord if of_record(file) else OfFile)(config, inputs, now, file)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output), connected(config) as private:
            there = _there(output, source)
            return asyncio.run(_scored(config, inputs, source, output, there, private, on_event, tell))
    except BlockingIOError as error:
        raise UserError("--output", f"{output}, which another process writes", "another directory") from error
    except OSError as error:
        raise UserError("--output", f"{output} ({error.strerror})", "a directory with room to write to") from error


def _there(output: Path, source: Source) -> set[int]:
    """The updates that an earlier command has scored. UserError: the directory holds a record of something else."""
    if (output / ORIGIN_FILE).exists():
        if recorded.read_origin(output) != source.origin:
            expected = "another directory, or the file, teachers and update size that it was begun with"
            raise UserError("--output", f"{output}, which holds scores of something else", expected)
    elif any(output.glob("*.parquet")):
        raise UserError("--output", f"{output}, which holds other files", "a directory of its own")
    write_atomically(output / ORIGIN_FILE, json.dumps(asdict(source.origin), indent=1) + "\n")
    return {update for update, shards in shards_in(output).items() if not fault_in(shards)}


async def _scored(
    config: CampaignConfig,
    inputs: Inputs,
    source: Source,
    output: Path,
    there: set[int],
    private: bool,
    on_event: Callable[..., None],
    tell: Callable[[str], None],
) -> Scored:
    needed, begin, short = room_to_begin(config, private)
    if short:
        raise short
    fleets = build_fleets(config, inputs, needed, begin, on_event, asyncio.Lock())
    teachers = {name: fleets[f"teacher.{name}"] for name in config.teachers}
    missing, rows, before, refused = 0, 0, 0, dict[str, str]()
    try:
        if len(there) < source.updates:
            await asyncio.gather(*(fleet.start() for fleet in teachers.values()))
            await Teachers(teachers, inputs.prompt_routes).compare_replicas()
        for update in range(1, source.updates + 1):
            written, own = await asyncio.to_thread(source.part, update)
            rows += len(own)
            if update in there:
                before += len(own)
                continue
            reference = next(iter(teachers.values())).put(written)
            answer = await Teachers(teachers, source.routes(own, written)).score(written.ids, [reference])
            scores: list[TeacherScores] = await fetched(each_once(itertools.chain(*answer.references)))
            await asyncio.to_thread(write_shard, output, update, 0, 1, written, scores, own)
            missing += answer.missing
            refused |= {str(TrajectoryId(*written.ids[row].tolist())): cause for row, cause in answer.refused.items()}
            tell(f"scored {rows:,} of {source.rows:,}")
        return Scored(source.updates, rows, before, missing, refused)
    finally:
        for fleet in fleets.values():
            fleet.close()
