"""A record of trained trajectories as a whole: what it is of, whether all of it is there, and whether a campaign may replay it.

<run directory>/record/record.json            of which student, teachers and sampling (`Origin`)
<run directory>/record/update_*.parquet       the shards (actors/data/trajectory_shards.py)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import xxhash

from actors.data.messages import in_json
from actors.data.trajectory_shards import Shard, counts_of, fault_in, rows_of, shards_in
from actors.errors import UserError
from actors.json_files import DamagedError, read_json
from cluster.config import CampaignConfig
from cluster.records.writer import LEDGER_FILE, ORIGIN_FILE, RECORD_DIRECTORY, read_jsonl, write_atomically
from cluster.state.changes import is_below
from cluster.state.same_inputs import Fingerprints
from learner.objective.estimator_table import estimator_row

FORMAT = 1
SIGNAL = ("signal", "top_k", "temperature", "prompt_template", "domains", "weight")
"""Settings of a teacher that its scores depend on, beside its model and tokenizer."""
SAMPLING = ("temperature", "top_p", "top_k")
"""Settings that the recorded log-probs depend on."""
NAMES = {str: "text", int: "whole number", bool: "true or false", dict: "object"}
KEY, STUDENT = "replay", "student.model"
VOCABULARY = f"{STUDENT} (its vocabulary)"


@dataclass(frozen=True)
class Origin:
    """What a record is of. Two with the same fields can be replayed by the same campaign."""

    tokenizer: str
    """Fingerprint of the student's vocabulary."""
    student: str
    """Fingerprint of the student that the campaign began with."""
    teachers: dict[str, dict[str, Any]]
    """Name -> its settings (SIGNAL), and the fingerprints of its model and tokenizer, as far as they are known."""
    sampling: dict[str, Any]
    trajectories_per_update: int
    samples_per_prompt: int
    written_by: str
    """Who wrote the responses: "student", "teacher", or "file" (`understudy score`)."""
    rewards: bool = False
    """Whether they have rewards."""
    input: str = ""
    """Fingerprint of the file, for "file"."""
    models: dict[str, str] = field(default_factory=dict)
    """Configuration key of a model or tokenizer -> its path or name, for messages."""
    format: int = field(default=FORMAT)

    @classmethod
    def of(cls, config: CampaignConfig, inputs: Fingerprints, tokenizer: Any) -> "Origin":
        """Of a campaign. inputs: its fingerprints. tokenizer: the student's."""
        return cls(
            tokenizer=tokenizer_fingerprint(tokenizer),
            student=inputs[STUDENT]["fingerprint"],
            teachers={name: _teacher(config, name, inputs) for name in sorted(config.teachers)},
            sampling={name: getattr(config.sampling, name) for name in SAMPLING},
            trajectories_per_update=config.trajectories_per_update,
            samples_per_prompt=config.pipeline.samples_per_prompt,
            written_by=estimator_row(config.learner.objective.estimator).text_by,
            rewards=config.gives_rewards,
            models={key: its["path"] for key, its in inputs.items() if key == STUDENT or key.startswith("teachers.")},
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of a vocabulary: tokens and their ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return xxhash.xxh3_128_hexdigest(json.dumps(vocabulary).encode())


def _teacher(config: CampaignConfig, name: str, inputs: Fingerprints) -> dict[str, Any]:
    teacher = config.teachers[name]
    found = {key: getattr(teacher, key) for key in SIGNAL}
    found["temperature"] = config.sampling.temperature if teacher.temperature is None else teacher.temperature
    if "topk" not in teacher.signal:
        found["top_k"] = None
    for key in ("model", "tokenizer"):
        of = inputs.get(f"teachers.{name}.{key}")
        found[key] = None if of is None else of["fingerprint"]
    return found


def begin(config: CampaignConfig, inputs: Fingerprints, tokenizer: Any, step: int) -> None:
    """Begins the record of a campaign, or goes on with it, after update `step`.

    UserError: updates before are not recorded, or the record is of something else. OSError: it cannot be written.
    """
    directory, origin = config.run_dir / RECORD_DIRECTORY, Origin.of(config, inputs, tokenizer)
    there = shards_in(directory) if step else {}
    if lacking := [update for update in range(1, step + 1) if update not in there]:
        found = f"true from update {step + 1} on, and no record of update {lacking[0]}"
        raise UserError("record", found, "false, or a new campaign: a record is replayed from its first update")
    if step and (other := _difference(read_origin(directory), origin, free=())):
        found = f"true, and {other.key} is now {other.now} where updates up to {step} were recorded with {other.before}"
        raise UserError("record", found, "false, or the same setting: a record is of one student and its teachers")
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / ORIGIN_FILE, json.dumps(asdict(origin), indent=1) + "\n")


def read_origin(directory: Path) -> Origin:
    """UserError: the file is missing, damaged, or of a later format."""
    path = directory / ORIGIN_FILE
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise UserError(
            str(path), "nothing", "the file that a campaign with record: true writes beside its shards"
        ) from error
    except DamagedError as error:
        raise UserError(str(path), f"a damaged file ({error})", "the file as the campaign wrote it") from error
    release = content.get("format") if isinstance(content, dict) else None
    if type(release) is int and release > FORMAT:
        raise UserError(str(path), f"format {release}", f"at most {FORMAT}: a newer release wrote it")
    if fault := _fault(content):
        raise UserError(str(path), f"a damaged file ({fault})", "the file as the campaign wrote it")
    return Origin(**content)


def _fault(content: Any) -> str:
    """What is wrong with the content of an ORIGIN_FILE, in words; "" if it is an Origin."""
    if not isinstance(content, dict):
        return "it holds no JSON object"
    known = {item.name: item for item in fields(Origin)}
    if other := next((name for name in content if name not in known), None):
        return f"it has the key {other!r}, which no record has"
    for name, item in known.items():
        kind: Any = get_origin(item.type) or item.type
        if name not in content:
            if item.default is MISSING and item.default_factory is MISSING:
                return f"it has no {name}"
        elif type(content[name]) is not kind:
            return f"{name} is {in_json(content[name])}, which is no {NAMES[kind]}"
    wrong = next((name for name, its in content["teachers"].items() if not isinstance(its, dict)), None)
    return "" if wrong is None else f"teachers.{wrong} is {in_json(content['teachers'][wrong])}, which is no object"


@dataclass(frozen=True)
class Record:
    """A record that is whole."""

    directory: Path
    origin: Origin
    shards: dict[int, list[Shard]]
    """Update -> its shards; from 1 on, without gaps."""

    @property
    def updates(self) -> int:
        """Number of recorded updates."""
        return len(self.shards)

    @property
    def by_student(self) -> bool:
        """Whether this student has written the responses, and so their versions and log-probs are of its policy."""
        return self.origin.written_by == "student"

    @property
    def fingerprint(self) -> str:
        """Of what is recorded: the names of shards hold their checksums."""
        names = sorted(Path(shard.path).name for shards in self.shards.values() for shard in shards)
        return xxhash.xxh3_128_hexdigest("\n".join(names).encode())


def record_directory(path: str) -> Path:
    """The directory of shards that `replay` names: a run directory stands for its record. UserError: there is none."""
    given = Path(path).expanduser().resolve()
    for directory in (given / RECORD_DIRECTORY, given):
        if shards_in(directory) or (directory / ORIGIN_FILE).exists():
            return directory
    found = f"{path}, {'which holds no record' if given.is_dir() else 'which is no directory'}"
    raise UserError(KEY, found, "the directory of a run with record: true, or its record directory")


def opened(path: str, *, rest: bool = False) -> Record:
    """A record, after all its shards have been read for their checksums. UserError: one is missing or damaged.

    rest: with the rest of a file that fills no update.
    """
    directory = record_directory(path)
    origin, shards = read_origin(directory), shards_in(directory)
    ledger = read_jsonl(directory.parent / LEDGER_FILE) if directory.name == RECORD_DIRECTORY else []
    trained = {row["step"]: row["trained"] for row in ledger if "trained" in row}
    if trained:  # one that the campaign was killed in does not count
        shards = {update: of for update, of in shards.items() if update <= max(trained)}
    if not shards:
        raise UserError(KEY, f"{directory}, which holds no update", "the record of a campaign that has taken one")
    last = max(shards)
    if lacking := [update for update in range(1, last + 1) if update not in shards]:
        raise UserError(KEY, f"{directory} without update {lacking[0]} of {last}", "all shards from update 1 on")
    for update, of in shards.items():
        if fault := fault_in(of):
            raise UserError(KEY, f"update {update}: {fault}", "the shards as they were written")
    _compare_with_ledger(directory, shards, trained)
    size = origin.trajectories_per_update
    counts = {update: sum(rows_of(shard) for shard in of) for update, of in shards.items()}
    if origin.written_by == "file" and counts[last] < size and (last > 1 or rest):
        if not rest:
            del shards[last]
    elif wrong := [update for update, count in counts.items() if count != size]:
        found = f"{directory}, whose update {wrong[0]} has {counts[wrong[0]]} trajectories"
        raise UserError(KEY, found, f"{size} in each ({ORIGIN_FILE})")
    return Record(directory, origin, shards)


def _compare_with_ledger(
    directory: Path, shards: Mapping[int, list[Shard]], trained: Mapping[int, list[list[int]]]
) -> None:
    """UserError: other trajectories are recorded than the ledger of the campaign has as trained: update -> ranges of numbers."""
    for update, spans in trained.items():
        if update not in shards:
            raise UserError(KEY, f"{directory} without update {update}, which {LEDGER_FILE} has", "all shards")
        wanted = [number for a, b in spans for number in range(a, b)]
        recorded = sorted(counts_of(shards[update])["number"])
        if recorded != wanted:
            odd = sorted(set(wanted) ^ set(recorded))[:1] or ["one of them twice"]
            found = f"update {update} of {directory}, which differs from {LEDGER_FILE} at trajectory {odd[0]}"
            raise UserError(KEY, found, "the trajectories that were trained on")


def demand_fit(config: CampaignConfig, record: Record, origin: Origin) -> None:
    """UserError: this campaign cannot train on the record. origin: of the campaign itself."""
    free = (STUDENT, "pipeline.samples_per_prompt", "sampling") if not record.by_student else ()
    if other := _difference(record.origin, origin, free):
        raise UserError(other.key, other.now, f"{other.before}, as in {record.directory}")
    if config.gives_rewards and not record.origin.rewards:
        raise UserError(
            KEY, f"{record.directory}, which has no rewards", "a record with rewards, which this objective needs"
        )
    _demand_policy(config, record)
    if record.by_student:
        _demand_staleness(config, record)


def _demand_policy(config: CampaignConfig, record: Record) -> None:
    """UserError: the objective needs the policy that wrote the responses, which the record does not have; or weights that are off."""
    objective = config.learner.objective
    row, correction = estimator_row(objective.estimator), objective.mismatch.correction
    copies = row.text_by == "teacher" or not row.samples_action
    key = "learner.objective"
    if not record.by_student:
        if not copies:
            found = f"{objective.estimator}, and responses that no policy of this student wrote ({record.directory})"
            raise UserError(
                f"{key}.estimator", found, "full or sft, which need no log-probs of the policy that wrote them"
            )
        region = objective.trust_region
        for name, value, off in (
            ("mismatch.correction", correction, "none"),
            ("trust_region.beta", region.beta, 0),
            ("trust_region.target_kl", region.target_kl, None),
            ("trust_region.max_kl", region.max_kl, None),
        ):
            if value != off:
                raise UserError(f"{key}.{name}", value, f"{off or 0}: the policy that wrote the responses is not known")
    elif config.pipeline.updates > record.updates and not copies and correction == "none":
        found = f"none, with {config.pipeline.updates} updates from a record of {record.updates}"
        expected = "truncate or mask: from the second epoch on the student is another policy than the recorded one"
        raise UserError(f"{key}.mismatch.correction", found, expected)


def _demand_staleness(config: CampaignConfig, record: Record) -> None:
    """UserError: tokens would be trained on at a staleness above `pipeline.max_staleness`."""
    bound, updates = config.pipeline.max_staleness, config.pipeline.updates
    most = max(stalenesses(record, updates))
    if most > bound:
        found = f"{bound}, and a replay of {updates} updates from {record.updates} trains tokens that are {most} updates old"
        raise UserError("pipeline.max_staleness", found, f"at least {most}: it bounds recorded tokens too")


def stalenesses(record: Record, updates: int) -> list[int]:
    """The largest staleness of each update of a replay."""
    oldest = {update: min(counts_of(shards)["oldest_version"]) for update, shards in record.shards.items()}
    return [max(step - oldest[step % record.updates + 1], 0) for step in range(updates)]


class Difference(NamedTuple):
    """A setting in which a record and a campaign differ."""

    key: str
    before: Any
    now: Any


def _difference(before: Origin, now: Origin, free: Sequence[str]) -> Difference | None:
    """The first difference; None: there is none. free: keys and sections that may differ.

    A fingerprint that one side does not have is not compared: a replay needs no teacher's files.
    """
    then, here = _settings(before), _settings(now)
    for key in (*then, *(key for key in here if key not in then)):
        a, b = then.get(key), here.get(key)
        of_files = key.rpartition(".")[2] in ("model", "tokenizer")
        if a == b or is_below(key, free) or (of_files and None in (a, b)):
            continue
        if not of_files and key != VOCABULARY:
            return Difference(key, a, b)
        named = STUDENT if key == VOCABULARY else key
        what = "vocabulary" if key == VOCABULARY else "files"
        old, new = (its.models.get(named, "the model") for its in (before, now))
        return Difference(
            named, f"the {what} of {old}", f"{new}, whose {what} {'is' if what == 'vocabulary' else 'are'} not the same"
        )
    return None


def _settings(origin: Origin) -> dict[str, Any]:
    """Configuration key -> value or fingerprint, of what must be the same."""
    found: dict[str, Any] = {VOCABULARY: origin.tokenizer, STUDENT: origin.student}
    found |= {f"sampling.{name}": value for name, value in origin.sampling.items()}
    found["pipeline.samples_per_prompt"] = origin.samples_per_prompt
    found["pipeline.prompts_per_update x samples_per_prompt"] = origin.trajectories_per_update
    found["teachers"] = ", ".join(origin.teachers)
    for teacher, settings in origin.teachers.items():
        found |= {f"teachers.{teacher}.{name}": value for name, value in settings.items()}
    return found


def replayed(
    config: CampaignConfig, inputs: Fingerprints, tokenizer: Any, on_event: Callable[..., None]
) -> Record | None:
    """The record that a campaign replays; None: it replays none. Adds the record's fingerprint to `inputs`.

    UserError: see `opened` and `demand_fit`.
    """
    if config.replay is None:
        return None
    record, origin = opened(config.replay), Origin.of(config, inputs, tokenizer)
    demand_fit(config, record, origin)
    inputs[KEY] = {"path": config.replay, "fingerprint": record.fingerprint}
    unknown = [name for name, its in origin.teachers.items() if its["model"] is None]
    epochs = f"{config.pipeline.updates / record.updates:.3g}"
    told = f"; the files of teachers.{', '.join(unknown)} are not here to be compared" if unknown else ""
    on_event("replays", path=str(record.directory), updates=record.updates, epochs=epochs, cause=told)
    return record
