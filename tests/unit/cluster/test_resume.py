"""A campaign that is killed at any moment and resumed equals an undisturbed one; short form of benchmarks/resume.py."""

import json
import random
import shutil
from pathlib import Path

import pytest

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.preflight import checks
from cluster.records.writer import RunRecords, read_jsonl
from cluster.run import run_campaign
from cluster.state.resume import refuse_output, take_up
from tests.light_campaign import (
    assert_ledger_adds_up,
    configuration,
    fingerprint,
    finish,
    make_folder,
    run_with_kills,
    start,
    without_times,
)
from tests.light_engine import BACKEND

EARLIER_RELEASE = Path(__file__).parents[2] / "data" / "run_of_0_1"
"""A run directory that was written by release 0.1, see its README."""
OF_BYTES = ("metrics.jsonl", "campaign.json")
"""Files whose content includes the number of bytes that travelled."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("light"))


def test_killed_at_random_moments_equals_undisturbed_bit_for_bit(folder: Path) -> None:
    calm, stormy = (configuration(folder, name) for name in ("calm", "stormy"))
    finish(start(calm), calm)
    assert run_with_kills(stormy, 4, random.Random(0)) == 4
    undisturbed, disturbed = (fingerprint(folder / "runs" / name) for name in ("calm", "stormy"))
    assert disturbed == undisturbed
    assert sum(name.endswith("optimizer.safetensors") for name in undisturbed) == 6
    assert_ledger_adds_up(folder / "runs" / "stormy", updates=12, size=8, max_staleness=0)
    ours, theirs = (json.loads((folder / "runs" / name / "summary.json").read_text()) for name in ("calm", "stormy"))
    assert {key: ours[key] for key in ours if "accuracy" in key} == {
        key: theirs[key] for key in ours if "accuracy" in key
    }


def test_weights_that_travel_as_deltas_make_the_same_campaign_bit_for_bit(folder: Path) -> None:
    ways = {
        "whole": {"encoding": "dense"},
        "changed": {"encoding": "delta", "anchor_every": 5},
    }
    found = {}
    for name, weights in ways.items():
        optimizer = {"compute_dtype": "float32", "optimizer": {"learning_rate": 1e-5}}
        config = configuration(folder, name, weights=weights, learner=optimizer)
        finish(start(config), config)
        rows = read_jsonl(folder / "runs" / name / "metrics.jsonl")
        found[name] = fingerprint(folder / "runs" / name), [row.pop("publish_bytes", 0) for row in rows]
    whole, changed = (found[name][1][1:] for name in ways)
    assert [small < 0.8 * big for small, big in zip(changed, whole, strict=True)] == [n % 5 != 0 for n in range(1, 13)]
    left, right = ({k: v for k, v in found[name][0].items() if not k.endswith(OF_BYTES)} for name in ways)
    assert left == right and any(name.endswith("optimizer.safetensors") for name in left)


def test_an_evaluation_after_the_last_checkpoint_is_not_forgotten(folder: Path) -> None:
    config = configuration(folder, "evaluated", pipeline={"updates": 4})
    finish(start(config), config)
    run_dir = folder / "runs" / "evaluated"
    before = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").unlink()  # as if it had been killed just before it was written
    finish(start(config), config)
    after = json.loads((run_dir / "summary.json").read_text())
    assert {key: before[key] for key in before if key.endswith("_end")} == {
        key: after[key] for key in before if key.endswith("_end")
    }
    assert before["reverse_kl_end"] is not None


def test_each_sample_is_trained_once_in_an_asynchronous_campaign_that_is_killed(folder: Path) -> None:
    config = configuration(folder, "ahead", pipeline={"max_staleness": 1})
    assert run_with_kills(config, 4, random.Random(1)) == 4
    assert_ledger_adds_up(folder / "runs" / "ahead", updates=12, size=8, max_staleness=1)


def test_a_campaign_that_has_ended_and_is_given_more_updates_equals_one_that_had_them_at_once(folder: Path) -> None:
    calm, more = (configuration(folder, name, pipeline={"updates": 6}) for name in ("at-once", "more"))
    finish(start(calm), calm)
    configuration(folder, "more", pipeline={"updates": 4})
    finish(start(more), more)
    configuration(folder, "more", pipeline={"updates": 6})
    finish(start(more), more)
    undisturbed, continued = (fingerprint(folder / "runs" / name) for name in ("at-once", "more"))
    model = "checkpoints/step_00000006/model.safetensors"
    assert model in undisturbed and {name for name in undisturbed if undisturbed[name] != continued[name]} == set()
    assert_ledger_adds_up(folder / "runs" / "more", updates=6, size=8, max_staleness=0)


def test_a_ledger_that_is_not_the_checkpoints_is_refused(folder: Path) -> None:
    config = configuration(folder, "tampered", pipeline={"updates": 2})
    finish(start(config), config)
    path = folder / "runs" / "tampered" / "ledger.jsonl"
    whole = path.read_text()
    for content in ("", whole.splitlines()[0] + "\n", whole + whole):
        path.write_text(content)
        with pytest.raises(UserError, match=r"ledger.jsonl: found .* expected the file as the campaign left it"):
            take_up(load_config(config), RunRecords(path.parent))


def test_a_run_directory_of_an_earlier_release_ends_as_if_that_release_had_run_it_to_the_end(folder: Path) -> None:
    shutil.copytree(EARLIER_RELEASE / "stopped", folder / "runs" / "stopped")
    shutil.rmtree(folder / "teacher")  # models made today may have other random weights
    shutil.copytree(EARLIER_RELEASE / "teacher", folder / "teacher")
    run_dir = folder / "runs" / "stopped"
    config = folder / "stopped.yaml"
    text = (run_dir / "config.yaml").read_text().replace("FOLDER", str(folder))
    config.write_text(text.replace("\nrollout:\n", f"\nrollout:\n  backend: {BACKEND}\n"))
    (run_dir / "config.yaml").write_text(config.read_text())
    finish(start(config), config)
    kinds = [row["kind"] for row in read_jsonl(run_dir / "events.jsonl")]
    assert kinds.count("started") == kinds.count("resumed") == 1 and kinds[-1] == "finished"
    assert read_jsonl(run_dir / "ledger.jsonl") == read_jsonl(EARLIER_RELEASE / "uninterrupted" / "ledger.jsonl")
    then = without_times(read_jsonl(EARLIER_RELEASE / "uninterrupted" / "metrics.jsonl"))
    now = without_times(read_jsonl(run_dir / "metrics.jsonl"))
    assert [row["step"] for row in now] == list(range(9))
    for expected, found in zip(then, now, strict=True):
        for key in expected:  # another processor rounds otherwise; today's rows may have more keys
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_an_output_directory_that_cannot_be_made_is_known_to_check_which_makes_none(tmp_path: Path) -> None:
    refuse_output(CampaignConfig(name="a", output_dir=str(tmp_path / "new" / "runs")))
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").write_text("")
    for inner in ("taken", "taken/deeper"):
        with pytest.raises(UserError, match=r"^output_dir: found .*taken: Not a directory\)"):
            refuse_output(CampaignConfig(name="a", output_dir=str(tmp_path / inner)))
    config = CampaignConfig(name="taken", output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"^output_dir: "):
        next(checks(config, offline=False))


def test_a_finished_campaign_says_that_nothing_was_done_and_refuses_changes_without_effect(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = configuration(folder, "over", pipeline={"updates": 2}, evaluation={"every_updates": 2})
    finish(start(file), file)
    same = load_config(file)
    before = (same.run_dir / "config.yaml").read_bytes()
    assert run_campaign(same)[1]
    assert "had finished; nothing was done" in capsys.readouterr().err
    for override, allowed in (
        ("learner.optimizer.learning_rate=0.01", ["learner.optimizer.learning_rate"]),
        ("rollout.replicas=1", []),
        ("pipeline.updates=1", []),
    ):
        key = override.partition("=")[0]
        with pytest.raises(UserError, match=rf"no effect of another {key}, expected a larger pipeline\.updates"):
            run_campaign(load_config(file, [override]), allow_change=allowed)
    assert (same.run_dir / "config.yaml").read_bytes() == before
