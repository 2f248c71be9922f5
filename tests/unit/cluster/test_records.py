import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import UserError
from cluster.records.metric_table import EVALUATION_KEYS, METRIC_KEYS
from cluster.records.writer import (
    SUMMARY_KEYS,
    TRAJECTORY_KEYS,
    RunRecords,
    read_jsonl,
    read_summary,
    trajectory_files,
)


def metrics(step: int, **more: object) -> dict:
    return {
        **dict.fromkeys(METRIC_KEYS, 0.5),
        "step": step,
        "policy_version": step,
        "wall_seconds": float(step),
        **more,
    }


def evaluation(step: int) -> dict:
    return {"step": step, "policy_version": step, **dict.fromkeys(EVALUATION_KEYS, 0.25)}


def trajectory(**more: object) -> dict:
    return {**dict.fromkeys(TRAJECTORY_KEYS), "id": "0/1/2", "tokens": ["a"], "student_logprobs": [-0.5], **more}


def steps(run_dir) -> list[int]:
    return [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")]


def test_lines_are_whole_and_in_place_when_the_call_returns(tmp_path):
    records = RunRecords(tmp_path / "new" / "run")
    records.metrics(evaluation(0))
    records.metrics(metrics(1))
    records.event("actor_died", "SIGKILL", actor="rollout-0")
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    assert json.loads(lines[0])["wall_seconds"] >= 0  # put in by the records where the campaign has none
    [event] = read_jsonl(tmp_path / "new" / "run" / "events.jsonl")
    assert event.items() >= {"kind": "actor_died", "cause": "SIGKILL", "actor": "rollout-0"}.items()
    assert event["time"] > 1.7e9 and 0 <= event["wall_seconds"] < 60


def test_nan_and_infinity_are_null_and_arrays_are_lists(tmp_path):
    records = RunRecords(tmp_path)
    records.metrics(
        metrics(1, loss=math.nan, ratio_max=np.float32("inf"), staleness_max=np.int64(3), entropy=-math.inf)
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    row = json.loads(text)
    assert (row["loss"], row["ratio_max"], row["entropy"], row["staleness_max"]) == (None, None, None, 3)
    records.keep_trajectories(1, [trajectory(teacher_logprobs=np.array([-0.123456789, np.nan]))])
    assert read_jsonl(trajectory_files(tmp_path)[1])[0]["teacher_logprobs"] == [-0.12346, None]


def test_what_json_does_not_have_is_an_error_and_leaves_the_file_as_it_was(tmp_path):
    records = RunRecords(tmp_path)
    records.metrics(metrics(1))
    with pytest.raises(TypeError):
        records.metrics(metrics(2, loss=object()))
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("key", ["grad_norm", "publish_bytes", "step"])
def test_a_step_without_a_key_of_the_contract_is_an_error(tmp_path, key):
    row = metrics(1)
    del row[key]
    with pytest.raises(ValueError, match=f"without {key}"):
        RunRecords(tmp_path).metrics(row)
    assert steps(tmp_path) == []


def test_a_step_is_recorded_once_and_in_order(tmp_path):
    RunRecords(tmp_path).metrics(metrics(5))
    with pytest.raises(ValueError, match="step 5 after step 5"):
        RunRecords(tmp_path).metrics(metrics(5))


def test_a_torn_last_line_is_not_read_and_not_written_on(tmp_path):
    RunRecords(tmp_path).metrics(metrics(1))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "loss": 0.')
    assert steps(tmp_path) == [1]
    RunRecords(tmp_path).metrics(metrics(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "started"}\n{"kind": \n{"kind": "finished"}\n')
    with pytest.raises(UserError, match=r"events\.jsonl, line 2: found a damaged line"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_going_on_from_a_checkpoint_forgets_the_steps_after_it_but_no_event(tmp_path):
    records = RunRecords(tmp_path)
    records.metrics(evaluation(0))
    for step in range(1, 6):
        records.metrics(metrics(step))
        records.keep_trajectories(step, [trajectory()])
    records.event("checkpoint", step=3)
    records.write_summary(dict.fromkeys(SUMMARY_KEYS))
    resumed = RunRecords(tmp_path)
    resumed.truncate_after(3)
    assert steps(tmp_path) == [0, 1, 2, 3] and list(trajectory_files(tmp_path)) == [1, 2, 3]
    assert read_summary(tmp_path) == {} and len(read_jsonl(tmp_path / "events.jsonl")) == 1
    resumed.metrics(metrics(4))
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    RunRecords(tmp_path).truncate_after(-1)
    assert steps(tmp_path) == [] and trajectory_files(tmp_path) == {}


def test_the_wall_clock_goes_on_where_it_stopped(tmp_path):
    RunRecords(tmp_path).metrics(metrics(1, wall_seconds=1000.0))
    assert 1000.0 <= RunRecords(tmp_path).wall_seconds < 1010.0


def test_kept_trajectories_are_bounded_and_spread_from_first_to_last(tmp_path):
    records = RunRecords(tmp_path, max_files=5, max_rows=3)
    for step in range(0, 200, 10):
        records.keep_trajectories(step, (trajectory(id=str(i)) for i in range(10)))
        assert len(trajectory_files(tmp_path)) <= 5
    kept = list(trajectory_files(tmp_path))
    assert kept[0] == 0 and kept[-1] == 190 and len(kept) == 5
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 100
    assert (tmp_path / "trajectories" / "step_00000190.jsonl").exists()
    assert [row["id"] for row in read_jsonl(trajectory_files(tmp_path)[190])] == ["0", "1", "2"]


def test_text_of_any_kind_comes_back(tmp_path):
    text = '</script>\n\u2028 "quotes" \\ 日本 \x00 \ud83d'  # the last is half of a surrogate pair
    RunRecords(tmp_path).keep_trajectories(0, [trajectory(response=text)])
    assert read_jsonl(trajectory_files(tmp_path)[0])[0]["response"] == text


def test_the_summary_is_whole_or_not_there(tmp_path):
    records = RunRecords(tmp_path)
    records.write_summary({**dict.fromkeys(SUMMARY_KEYS), "updates": 3, "reverse_kl_end": math.nan})
    with pytest.raises(ValueError, match="ledger"):
        records.write_summary({key: 1 for key in SUMMARY_KEYS if key != "ledger"})
    with pytest.raises(TypeError):
        records.write_summary({**dict.fromkeys(SUMMARY_KEYS), "busy": {"rollout": object()}})
    assert read_summary(tmp_path)["updates"] == 3 and read_summary(tmp_path)["reverse_kl_end"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "ledger.jsonl", "undone.jsonl"])
@pytest.mark.parametrize(
    ("torn", "kept"),
    [(b'{"step": 2', 0), (b'{"step": 2}', 1), (b'{"step": 2}\0\0\0', 1), (b'{"a"\0\0', 0), (b"\0\0\0\0", 0)],
)
def test_what_a_crash_left_of_the_last_line_is_cut_and_whole_lines_are_kept(
    name: str, torn: bytes, kept: int, tmp_path
) -> None:
    whole = b'{"step": 1, "wall_seconds": 0}\n'
    (tmp_path / name).write_bytes(whole + torn)
    RunRecords(tmp_path)
    assert (tmp_path / name).read_bytes() == whole + b'{"step": 2}\n' * kept


def test_faults_are_counted_over_all_processes_of_a_campaign(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    for kind in ("actor_died", "checkpoint", "actor_hung"):
        records.event(kind, actor="rollout-0", step=1, path="p")
    assert records.faults == 2
    again = RunRecords(tmp_path)  # the checkpoint of the process before may be older than its faults
    again.event("actor_failed", actor="rollout-0")
    assert again.faults == 3


def test_half_a_line_that_a_full_disk_took_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, full, written = RunRecords(tmp_path), [True], os.write
    records.event("paused")
    open_file = Path.open

    class Half:
        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, line: bytes) -> int:
            return written(self.file.fileno(), line[: len(line) // 2 if full else None])

    monkeypatch.setattr(Path, "open", lambda path, *given, **named: Half(open_file(path, *given, **named)))
    records.event("continued")
    records.event("scaled", role="rollout", before=1, after=2)
    assert records.full is not None and "No space left" in records.full.told() and len(records.unwritten) == 2
    full.clear()
    records.event("paused")
    monkeypatch.undo()
    assert [row["kind"] for row in read_jsonl(tmp_path / "events.jsonl")] == ["paused", "continued", "scaled", "paused"]
    assert records.full is None
