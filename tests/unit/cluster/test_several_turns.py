"""Whole campaigns whose responses have two turns, with an environment's tokens between them (`turns: 2` of LightEngine)."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.data.judge import texts_to_judge
from actors.trajectory import offsets_of
from cluster.records.reader import load_run
from cluster.records.writer import read_jsonl
from cluster.report.page import write_page
from tests.light_campaign import (
    assert_ledger_adds_up,
    configuration,
    fingerprint,
    finish,
    make_folder,
    run_with_kills,
    start,
)
from tests.tiny_tokenizers import byte_level

TWO_TURNS = {"rollout": {"engine": {"turns": 2}}, "sampling": {"max_response_tokens": 9}}
OF_RESPONSE = 2
"""Tokens that the environment writes in each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("turns"))


def learner(**objective: Any) -> dict[str, Any]:
    return {"compute_dtype": "float32", "optimizer": {"learning_rate": 1e-3}, "objective": objective}


def test_killed_and_resumed_equals_undisturbed_and_its_records_tell_the_students_tokens(folder: Path) -> None:
    objective = {"estimator": "discounted", "gamma": 0.9, "turn_discount": 0.5, "baseline": "group_mean"}
    changes = {**TWO_TURNS, "learner": learner(**objective), "pipeline": {"updates": 2}}
    calm, stormy = (configuration(folder, name, **changes) for name in ("calm", "stormy"))
    beside = start(calm)
    assert run_with_kills(stormy, 1, random.Random(0), longest=60) == 1
    finish(beside, calm)
    runs = [folder / "runs" / name for name in ("calm", "stormy")]
    undisturbed, disturbed = map(fingerprint, runs)
    assert disturbed == undisturbed
    assert_ledger_adds_up(runs[1], updates=2, size=8, max_staleness=0)

    _, *rows = read_jsonl(runs[0] / "metrics.jsonl")
    counted = 0
    for row in rows:
        length = row["response_length_mean"] * 8
        counted += length
        assert row["tokens_generated"] == counted and row["tokens_trained"] == length
        assert row["turns_mean"] == 2 and math.isclose(row["context_share"], 16 / (16 + length))
        assert row["missing_scores"] == 0 and row["engine_logprob_abs_diff"] < 1e-5 and row["response_length_max"] <= 7

    samples = [row for path in sorted((runs[0] / "trajectories").iterdir()) for row in read_jsonl(path, checked=True)]
    assert samples
    for row in samples:
        trained = row["trained"]
        assert trained.count(False) == OF_RESPONSE and trained[0] and trained[-1] and len(trained) == len(row["tokens"])
        for key in ("student_logprobs", "teacher_logprobs"):
            assert [value is not None for value in row[key]] == trained
        assert [version >= 0 for version in row["policy_versions"]] == trained
        assert [turn["by"] for turn in row["turns"]] == ["turn 1", "others", "turn 2"]
        assert "".join(turn["text"] for turn in row["turns"]) == row["response"]
    page = folder / "report.html"
    write_page([load_run(runs[0])], page)
    source = page.read_text()
    assert source.count("<i class=c>") % OF_RESPONSE == 0 and source.count("<i class=c>") > 0
    assert "2 of others" in source
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert summary["tokens_generated"] >= counted and math.isfinite(summary["reverse_kl_end"])


def test_a_teacher_equal_to_the_student_moves_nothing(folder: Path) -> None:
    same = {"model": str(folder / "student"), "dtype": "float32", "signal": "full"}
    changes = {
        "teachers": {"default": same},
        "pipeline": {"updates": 1},
        "learner": learner(estimator="to_go_expected"),
    }
    config = configuration(folder, "same", **TWO_TURNS, **changes)
    finish(start(config), config)
    row = read_jsonl(folder / "runs" / "same" / "metrics.jsonl")[1]
    assert abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-5 and abs(row["reverse_kl"]) < 1e-6
    assert row["turns_mean"] == 2 and row["tokens_trained"] > 0


def test_a_verifier_reads_what_the_student_wrote_and_not_what_it_was_told() -> None:
    tokenizer = byte_level()
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ask", "42", "so 7", "one")]
    tokens = [token for part in parts for token in part]
    turns = [turn for part, turn in zip(parts, (0, -1, 1, 0), strict=True) for turn in [turn] * len(part)]
    arrays = np.array(tokens), offsets_of([sum(map(len, parts[:3])), len(parts[3])])
    assert texts_to_judge(tokenizer, *arrays, np.array(turns)) == ["ask\nso 7", "one"]
    assert texts_to_judge(tokenizer, *arrays) == ["ask42so 7", "one"]
