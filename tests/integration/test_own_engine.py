"""A campaign with an engine from outside the package: the example of docs/extending.md, as it stands there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.records.writer import read_jsonl
from tests.documented import python_examples
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.integration


def test_the_documented_engine_samples_a_campaign(tmp_path: Path) -> None:
    [example] = python_examples("docs/extending.md", "An engine")
    (tmp_path / "plain_engine.py").write_text(example)
    make_tiny_model(tmp_path / "student", hidden=32, layers=1, context=64)
    make_tiny_model(tmp_path / "teacher", hidden=32, layers=1, context=64, seed=1)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "campaign.yaml").write_text(
        """
name: own
output_dir: runs
student: {model: student}
teachers: {default: {model: teacher, dtype: float32, cpus_per_replica: 0.2}}
prompts: {path: train.jsonl}
sampling: {max_response_tokens: 10, temperature: 0.9}
rollout: {backend: "plain_engine:PlainEngine", dtype: float32, cpus_per_replica: 0.2}
learner: {compute_dtype: float32, cpus_per_replica: 0.2, optimizer: {learning_rate: 1e-2}}
pipeline: {updates: 2, prompts_per_update: 2, samples_per_prompt: 2}
ray: {object_store_mebibytes: 100, start_timeout_seconds: 600}
"""
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "run", "campaign.yaml"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = read_jsonl(tmp_path / "runs" / "own" / "metrics.jsonl")
    for update in (first, second):
        # Loaded weights, seeds and log-probs are right: the learner computes what the engine recorded.
        assert update["engine_logprob_abs_diff"] < 1e-5 and update["tokens_trained"] > 4
    assert (first["policy_version"], second["policy_version"]) == (1, 2)
