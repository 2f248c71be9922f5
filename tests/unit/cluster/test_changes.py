"""What may change when a campaign goes on: every key has a class, and each class does what its name says."""

from pathlib import Path

import pytest

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import _leaves, load_config
from cluster.state.changes import changes, class_of, is_key, keys_of
from tests.unit.cluster.test_config import GOOD, written


def config(folder: Path, *overrides: str) -> CampaignConfig:
    return load_config(written(folder), overrides)


def test_every_key_of_the_configuration_has_a_class() -> None:
    """A new key: `setting(default, CHANGE)` or `number(..., change=CHANGE)`, see `Change` in actors/config.py."""
    without = [key for key, change in keys_of() if change is None]
    assert not without, f"no class of change in the metadata of {', '.join(without)}"
    assert {change for _, change in keys_of()} == {"free", "same contents", "on request", "never"}


def test_every_leaf_of_a_configuration_is_found_by_its_name(tmp_path: Path) -> None:
    loaded = config(tmp_path, "student.lora={rank: 8}", "evaluation.prompts.path=h", "guards.mine.metric=reverse_kl",
                    "guards.mine.above=3", "environment.name=game:Game")  # fmt: skip
    for key, _ in _leaves(loaded):
        class_of(key, loaded)
    assert class_of("guards.mine.above", loaded) == "on request"
    assert class_of("evaluation.prompts.prompt_field", loaded) == "free"
    assert class_of("prompts.prompt_field", loaded) == "on request"
    assert is_key("teachers.any.model") and is_key("learner.optimizer") and is_key("guards")
    assert not is_key("learner.optimiser") and not is_key("prompt")


def test_rewards_are_on_request_where_training_uses_them(tmp_path: Path) -> None:
    measured = config(tmp_path)
    rewarded = config(tmp_path, "learner.objective.reward_weight=1", "pipeline.samples_per_prompt=2")
    assert [class_of("evaluation.verifier.name", one) for one in (measured, rewarded)] == ["free", "on request"]


def test_what_is_on_request_is_refused_with_the_option_that_allows_it_and_a_section_allows_all_below(
    tmp_path: Path,
) -> None:
    before, after = config(tmp_path), config(tmp_path, "learner.optimizer.learning_rate=1e-4", "rollout.replicas=2")
    with pytest.raises(
        UserError, match=r"=1e-06 where .* 0\.0001, expected .*--allow-change learner\.optimizer\.learn"
    ):
        changes(before, after, [])
    for allowed in ("learner.optimizer.learning_rate", "learner.optimizer", "learner"):
        found = changes(before, after, [allowed])
        assert [(one.key, one.change) for one in found] == [
            ("learner.optimizer.learning_rate", "on request"),
            ("rollout.replicas", "free"),
        ]


def test_what_never_changes_says_how_a_new_campaign_begins_from_the_checkpoint(tmp_path: Path) -> None:
    before = config(tmp_path, f"output_dir={tmp_path}")
    after = config(tmp_path, f"output_dir={tmp_path}", "seed=7")
    (tmp_path / "here" / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        changes(before, after, ["seed"])
    line = str(caught.value)
    assert f"student.model={tmp_path}/here/checkpoints/step_00000004 student.optimizer=keep" in line
    assert "--allow-change" not in line


def test_another_teacher_is_on_request(tmp_path: Path) -> None:
    both = ["teachers.default.domains=[a]", "prompts.domain_field=domain"]
    before = config(tmp_path, *both)
    after = config(tmp_path, *both, "teachers.second.model=x", "teachers.second.signal=full")
    with pytest.raises(UserError, match=r"--allow-change teachers\.second\.signal"):
        changes(before, after, [])
    assert {one.key.split(".")[1] for one in changes(before, after, ["teachers.second"])} == {"second"}
    assert GOOD.count("teachers") == 1
