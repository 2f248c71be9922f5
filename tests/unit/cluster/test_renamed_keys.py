"""Keys of earlier releases are taken over under their names of today."""

from pathlib import Path

import pytest

from actors.errors import UserError
from cluster import config_file, renamed_keys
from cluster.config_file import CARRIED, load_config
from cluster.renamed_keys import RENAMED, SCHEMA, Renamed, carried_over
from cluster.state.changes import is_key
from tests.unit.cluster.test_config import GOOD, written

TABLE = (
    Renamed(SCHEMA + 1, "teachers.*.server", "teachers.*.urls"),
    Renamed(SCHEMA + 1, "learner.flash", None, "it is always on"),
    Renamed(2, "rollout.count", "rollout.replicas"),
)


def test_keys_are_renamed_removed_and_told_and_a_new_name_wins() -> None:
    content = {
        "teachers": {"a": {"server": ["x"]}, "b": {"server": ["y"], "urls": ["z"]}, "c": {}},
        "learner": {"flash": True, "replicas": 2},
        "rollout": {"count": 3},
    }
    lines = carried_over(content, SCHEMA, TABLE)
    assert content == {
        "teachers": {"a": {"urls": ["x"]}, "b": {"urls": ["z"]}, "c": {}},
        "learner": {"replicas": 2},
        "rollout": {"count": 3},  # a file of schema 2 has it for something else
    }
    assert lines == [
        "teachers.a.server is teachers.*.urls now",
        "teachers.b.server is teachers.*.urls now",
        "learner.flash exists no more: it is always on",
    ]


def test_every_row_leads_to_a_key_of_today_and_none_hides_one() -> None:
    for row in RENAMED:
        assert row.schema <= SCHEMA and not is_key(row.old.replace("*", "x"))
        assert row.new is None or (is_key(row.new.replace("*", "x")) and row.new.count("*") == row.old.count("*"))


def test_a_file_of_an_earlier_release_loads_and_an_override_is_told_the_name_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = (Renamed(SCHEMA + 1, "rollout.actors", "rollout.replicas"),)
    monkeypatch.setattr(config_file, "carried_over", lambda raw, schema: carried_over(raw, schema, row))
    monkeypatch.setattr(config_file, "renamed", lambda key: renamed_keys.renamed(key, row))
    config = load_config(written(tmp_path, GOOD + "rollout: {actors: 3}\n"))
    assert config.rollout.replicas == 3
    assert getattr(config, CARRIED) == ["rollout.actors is rollout.replicas now"]
    with pytest.raises(UserError, match=r"rollout\.actors=3.*is rollout\.replicas now"):
        load_config(written(tmp_path), ["rollout.actors=3"])
