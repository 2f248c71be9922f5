"""Mirrored checkpoints: what is copied, which copies count, and a campaign that has lost its disk."""

import shutil
from pathlib import Path

import fsspec
import pytest

from actors.errors import UserError
from cluster.records.writer import read_jsonl
from cluster.state.mirror import COMPLETE, Mirror
from tests import clean_process, interrupted_campaign
from tests.light_campaign import configuration, fingerprint, finish, make_folder, start
from tests.waiting import until


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/elsewhere"


def make_run(folder: Path, *steps: int) -> Path:
    """A run directory with checkpoints of two small files."""
    for step in steps:
        training = folder / "checkpoints" / f"step_{step:08d}" / "training"
        training.mkdir(parents=True)
        (training / "campaign.json").write_text(f'{{"step": {step}}}')
        (training.parent / "model.safetensors").write_bytes(bytes([step]) * 1000)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "trajectories").mkdir(exist_ok=True)
    (folder / "trajectories" / "step_00000001.jsonl").write_text("{}\n")
    return folder


def test_a_lost_run_directory_is_filled_from_the_newest_complete_copy(url: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a" / "run", 2, 4)
    mirror = Mirror(url, run)
    for step in (2, 4):
        mirror.push(step)
    assert mirror.steps() == [2, 4]
    assert mirror.pull() is None, "what is there is not touched"
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shutil.rmtree(run)
    assert Mirror(url, run).pull() == 4
    after = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == {name: content for name, content in before.items() if "step_00000002" not in str(name)}


def test_a_copy_that_was_not_finished_does_not_count_and_is_made_again(url: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "b" / "run", 2, 4)
    mirror = Mirror(url, run)
    mirror.push(2)
    mirror.push(4)
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{root}/run/step_00000004/{COMPLETE}")
    assert mirror.steps() == [2]
    mirror.push(4)
    mirror.prune([4])
    assert mirror.steps() == [4] and not fs.exists(f"{root}/run/step_00000002")


def test_a_damaged_copy_is_refused_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "c" / "run", 2)
    Mirror(url, run).push(2)
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/run/step_00000002/model.safetensors", b"short")
    shutil.rmtree(run)
    with pytest.raises(UserError, match=r"checkpoint.mirror: found .*model.safetensors with 5 bytes, expected 1000"):
        Mirror(url, run).pull()
    assert not [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    fs.pipe_file(f"{root}/run/step_00000002/{COMPLETE}", b'{"../../evil": 1}')
    with pytest.raises(UserError, match=r"a copy with a file '../../evil'"):
        Mirror(url, run).pull()


@pytest.mark.parametrize("wrong", ["nowhere://x", "s3://bucket/runs"])
def test_a_url_that_cannot_be_used_is_one_line(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"checkpoint\.mirror: found {wrong} \(.*, expected a URL that fsspec can"
    ) as e:
        Mirror(wrong, tmp_path / "run")
    assert "\n" not in str(e.value)


def test_a_campaign_that_has_lost_its_disk_ends_as_if_it_had_not(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    calm = configuration(folder, "calm")
    finish(start(calm), calm)
    config = configuration(folder, "other", checkpoint={"mirror": f"file://{tmp_path}/elsewhere"})
    run = folder / "runs" / "other"
    process = clean_process.start(interrupted_campaign.run_to_update, tmp_path, 8, str(config), log=tmp_path / "log")
    until(
        lambda: any(row["kind"] == "mirrored" and row["step"] >= 4 for row in read_jsonl(run / "events.jsonl")),
        "a copy",
        process.is_alive,
    )
    process.kill()
    process.join()
    shutil.rmtree(run)
    finish(start(config), config)
    [step] = [row["step"] for row in read_jsonl(run / "events.jsonl") if row["kind"] == "brought_back"]
    assert 4 <= step < 12
    then, now = fingerprint(folder / "runs" / "calm"), fingerprint(folder / "runs" / "other")
    assert now.items() <= then.items() and {"ledger.jsonl", "metrics.jsonl"} <= set(now)
    assert f"checkpoints/step_{step:08d}/model.safetensors" in now and f"trajectories/step_{12:08d}.jsonl" in now


def test_a_mirror_that_fails_is_told_and_the_campaign_goes_on(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (tmp_path / "file").write_text("not a directory")
    config = configuration(folder, "run", checkpoint={"mirror": f"file://{tmp_path}/elsewhere"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "run").write_text("in the way")
    finish(start(config), config)
    events = read_jsonl(folder / "runs" / "run" / "events.jsonl")
    assert [event["kind"] for event in events].count("mirror_failed") >= 1 and events[-1]["kind"] == "finished"
