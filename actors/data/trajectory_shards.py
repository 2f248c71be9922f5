"""Recorded trajectories: Parquet files with a row for each trajectory, its tokens and its teachers' scores.

    update_00000007.0of2.3f1c9a5be2d04417.parquet     part 0 of 2 of what update 7 trained on

A learner of several ranks writes several parts, each the trajectories whose scores it has. The last word of the name is the
xxh3-64 of the file: a shard and its checksum appear by one renaming, and one that was cut or changed is told from its name.
Columns: docs/replay.md. B trajectories, N response tokens, K support size.
"""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from actors.errors import CampaignError
from actors.json_files import replace_content
from actors.teacher_scores import TeacherScores
from actors.trajectory import FINISH_REASONS, Trajectories, offsets_of, ragged_rows

SHARD_NAME = re.compile(r"update_([0-9]{8,18})\.([0-9]{1,6})of([0-9]{1,6})\.([0-9a-f]{16})\.parquet")
COUNTS = (
    "row",
    "number",
    "epoch",
    "prompt",
    "sample",
    "domain",
    "prompt_length",
    "length",
    "context",
    "oldest_version",
    "finish_reason",
    "missing",
)
"""Columns with one value a trajectory: all that the campaign process reads of a shard, with those of parts of the reward."""
PART = "reward."
"""What the columns of named parts of the reward begin with."""


class Shard(NamedTuple):
    """A recorded part of an update, by the name of its file."""

    path: str
    update: int
    part: int
    parts: int
    checksum: str

    def trajectories(self) -> tuple[Trajectories, list[TeacherScores]]:
        """What the file holds, in the order of the update. CampaignError: it is not what was written."""
        return _from_table(_table(self))


class Row(NamedTuple):
    """What the campaign knows of a trajectory that is recorded, beside its arrays."""

    number: int
    """Its number in the ledger."""
    place: int
    """Its place in the update."""
    domain: str | None
    """Its prompt's domain."""
    parts: dict[str, float]
    """Named parts of its reward."""


def shards_in(directory: Path) -> dict[int, list[Shard]]:
    """Update -> its shards, by their names; other files are left out."""
    found: dict[int, list[Shard]] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if match := SHARD_NAME.fullmatch(path.name):
            update, part, parts = (int(match[i]) for i in (1, 2, 3))
            found.setdefault(update, []).append(Shard(str(path), update, part, parts, match[4]))
    return dict(sorted(found.items()))


def fault_in(shards: Sequence[Shard]) -> str:
    """What is wrong with the shards of one update; "" if all are there once, and whole."""
    if [shard.part for shard in sorted(shards)] != list(range(shards[0].parts)) or len({s.parts for s in shards}) > 1:
        names = ", ".join(Path(shard.path).name for shard in shards)
        return f"parts are missing, or there twice: {names}"
    for shard in shards:
        if (found := _hash_of_file(Path(shard.path))) != shard.checksum:
            return f"{shard.path} is damaged: its checksum is {found}"
    return ""


def counts_of(shards: Iterable[Shard]) -> dict[str, list[Any]]:
    """COUNTS of an update's trajectories, in its order; `shard`: which holds each; and `parts`: the named parts of each reward.
    The arrays are not read.

    CampaignError: a file cannot be read.
    """
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {name: [] for name in (*COUNTS, "shard", "parts")}
    for shard in shards:
        try:
            parts = [name for name in parquet.read_schema(shard.path).names if name.startswith(PART)]
            table = parquet.read_table(shard.path, columns=[*COUNTS, *parts])
        except (OSError, ValueError) as error:
            raise CampaignError(f"{shard.path} cannot be read: {error}") from error
        for name in COUNTS:
            columns[name] += table.column(name).to_pylist()
        columns["shard"] += [shard] * len(table)
        for row in table.select(parts).to_pylist() if parts else [{}] * len(table):
            columns["parts"].append({name.removeprefix(PART): v for name, v in row.items() if v is not None})
    order = sorted(range(len(columns["row"])), key=lambda i: columns["row"][i])
    return {name: [values[i] for i in order] for name, values in columns.items()}


def rows_of(shard: Shard) -> int:
    """Trajectories in a file."""
    from pyarrow import parquet

    return parquet.ParquetFile(shard.path).metadata.num_rows


def write_shard(
    directory: Path,
    update: int,
    part: int,
    parts: int,
    written: Trajectories,
    batches: Sequence[TeacherScores],
    rows: Sequence[Row],
) -> Shard:
    """Writes these trajectories and their scores; replaces the same part of this update.

    rows: of each trajectory. batches: hold their scores, and perhaps others; of several from one teacher the last counts.
    After a crash the file is there, with its checksum, or not. OSError: it cannot be written.
    """
    from pyarrow import parquet

    sink = io.BytesIO()
    table = _to_table(update, written, batches, rows)
    # No dictionaries: floats repeat too rarely. The level costs a tenth of the time of higher ones, for nearly their size.
    parquet.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=False)
    content = sink.getbuffer()
    checksum = xxhash.xxh3_64_hexdigest(content)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"update_{update:08d}.{part}of{parts}.{checksum}.parquet"
    replace_content(path, content)
    for other in shards_in(directory).get(update, []):
        if other.part == part and other.path != str(path):
            Path(other.path).unlink(missing_ok=True)
    return Shard(str(path), update, part, parts, checksum)


def _hash_of_file(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while data := file.read(1 << 24):
            digest.update(data)
    return digest.hexdigest()


def _table(shard: Shard) -> Any:
    from pyarrow import BufferReader, parquet

    try:
        content = Path(shard.path).read_bytes()
    except OSError as error:
        raise CampaignError(f"{shard.path} cannot be read: {error.strerror}") from error
    if (found := xxhash.xxh3_64_hexdigest(content)) != shard.checksum:
        raise CampaignError(f"{shard.path} is damaged: its checksum is {found}")
    return parquet.read_table(BufferReader(content))


def _to_table(update: int, written: Trajectories, batches: Sequence[TeacherScores], rows: Sequence[Row]) -> Any:
    import pyarrow

    offsets = written.response_offsets
    per_token = _lister(offsets)
    teachers = _by_teacher(written, batches)
    missing = sum(
        (
            np.add.reduceat(np.append(scores.unknown, 0), offsets[:-1]) * (written.lengths > 0)
            for scores in teachers.values()
        ),
        np.zeros(len(written), np.int64),
    )
    columns: dict[str, Any] = {
        "update": np.full(len(written), update, np.int64),
        "row": np.array([row.place for row in rows], np.int64),
        "number": np.array([row.number for row in rows], np.int64),
        **{name: written.ids[:, i] for i, name in enumerate(("epoch", "prompt", "sample"))},
        "domain": pyarrow.array([row.domain for row in rows], pyarrow.string()),
        "prompt_length": np.diff(written.prompt_offsets),
        "length": written.lengths,
        "context": written.lengths - written.trained_lengths,
        "oldest_version": written.oldest_versions,
        "finish_reason": pyarrow.array([FINISH_REASONS[reason] for reason in written.finish_reasons], pyarrow.string()),
        "missing": missing.astype(np.int64),
        "prompt_tokens": _lister(written.prompt_offsets)(written.prompt_tokens),
        "response_tokens": per_token(written.response_tokens),
        "trained": per_token(written.trained),
        "behaviour_logprobs": per_token(written.behaviour_logprobs),
        "policy_versions": per_token(written.policy_versions),
    }
    if written.begins.size:
        columns["begins"] = per_token(written.begins)
    if written.unfiltered_logprobs.size:
        columns["unfiltered_logprobs"] = per_token(written.unfiltered_logprobs)
    if written.support_ids.size:
        columns["student_support_ids"] = per_token(written.support_ids)
    if written.rewards.size:
        columns["reward"] = written.rewards
    for name in sorted({name for row in rows for name in row.parts}):
        columns[f"{PART}{name}"] = pyarrow.array([row.parts.get(name) for row in rows], pyarrow.float64())
    for name, scores in teachers.items():
        columns |= {f"teacher.{name}.{field}": values for field, values in scores.columns().items()}
    return pyarrow.table(columns)


class _OfTeacher(NamedTuple):
    """The scores of one teacher for some of the B trajectories."""

    there: list[int | None]
    """[B] place among those that it has scored; None: it has not."""
    offsets: np.ndarray
    log_weights: np.ndarray
    fields: dict[str, np.ndarray]
    unknown: np.ndarray
    """[N] whether a trained token has no score from this teacher, which scored its trajectory."""

    def columns(self) -> dict[str, Any]:
        import pyarrow

        per_token, place = _lister(self.offsets), pyarrow.array(self.there, pyarrow.int64())
        found: dict[str, Any] = {name: per_token(values) for name, values in self.fields.items()}
        found["log_weight"] = pyarrow.array(self.log_weights)
        return {name: values if None not in self.there else values.take(place) for name, values in found.items()}


def _by_teacher(written: Trajectories, batches: Sequence[TeacherScores]) -> dict[str, _OfTeacher]:
    by_name: dict[str, list[TeacherScores]] = {}
    for batch in batches:
        by_name.setdefault(batch.teacher, []).append(batch)
    wanted, found = [tuple(row) for row in written.ids.tolist()], {}
    for name, of in sorted(by_name.items()):
        source_of = {tuple(row): i for i, row in enumerate(np.concatenate([b.ids for b in of]).tolist())}
        targets = [i for i, row in enumerate(wanted) if row in source_of]
        sources = np.array([source_of[wanted[i]] for i in targets], np.int64)
        offsets = offsets_of(np.concatenate([np.diff(b.response_offsets) for b in of]))
        fields = {
            field: ragged_rows(np.concatenate([getattr(b, field) for b in of]), offsets, sources)
            for field in ("logprobs", "support_ids", "support_logprobs", "hidden")
            if field == "logprobs" or getattr(of[0], field).shape[1]
        }
        places = {target: place for place, target in enumerate(targets)}
        tokens = ragged_rows(np.arange(len(written.response_tokens)), written.response_offsets, targets)
        unknown = np.zeros(len(written.response_tokens), np.int64)
        unknown[tokens] = np.isnan(fields["logprobs"]) & written.trained[tokens]
        own = np.concatenate([b.log_weights for b in of])[sources]
        found[name] = _OfTeacher(
            [places.get(i) for i in range(len(wanted))],
            offsets_of(np.diff(offsets)[sources]),
            own.astype(np.float32),
            fields,
            unknown,
        )
    return found


def _lister(offsets: np.ndarray) -> Callable[[np.ndarray], Any]:
    """Makes [N] or [N, K] a column of lists, or of lists of lists of K."""
    import pyarrow

    def column(values: np.ndarray) -> Any:
        flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
        if values.ndim == 2:
            flat = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        return pyarrow.ListArray.from_arrays(pyarrow.array(offsets.astype(np.int32)), flat)

    return column


def _from_table(table: Any) -> tuple[Trajectories, list[TeacherScores]]:
    order = np.argsort(table.column("row").to_numpy(), kind="stable")
    table = table.take(order)
    names = set(table.column_names)

    def whole(name: str) -> Any:
        return table.column(name).combine_chunks()

    ids = np.stack([table.column(name).to_numpy() for name in ("epoch", "prompt", "sample")], axis=1).astype(np.int64)
    reasons = [FINISH_REASONS.index(reason) for reason in table.column("finish_reason").to_pylist()]
    response, offsets = _ragged(whole("response_tokens"))
    prompt, prompt_offsets = _ragged(whole("prompt_tokens"))
    more: dict[str, np.ndarray] = {}
    if "begins" in names:
        more["begins"] = _ragged(whole("begins"))[0]
    if "unfiltered_logprobs" in names:
        more["unfiltered_logprobs"] = _ragged(whole("unfiltered_logprobs"))[0]
    if "student_support_ids" in names:
        more["support_ids"] = _ragged(whole("student_support_ids"))[0]
    if "reward" in names:
        more["rewards"] = table.column("reward").to_numpy().astype(np.float32)
    written = Trajectories(
        ids=ids,
        prompt_tokens=prompt,
        prompt_offsets=prompt_offsets,
        response_tokens=response,
        response_offsets=offsets,
        behaviour_logprobs=_ragged(whole("behaviour_logprobs"))[0],
        policy_versions=_ragged(whole("policy_versions"))[0],
        trained=_ragged(whole("trained"))[0],
        finish_reasons=np.array(reasons, np.uint8),
        **more,
    )
    teachers = sorted(
        {name.removeprefix("teacher.").rpartition(".")[0] for name in names if name.startswith("teacher.")}
    )
    return written, [_scores(table, teacher, ids) for teacher in teachers]


def _scores(table: Any, teacher: str, ids: np.ndarray) -> TeacherScores:
    weights = table.column(f"teacher.{teacher}.log_weight").combine_chunks()
    there = np.flatnonzero(weights.is_valid().to_numpy(zero_copy_only=False))
    table = table.take(there)

    def field(name: str, empty: Any) -> np.ndarray:
        column = f"teacher.{teacher}.{name}"
        return _ragged(table.column(column).combine_chunks())[0] if column in table.column_names else empty

    logprobs, offsets = _ragged(table.column(f"teacher.{teacher}.logprobs").combine_chunks())
    return TeacherScores(
        ids=ids[there],
        response_offsets=offsets,
        logprobs=logprobs,
        teacher=teacher,
        log_weights=table.column(f"teacher.{teacher}.log_weight").to_numpy().astype(np.float32),
        support_ids=field("support_ids", np.zeros((len(logprobs), 0), np.int32)),
        support_logprobs=field("support_logprobs", np.zeros((len(logprobs), 0), np.float32)),
        hidden=field("hidden", np.zeros((0, 0), np.uint16)),
    )


def _ragged(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """([N] or [N, K] values, [B + 1] offsets) of a column of lists."""
    from pyarrow import compute

    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    values = column.flatten()
    if hasattr(values.type, "list_size"):
        width = values.type.list_size
        return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width), offsets_of(lengths)
    return values.to_numpy(zero_copy_only=False), offsets_of(lengths)


def opened(batches: Iterable[Any]) -> list[Any]:
    """Trajectories and scores, with what recorded shards among them hold in their place."""
    found: list[Any] = []
    for batch in batches:
        if isinstance(batch, Shard):
            written, scores = batch.trajectories()
            found += [written, *scores]
        else:
            found.append(batch)
    return found
