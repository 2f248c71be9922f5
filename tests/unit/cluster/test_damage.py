"""A damaged checkpoint is told in one line, and the newest one that is whole is taken; whatever the damage."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.console.status import read_status
from cluster.records.reader import load_run
from cluster.records.writer import SUMMARY_KEYS, RunRecords, read_jsonl
from cluster.run import _summary
from cluster.state.resume import take_up
from cluster.state.soundness import newest_sound
from learner.student.checkpoint import checkpoint_steps
from learner.student.checksums import MANIFEST, damage, seal, with_checksum
from tests.light_campaign import configuration, fingerprint, finish, make_folder, start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a campaign with checkpoints of updates 2, 4 and 6, and another campaign like it."""
    folder = make_folder(tmp_path_factory.mktemp("light"))
    for name, seed in (("run", 0), ("other", 1)):
        config = configuration(folder, name, pipeline={"updates": 6}, evaluation={"prompts": None})
        config.write_text(config.read_text() + f"seed: {seed}\n")
        finish(start(config), config)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> tuple[CampaignConfig, Path]:
    """A copy of the run, and its newest checkpoint."""
    shutil.copytree(finished / "runs" / "run", tmp_path / "run")
    config = load_config(finished / "run.yaml")
    config.output_dir, config.name = str(tmp_path), "run"
    return config, tmp_path / "run" / "checkpoints" / "step_00000006"


def flip(file: Path, place: float = 0.5) -> None:
    """Changes one bit."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    file.write_bytes(content)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def set_format(checkpoint: Path, number: object) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "format": number}))


def other_campaign(checkpoint: Path, finished: Path) -> None:
    replace(checkpoint, lambda path: shutil.copytree(finished / "runs" / "other" / "checkpoints" / path.name, path))


def earlier_step(checkpoint: Path) -> None:
    replace(checkpoint, lambda path: shutil.copytree(path.with_name("step_00000004"), path))


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{
        f"a flipped bit in {name}": lambda c, name=name: flip(c / name)
        for name in (
            "model.safetensors",
            "training/optimizer.safetensors",
            "training/learner.json",
            "training/campaign.json",
            "training/checksums.json",
            "config.json",
            "tokenizer.json",
            "generation_config.json",
        )
    },
    "a flipped bit in a header": lambda c: flip(c / "model.safetensors", 0.001),
    "a flipped bit in the length of a header": lambda c: flip(c / "model.safetensors", 0.0),
    "a flipped bit at the end": lambda c: flip(c / "training/optimizer.safetensors", 1.0),
    "a truncated file": lambda c: os.truncate(c / "model.safetensors", 1000),
    "a longer file": lambda c: os.truncate(c / "model.safetensors", 10_000_000),
    "an empty file": lambda c: os.truncate(c / "training/optimizer.safetensors", 0),
    "an empty state": lambda c: os.truncate(c / "training/campaign.json", 0),
    "no weights": lambda c: (c / "model.safetensors").unlink(),
    "no moments": lambda c: (c / "training/optimizer.safetensors").unlink(),
    "no checksums": lambda c: (c / "training/checksums.json").unlink(),
    "no folder training": lambda c: shutil.rmtree(c / "training"),
    "an empty directory": lambda c: replace(c, lambda path: path.mkdir()),
    "torn JSON": lambda c: os.truncate(c / "training/campaign.json", 40),
    "JSON of another type": lambda c: (c / "training/campaign.json").write_text("[1]"),
    "a state of another shape": lambda c: (c / "training/campaign.json").write_text(with_checksum('{"step": "six"}')),
    "checksums of another type": lambda c: (c / "training/checksums.json").write_text('{"format": 1, "files": [3]}'),
    "learner.json of another type": lambda c: (c / "training/learner.json").write_text("null"),
    "a loop of links": lambda c: replace(c / "config.json", lambda path: path.symlink_to(path.name)),
    "a link to nothing": lambda c: replace(c / "model.safetensors", lambda path: path.symlink_to("gone")),
    "a directory that is a loop of links": lambda c: replace(c, lambda path: path.symlink_to(path.name)),
    "a directory in place of a file": lambda c: replace(c / "model.safetensors", lambda path: path.mkdir()),
    "a file in place of a directory": lambda c: replace(c, lambda path: path.write_text("x")),
    "weights that nobody wrote": lambda c: shutil.copy(c / "model.safetensors", c / "more.safetensors"),
    "the checkpoint of another step": earlier_step,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_next_older_one_is_used(
    kind: str, run: tuple[CampaignConfig, Path]
) -> None:
    config, newest = run
    DAMAGES[kind](newest)
    records = RunRecords(config.run_dir)
    state, checkpoint = take_up(config, records)
    assert state.step == 4 and checkpoint == newest.with_name("step_00000004")
    (event,) = [row for row in read_jsonl(config.run_dir / "events.jsonl") if row["kind"] == "damaged_checkpoint"]
    assert event["to_step"] == 4 and event["cause"] and "\n" not in event["cause"]
    assert event["path"].endswith("step_00000006.damaged") and checkpoint_steps(newest.parent) == [2, 4]
    assert take_up(config, records)[0].step == 4  # and it is told once


def test_the_checkpoint_of_another_campaign_is_not_taken_up(run: tuple[CampaignConfig, Path], finished: Path) -> None:
    config, newest = run
    content = json.loads((newest / "training" / "campaign.json").read_text())
    del content["checksum"]
    content["ledger"]["dropped"] = {"stale": 4}
    content["ledger"]["next_number"] += 4
    (newest / "training" / "campaign.json").write_text(with_checksum(json.dumps(content)))
    assert take_up(config, RunRecords(config.run_dir))[0].step == 4


def test_a_file_that_may_not_be_read_is_damage(
    run: tuple[CampaignConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, newest = run
    whole = Path.open

    def refuse(self: Path, *arguments: Any, **keywords: Any) -> Any:  # root may read every file
        if self == newest / "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    assert take_up(config, RunRecords(config.run_dir))[0].step == 4


def test_a_checkpoint_of_a_later_release_is_refused_and_not_replaced(run: tuple[CampaignConfig, Path]) -> None:
    config, newest = run
    set_format(newest, 2)
    with pytest.raises(UserError, match="found format 2, expected 1: a later release wrote this checkpoint"):
        take_up(config, RunRecords(config.run_dir))
    assert newest.is_dir()


def test_when_none_is_whole_the_campaign_does_not_begin_anew(run: tuple[CampaignConfig, Path]) -> None:
    config, newest = run
    for step in (2, 4, 6):
        flip(newest.with_name(f"step_{step:08d}") / "model.safetensors")
    with pytest.raises(
        UserError, match=r"step_00000006: found model.safetensors is damaged.*2 older ones are damaged too"
    ):
        take_up(config, RunRecords(config.run_dir))
    assert checkpoint_steps(newest.parent) == [2, 4, 6]


@pytest.mark.parametrize("name", ["4", "step_00000004", "{folder}/step_00000004", "{folder}/step_00000004/"])
def test_the_user_may_choose_the_checkpoint(name: str, run: tuple[CampaignConfig, Path]) -> None:
    config, newest = run
    records = RunRecords(config.run_dir)
    found = newest_sound(config, records.event, name.format(folder=newest.parent))
    assert found.state.step == 4 and checkpoint_steps(newest.parent) == [2, 4, 6]
    assert take_up(config, records, found=found)[0].step == 4
    assert [row["step"] for row in read_jsonl(config.run_dir / "undone.jsonl")] == [5, 6]
    assert checkpoint_steps(newest.parent) == [2, 4]
    (event,) = [row for row in read_jsonl(config.run_dir / "events.jsonl") if row["kind"] == "checkpoint_set_aside"]
    assert Path(event["path"]).is_dir()
    with pytest.raises(UserError, match=r"--resume-from: found 5, expected a checkpoint in .*, by its step: 2, 4"):
        newest_sound(config, RunRecords(config.run_dir).event, "5")
    flip(newest.with_name("step_00000002") / "config.json")
    with pytest.raises(UserError, match=r"config.json is damaged.* name another step"):
        newest_sound(config, RunRecords(config.run_dir).event, "2")


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    before = fingerprint(finished / "runs" / "run")
    flip(finished / "runs" / "run" / "checkpoints" / "step_00000006" / "model.safetensors", 0.7)
    finish(start(finished / "run.yaml"), finished / "run.yaml")
    shutil.rmtree(finished / "runs" / "run" / "checkpoints" / "step_00000006.damaged")
    assert fingerprint(finished / "runs" / "run") == before
    assert "is damaged, so the campaign continues after update 4" in (finished / "run.log").read_text()


def test_a_part_that_no_rank_wrote_is_no_checkpoint(tmp_path: Path) -> None:
    from actors.errors import CheckpointError
    from learner.student.checksums import hash_of, write_part

    (tmp_path / "training").mkdir()
    with pytest.raises(CheckpointError, match=r"the learner's files not in .*must see the same file system"):
        seal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abcdef")
    write_part(tmp_path, 0, {"model.safetensors": [(0, 2, hash_of(b"ab"))]})
    write_part(tmp_path, 1, {"model.safetensors": [(4, 2, hash_of(b"ef"))]})
    with pytest.raises(CheckpointError, match="nobody wrote the bytes from 2 to 4"):
        seal(tmp_path)
    write_part(tmp_path, 0, {"model.safetensors": [(0, 2, hash_of(b"ab")), (2, 2, hash_of(b"cX"))]})
    write_part(tmp_path, 1, {"model.safetensors": [(4, 2, hash_of(b"ef"))]})
    seal(tmp_path)
    told = damage(tmp_path)
    assert told is not None and told.startswith("model.safetensors is damaged: the checksum of the bytes from 2 on")


def put(file: Path, kind: str) -> None:
    """Damages one file, in a way that a reader must neither stumble over nor wait for."""
    content = file.read_bytes() if file.is_file() else b"{}"
    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    match kind:
        case "directory":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case _:
            kinds = {
                "empty": b"",
                "zeros": b"\0" * 99,
                "half": content[: len(content) // 2],
                "other bytes": b"\xff\xfe{",
            }
            file.write_bytes({**kinds, "deep": b"[" * 100_000 + b"\n", "list": b"[1]\n"}[kind])


KINDS = ("empty", "zeros", "half", "other bytes", "deep", "list", "directory", "pipe", "device")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_summary_keeps_no_campaign_from_going_on(
    kind: str, run: tuple[CampaignConfig, Path], capsys: pytest.CaptureFixture
) -> None:
    config, _ = run
    put(config.run_dir / "summary.json", kind)
    told: list[str] = []
    assert _summary(config.run_dir, lambda event, **_: told.append(event)) == {} and told == ["damaged_summary"]
    assert read_status(config.run_dir)["update"] == 6
    assert "summary.json is damaged (" in capsys.readouterr().err
    records = RunRecords(config.run_dir)
    assert take_up(config, records)[0].step == 6
    records.write_summary(dict.fromkeys(SUMMARY_KEYS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["checksums.json", "campaign.json", "learner.json"])
def test_a_file_of_a_checkpoint_is_neither_waited_for_nor_stumbled_over(
    name: str, kind: str, run: tuple[CampaignConfig, Path]
) -> None:
    config, newest = run
    put(newest / "training" / name, kind)
    newest.with_name("step_00000006.damaged").write_text("a file")
    newest.with_name("step_٠٠٠٠٠٠١٤").mkdir()
    assert take_up(config, RunRecords(config.run_dir))[0].step == 4


@pytest.mark.parametrize("kind", KINDS[3:])
@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl", "events.jsonl", "trajectories"])
def test_damaged_records_are_refused_in_one_line_before_anything_is_changed(
    name: str, kind: str, run: tuple[CampaignConfig, Path]
) -> None:
    config, newest = run
    if name == "trajectories" and kind == "directory":
        pytest.skip("it is one")
    put(config.run_dir / name, kind)
    if kind == "other bytes" and name != "trajectories":
        (config.run_dir / name).write_bytes(b"\xff\xfe{\n")
    with pytest.raises(UserError, match=f"{name}.*: found .*, expected "):
        newest_sound(config, RunRecords(config.run_dir).event)
    if name in ("metrics.jsonl", "events.jsonl"):
        with pytest.raises(UserError, match=f"{name}.*: found .*, expected "):
            read_status(config.run_dir)
    assert checkpoint_steps(newest.parent) == [2, 4, 6]


def test_a_ledger_that_was_cut_is_no_damage_of_the_checkpoints(run: tuple[CampaignConfig, Path]) -> None:
    config, newest = run
    ledger = config.run_dir / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    for kept in (lines[:3], lines[:2] + lines[3:], lines + lines[4:5]):
        ledger.write_text("".join(kept))
        with pytest.raises(UserError, match=r"ledger.jsonl: found .* put back a copy of it, or name a checkpoint"):
            newest_sound(config, RunRecords(config.run_dir).event)
    ledger.write_text("".join(lines[:3]))
    assert newest_sound(config, RunRecords(config.run_dir).event, "2").state.step == 2
    with pytest.raises(UserError, match="--resume-from: found ２, expected"):
        newest_sound(config, RunRecords(config.run_dir).event, "２")
    assert checkpoint_steps(newest.parent) == [2, 4, 6]


def test_lines_of_another_form_are_refused_in_one_line(run: tuple[CampaignConfig, Path]) -> None:
    config, _ = run
    for name, row in (
        ("metrics.jsonl", '{"step": 7, "loss": "low"}'),
        ("metrics.jsonl", '{"loss": 1}'),
        ("events.jsonl", '{"kind": []}'),
        ("events.jsonl", '{"time": 1}'),
    ):
        whole = (config.run_dir / name).read_text()
        (config.run_dir / name).write_text(f"{whole}{row}\n")
        for read in (read_status, load_run):
            with pytest.raises(UserError, match=f"{name}.*found a damaged line"):
                read(config.run_dir)
        (config.run_dir / name).write_text(whole)
