"""One campaign with all that users may add, from outside the package: every example of docs/extending.md, as it stands.

Its engine, its estimator and cost, its verifier, and its teacher backend; a second teacher is a server asked over HTTP.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.data.tokenizer import load_tokenizer
from actors.errors import UserError
from cluster.config_file import load_config
from cluster.records.writer import read_jsonl
from tests.documented import python_examples
from tests.tiny_models import make_tiny_model
from tests.unit.actors.test_http_teacher import Server, logprob, serving

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "An engine": "plain_engine",
    "An estimator, a divergence or a cost": "own_objective",
    "A teacher backend": "counts_teacher",
    "A verifier": "tolerance",
}
"""Section of docs/extending.md -> the module that its example becomes here."""

pytestmark = pytest.mark.integration


def make_campaign(folder: Path, url: str, counts: np.ndarray) -> Path:
    for section, module in EXAMPLES.items():
        [example] = python_examples("docs/extending.md", section)
        (folder / f"{module}.py").write_text(example)
    np.save(folder / "counts.npy", counts)
    make_tiny_model(folder / "student", hidden=32, layers=1, context=64)
    rows = [
        {"prompt": f"{i}+{i}=", "answer": str(2 * i), "domain": domain} for i in range(4) for domain in ("web", "own")
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "campaign.yaml"
    path.write_text(
        f"""
name: own
output_dir: {folder / "runs"}
student: {{model: {folder / "student"}}}
teachers:
  served: {{backend: http, model: wise, urls: ["{url}"], domains: [web], temperature: 1, cpus_per_replica: 0.2}}
  counts:
    backend: counts_teacher:CountsTeacher
    model: {folder / "counts.npy"}
    domains: [own]
    cpus_per_replica: 0.2
prompts: {{path: {folder / "prompts.jsonl"}, domain_field: domain}}
sampling: {{max_response_tokens: 10, temperature: 0.9}}
rollout: {{backend: "plain_engine:PlainEngine", dtype: float32, cpus_per_replica: 0.2}}
learner:
  compute_dtype: float32
  cpus_per_replica: 0.2
  optimizer: {{learning_rate: 1e-2}}
  objective: {{estimator: "own_objective:windowed", gamma: 0.5, cost: "own_objective:squashed"}}
pipeline: {{updates: 2, prompts_per_update: 4, samples_per_prompt: 2}}
evaluation:
  prompts: {{path: {folder / "prompts.jsonl"}, domain_field: domain}}
  verifier: {{name: "tolerance:within_one_percent"}}
  teacher: false
ray: {{object_store_mebibytes: 100, start_timeout_seconds: 600}}
"""
    )
    return path


def test_a_campaign_with_what_users_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.random.default_rng(0).integers(0, 50, 102)
    with serving(Server()) as [url]:
        path = make_campaign(tmp_path, url, counts)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-m", "cluster", "run", str(path)],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "own"
    updates = [row for row in read_jsonl(run / "metrics.jsonl") if row["step"] > 0]
    assert [row["trajectories"] for row in updates] == [8, 16]
    assert [row["missing_scores"] for row in updates] == [0, 0]
    for update in updates:
        # The engine loads weights, draws by the seeds and records log-probs as it should: the learner computes the same.
        assert update["engine_logprob_abs_diff"] < 1e-5
        assert update["tokens_trained"] > 4 and update["grad_norm"] > 0

    tokenizer: Any = load_tokenizer(str(tmp_path / "student"), False, "student.model")
    weights = (counts + 1.0) ** (1 / 0.9)  # at the temperature that is sampled at
    table = np.log(weights / weights.sum())
    seen = {"web": 0, "own": 0}
    for file in sorted((run / "trajectories").glob("*.jsonl")):
        for row in read_jsonl(file):
            prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            tokens = [tokenizer.convert_tokens_to_ids(token) for token in row["tokens"]]
            domain = ("web", "own")[int(row["id"].split("/")[1]) % 2]
            before = [prompt[-1], *tokens[:-1]]
            expected = (
                table[tokens] if domain == "own" else [logprob(*pair) for pair in zip(before, tokens, strict=True)]
            )
            np.testing.assert_allclose(row["teacher_logprobs"], expected, rtol=1e-5)
            seen[domain] += len(tokens)
    assert min(seen.values()) > 20

    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^evaluation\.teacher: found true, expected false: .*does not generate"):
        load_config(path, ["evaluation.teacher=true"])
