"""`python -m cluster evaluate` as a user types it, with a tiny model, real Ray and real vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.integration


def test_a_model_that_is_the_teacher_is_at_no_distance_from_it(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "teacher", hidden=32, layers=1, context=64)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "campaign.yaml").write_text(
        """
name: far
student: {model: nowhere}
teachers: {default: {model: teacher, dtype: float32, cpus_per_replica: 0.2}}
prompts: {path: nowhere.jsonl}
sampling: {max_response_tokens: 6, temperature: 0.8}
rollout: {dtype: float32, cpus_per_replica: 0.2, engine: {kv_cache_memory_bytes: 67108864, max_num_seqs: 8}}
evaluation:
  sets:
    near: {prompts: {path: heldout.jsonl}, samples: 2, exposure: true}
    long: {prompts: {path: heldout.jsonl}, verifier: {name: exact}, samples: 4, temperature: 1.6, top_k: 3, max_response_tokens: 20}
ray: {object_store_mebibytes: 100}
"""
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cluster",
            "evaluate",
            "teacher",
            "campaign.yaml",
            "--reverse-kl",
            "--output",
            "out.json",
        ],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sets = json.loads((tmp_path / "out.json").read_text())["sets"]
    near, long = sets["near"]["values"]["teacher"], sets["long"]["values"]["teacher"]
    assert abs(near["reverse_kl"]) < 1e-4 and abs(near["reverse_kl_on_teacher_text"]) < 1e-4 and near["entropy"] > 1
    assert 6 < long["response_length_mean"] <= 20 and near["response_length_mean"] <= 6
    assert {"accuracy", "pass@4", "majority:low"} <= long.keys() and "reverse_kl" not in long
    assert "learner" not in done.stderr and "near" in done.stdout
