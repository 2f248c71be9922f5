"""A campaign whose rewards come from a function that reads records, for one domain, and from a built-in one for the others."""

import json
from pathlib import Path

import pytest

from actors.errors import UserError
from cluster.config_file import load_config
from cluster.inputs import read_inputs
from cluster.records.writer import read_jsonl
from tests.light_campaign import configuration, finish, make_folder, start

OWN = "tests.own_rewards:graded"


def test_rewards_by_domain_from_records_and_their_parts_as_metrics(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "domain": "ab"[i % 2]} for i in range(8)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = configuration(
        folder,
        "graded",
        prompts={"path": str(folder / "mine.jsonl"), "domain_field": "domain"},
        learner={"objective": {"reward_weight": 0.5}},
        pipeline={"updates": 2, "prompts_per_update": 4, "samples_per_prompt": 2},
        evaluation={"prompts": None, "verifiers": {"a": {"name": OWN}}},
        checkpoint={"every_updates": 2},
        rollout={"replicas": 1},
    )
    finish(start(file), file)
    metrics = read_jsonl(folder / "runs" / "graded" / "metrics.jsonl")
    assert [0 <= row["reward/short_mean"] <= 1 for row in metrics if row["step"]] == [True, True]
    events = [row for row in read_jsonl(folder / "runs" / "graded" / "events.jsonl") if row["kind"] == "unjudged"]
    assert not events

    # A verifier that reads the record judges prompts without a reference; a built-in one cannot.
    text = file.read_text().replace("domain_field: domain", "domain_field: domain\n  reference_field: null")
    file.write_text(text)
    with pytest.raises(UserError, match=r"mine\.jsonl, line 2: found no reference answer"):
        read_inputs(load_config(file))
