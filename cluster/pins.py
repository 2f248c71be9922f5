"""Which commit each hub name of a campaign stands for: resolved when it begins, and kept by every resume.

The commits are in the run directory's config.yaml, under the `revision` of each model and data set. A resumed campaign takes
them from there, whatever the branches are by then, and asks no hub; another commit in the configuration is refused
(`state/resume.py`), as another model is.
"""

from collections.abc import Iterator
from typing import NamedTuple

from actors.config import SourceConfig, StudentConfig, TeacherConfig
from actors.data.hub import COMMIT, Kind, commit_of, offline
from actors.data.models import looks_local
from actors.errors import UserError
from actors.prompts.files import is_hub_dataset
from actors.teacher.backends import backend_of
from cluster.config import CampaignConfig, prompt_sources
from cluster.config_file import load_config
from cluster.records.reader import has_begun
from cluster.records.writer import CONFIG_FILE

ASKED = "_asked_revisions"
"""Attribute of a configuration that is pinned: key of a revision -> what the user's configuration has there."""


class Place(NamedTuple):
    """One model or data set of the configuration."""

    key: str
    """Of its name, for example "student.model"."""
    revision_key: str
    section: StudentConfig | TeacherConfig | SourceConfig
    field: str
    """Of the revision in the section."""
    name: str
    kind: Kind
    on_hub: bool


def places(config: CampaignConfig) -> Iterator[Place]:
    """All models and data sets that have a revision."""

    def model(where: str, section: StudentConfig | TeacherConfig, name: str, field: str = "model") -> Place:
        prefix = "" if field == "model" else f"{field}_"
        revision = f"{prefix}revision"
        return Place(f"{where}.{field}", f"{where}.{revision}", section, revision, name, "model", not looks_local(name))

    yield model("student", config.student, config.student.model)
    for name, teacher in config.teachers.items():
        where = f"teachers.{name}"
        place = model(where, teacher, teacher.model)
        yield place if backend_of(teacher, where).has_model_files else place._replace(on_hub=False)
        # One that is the model's is at the model's commit.
        if (own := teacher.tokenizer) and (teacher.tokenizer_revision or own != teacher.model or not place.on_hub):
            yield model(where, teacher, own, "tokenizer")
    for where, source in prompt_sources(config).items():
        if source.path is not None:
            repo, on_hub = source.path.partition(":")[0], is_hub_dataset(source.path)
            yield Place(f"{where}.path", f"{where}.revision", source, "revision", repo, "dataset", on_hub)


def refuse_revisions(config: CampaignConfig) -> None:
    """UserError: a revision of what has none."""
    for place in places(config):
        revision = getattr(place.section, place.field)
        if revision is not None and not place.on_hub:
            expected = "null: only names on a hub have revisions, and this is a path or a served model"
            raise UserError(place.revision_key, f"{revision}, of {place.name}", expected)
    for name, teacher in config.teachers.items():
        if teacher.tokenizer_revision is not None and teacher.tokenizer is None:
            expected = f"null, or the tokenizer that it is the revision of: teachers.{name}.tokenizer"
            raise UserError(f"teachers.{name}.tokenizer_revision", teacher.tokenizer_revision, expected)


def pin(config: CampaignConfig) -> str:
    """Puts the commit of every hub name into the configuration; returns what was found, "" where all is on disks.

    UserError: a hub that does not know a name or a revision, or does not answer; or a revision of what is no hub name.
    """
    refuse_revisions(config)
    asked = {place.revision_key: getattr(place.section, place.field) for place in places(config)}
    setattr(config, ASKED, asked)
    hold(config)
    told = []
    known: dict[tuple[str, str | None, Kind], str] = {}
    for place in places(config):
        revision, held = getattr(place.section, place.field), ""
        if not place.on_hub:
            continue
        if revision != asked[place.revision_key]:
            held = ", as when the campaign began"
        if place.kind == "dataset" and offline() and not COMMIT.fullmatch(revision or ""):
            # `datasets` then reads its own cache by the name alone; other contents are noticed by their fingerprint.
            told.append(f"{place.key} {place.name} is what the cache has (HF_HUB_OFFLINE is set)")
            continue
        which = (place.name, revision, place.kind)
        commit = known.get(which) or commit_of(place.name, revision, place.key, place.kind)
        known[which] = commit
        setattr(place.section, place.field, commit)
        branch = asked[place.revision_key]
        by = "" if branch == commit else f" ({branch or 'main'}{held})"
        told.append(f"{place.key} {place.name} is {commit[:12]}{by}")
    return "; ".join(told)


def hold(config: CampaignConfig) -> None:
    """Takes the commits from the run directory's config.yaml, where the user names none and the campaign has begun."""
    written = config.run_dir / CONFIG_FILE
    if not written.exists() or not has_begun(config.run_dir):
        return
    asked = getattr(config, ASKED, {})
    before = {place.revision_key: place for place in places(load_config(written, environment=False))}
    for place in places(config):
        then = before.get(place.revision_key)
        if then is None or then.name != place.name or COMMIT.fullmatch(asked.get(place.revision_key) or ""):
            continue
        commit = getattr(then.section, then.field)
        if commit is not None and COMMIT.fullmatch(commit):
            setattr(place.section, place.field, commit)
