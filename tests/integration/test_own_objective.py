"""One update of a real campaign with an estimator and a cost of the user's own, as docs/extending.md shows them."""

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


def test_the_documented_estimator_and_cost_train_a_campaign(tmp_path: Path) -> None:
    for section, name in (("An engine", "plain_engine"), ("An estimator, a divergence or a cost", "own_objective")):
        [example] = python_examples("docs/extending.md", section)
        (tmp_path / f"{name}.py").write_text(example)
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
sampling: {max_response_tokens: 6}
rollout: {backend: "plain_engine:PlainEngine", dtype: float32, cpus_per_replica: 0.2}
learner:
  compute_dtype: float32
  cpus_per_replica: 0.2
  objective: {estimator: "own_objective:windowed", gamma: 0.5, cost: "own_objective:squashed"}
pipeline: {updates: 1, prompts_per_update: 2, samples_per_prompt: 2}
ray: {object_store_mebibytes: 100, start_timeout_seconds: 600}
"""
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def cluster(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
        )

    done = cluster("run", "campaign.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    [update] = read_jsonl(tmp_path / "runs" / "own" / "metrics.jsonl")
    assert update["tokens_trained"] > 4 and update["grad_norm"] > 0
    wrong = cluster("check", "campaign.yaml", "--offline", "learner.objective.cost=own_objective:windowed")
    assert wrong.returncode == 2 and "learner.objective.cost: found own_objective:windowed: TypeError" in wrong.stderr
