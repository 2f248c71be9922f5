"""A real language model on every path: SmolLM2-135M-Instruct with three of its layers left out, and the intact one.

UNDERSTUDY_SMOLLM2 names its directory; without it nothing here runs. Each campaign is two updates of four short answers,
with real Ray and real vLLM: one to two minutes on two cores.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.records.writer import read_jsonl
from examples.heal.damage import damage
from examples.heal.trim import trim
from tests.vllm_server import serving
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "UNDERSTUDY_SMOLLM2"
INTACT = os.environ.get(VARIABLE, "")
ROUNDING = 1e-4
"""Between the log-probs of engine and learner, both in float32."""
CACHE = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8, "max_model_len": 512}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not INTACT, reason=f"{VARIABLE} names no directory of SmolLM2-135M-Instruct"),
]

SHORT = {
    "pipeline": {"updates": 2, "prompts_per_update": 4},
    "sampling.max_response_tokens": 16,
    "rollout.engine": CACHE,
    "prompts.limit": 24,
    "evaluation.sets.heldout.prompts.limit": 4,
    "evaluation.sets.questions.prompts.limit": 4,
    "evaluation.sets.questions.max_response_tokens": 16,
    "evaluation.every_updates": 2,
    "checkpoint.every_updates": 2,
    "learner.optimizer": {"learning_rate": 2e-5, "warmup_updates": 0},
}
WITH_ANSWERS = {"path": "examples/heal/questions.jsonl", "reference_field": "answer"}
JUDGED = {"evaluation.prompts": {**WITH_ANSWERS, "limit": 4}, "evaluation.verifier.name": "numeric"}
ON_SAMPLES = {"teachers.default.signal": "sampled", "learner.objective.estimator": "immediate"}
PATHS: dict[str, dict[str, Any]] = {
    "hidden": JUDGED,
    "topk_adapter": {
        "teachers.default.signal": "topk",
        "student.lora": {"rank": 8, "publish": "adapter"},
        "learner.optimizer.learning_rate": 2e-4,
    },
    "lora": {**ON_SAMPLES, "student.lora": {"rank": 8}, "learner.optimizer.learning_rate": 2e-4},
    "stale": {"teachers.default.signal": "full", "pipeline.max_staleness": 1, "weights.encoding": "delta"},
    "privileged": {
        **ON_SAMPLES,
        **JUDGED,
        "prompts": WITH_ANSWERS,
        "evaluation.sets.heldout.prompts": WITH_ANSWERS,  # which this teacher reads
        "teachers.default.prompt_template": "{prompt}\n(The answer is {answer}.)",
        "learner.objective.reward_weight": 0.1,
        "pipeline.prompts_per_update": 2,
        "pipeline.samples_per_prompt": 2,
    },
    "http": {
        **{"teachers.default.model": "intact", "teachers.default.backend": "http", "teachers.default.urls": ["{url}"]},
        **{"teachers.default.signal": "topk", "teachers.default.top_k": 16, "teachers.default.temperature": 1.0},
    },
    "vllm": {
        **{"teachers.default.backend": "vllm", "teachers.default.engine": CACHE},
        **{"teachers.default.signal": "topk", "teachers.default.top_k": 16},
    },
    "sft": {"learner.objective": {"estimator": "sft", "clip_low": None, "clip_high": None}},
    "half": {
        **{"rollout.dtype": "bfloat16", "learner.compute_dtype": "bfloat16", "teachers.default.dtype": "bfloat16"},
        **{"teachers.default.signal": "student_topk", "learner.gradient_checkpointing": True},
    },
}
"""Name of a campaign -> what it sets beside examples/heal/heal_short.yaml and SHORT. `{url}`: a server's."""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "student"
    assert damage(INTACT, path, "10,14,18") == [10, 14, 18]
    return path


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The intact model behind vLLM's own server."""
    with serving(INTACT, "intact", "--max-model-len", "512") as found:
        yield found


def overrides(name: str, folder: Path, student: Path, url: str) -> list[str]:
    """The arguments of `understudy run` behind the file."""
    settings = {
        "name": name,
        "output_dir": str(folder),
        "student.model": str(student),
        "teachers.default.model": INTACT,
        **SHORT,
        **PATHS[name],
    }
    return [f"{key}={json.dumps(value).replace('{url}', url)}" for key, value in settings.items()]


@pytest.mark.parametrize("name", PATHS)
def test_a_real_model_takes_this_path(name: str, student: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("url") if name == "http" else ""
    understudy(tmp_path, "run", "examples/heal/heal_short.yaml", *overrides(name, tmp_path, student, url))
    run = tmp_path / name
    rows = read_jsonl(run / "metrics.jsonl")
    updates = [row for row in rows if row["step"] > 0]
    assert [row["step"] for row in updates] == [1, 2] and [row["trajectories"] for row in updates] == [4, 8]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(row["staleness_max"] <= (name == "stale") for row in updates)
    if name != "sft":
        assert_engine_and_learner_agree(updates[0], 0.1 if name == "half" else ROUNDING)
    assert_evaluated(rows, judged=JUDGED.items() <= PATHS[name].items())
    assert_loads(run / "checkpoints" / "step_00000002", student)


def understudy(home: Path, *words: str) -> str:
    """What the command prints; it ends well and without a traceback."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *words],
        cwd=ROOT,
        env={**environment, "HF_HUB_OFFLINE": "1", "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def test_the_student_is_exported_and_evaluated_as_a_model(student: Path, tmp_path: Path) -> None:
    """After a campaign: `export`, and `evaluate` of what it wrote beside the damaged student, as training measured both."""
    understudy(tmp_path, "run", "examples/heal/heal_short.yaml", *overrides("hidden", tmp_path, student, ""))
    run, exported = tmp_path / "hidden", tmp_path / "exported"
    understudy(tmp_path, "export", str(run), str(exported))
    assert_loads(exported, student)
    settings = overrides("hidden", tmp_path, student, "")
    words = [str(student), str(exported), "examples/heal/heal_short.yaml", *settings, "--set", "heldout"]
    understudy(tmp_path, "evaluate", *words, "--reverse-kl", "--output", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())["sets"]["heldout"]["values"]
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "eval/heldout/reverse_kl" in row]
    for values, row in zip(found.values(), (rows[0], rows[-1]), strict=True):
        assert values["reverse_kl"] == pytest.approx(row["eval/heldout/reverse_kl"], abs=0.05)


def test_a_student_with_fewer_tokens_learns_across_tokenizers(tmp_path: Path) -> None:
    """The recipe of examples/heal/trimmed.yaml: the student's tokens are others than the teacher's, which reads all of them."""
    student = tmp_path / "trimmed"
    assert len(trim(INTACT, student, 16384)[0]) == 16384
    settings = {
        "name": "trimmed-run",
        "output_dir": str(tmp_path),
        "student.model": str(student),
        "teachers.default.model": INTACT,
        "teachers.default.tokenizer": INTACT,
        **SHORT,
    }
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    understudy(tmp_path, "run", "examples/heal/trimmed.yaml", *words)
    rows = read_jsonl(tmp_path / "trimmed-run" / "metrics.jsonl")
    updates = [row for row in rows if row["step"] > 0]
    assert [row["trajectories"] for row in updates] == [4, 8]
    assert_engine_and_learner_agree(updates[0], ROUNDING)
    assert_evaluated(rows, judged=False)
    assert all(row["missing_scores"] < 0.1 * row["tokens_trained"] for row in updates)
    assert_loads(tmp_path / "trimmed-run" / "checkpoints" / "step_00000002", student)


def test_episodes_with_tools_take_two_updates(student: Path, tmp_path: Path) -> None:
    """The recipe of examples/tools: transcripts of a real model with calls that vLLM's parser reads, scored in one pass."""
    settings = {
        **{
            "name": "tools",
            "output_dir": str(tmp_path),
            "student.model": str(student),
            "teachers.default.model": INTACT,
        },
        **{
            "pipeline": {"updates": 2, "prompts_per_update": 4},
            "evaluation.sets.questions.prompts.limit": 4,
            "rollout.engine": CACHE,
        },
        **{"sampling.max_response_tokens": 64, "evaluation.every_updates": 2, "checkpoint.every_updates": 2},
        "evaluation.sets.questions.max_response_tokens": 64,
    }
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    understudy(tmp_path, "run", "examples/tools/distill.yaml", *words)
    rows = read_jsonl(tmp_path / "tools" / "metrics.jsonl")
    updates = [row for row in rows if row["step"] > 0]
    assert [row["trajectories"] for row in updates] == [4, 8] and all(row["turns_mean"] >= 1 for row in updates)
    assert_engine_and_learner_agree(updates[0], ROUNDING)
    assert all(0 < row["eval/questions/response_length_mean"] <= 64 for row in (rows[0], rows[-1]))
    # An episode that is cut at the limit has no reward; of four short ones all may be cut.
    assert all(0 <= row.get("eval/questions/accuracy", 0.0) <= 1 for row in (rows[0], rows[-1]))
    assert_loads(tmp_path / "tools" / "checkpoints" / "step_00000002", student)


def assert_evaluated(rows: list[dict[str, Any]], *, judged: bool) -> None:
    """Both sets, at the start and at the end; and `evaluation.prompts`, where the campaign has it."""
    for key in ("eval/heldout/reverse_kl", *(["eval/reverse_kl"] if judged else [])):
        evaluated = [row[key] for row in rows if key in row]
        assert len(evaluated) == 2 and all(0 < kl < 10 for kl in evaluated)
    for key in ("eval/questions/accuracy", *(["eval/accuracy"] if judged else [])):
        evaluated = [row for row in rows if key in row]
        assert len(evaluated) == 2 and all(row[f"{key}:low"] <= row[key] <= row[f"{key}:high"] for row in evaluated)
        assert f"{key}:from_start" in evaluated[1]
    assert not judged or 0 <= rows[0]["eval/accuracy_teacher"] <= 1


def assert_engine_and_learner_agree(first: dict[str, float], rounding: float) -> None:
    """The first update is on-policy, to the rounding of its dtypes."""
    assert first["engine_logprob_abs_diff"] < rounding
    assert first["ratio_mean"] == pytest.approx(1, abs=rounding)
    assert first["clip_fraction"] == 0
    assert abs(first["forward_kl_old"]) < rounding
    assert 0 < first["reverse_kl"] < 10


def assert_loads(checkpoint: Path, student: Path) -> None:
    """transformers loads the checkpoint, which is another model than the student, and its tokenizer writes chats."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    after: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    before: Any = AutoModelForCausalLM.from_pretrained(student)
    assert after.config.num_hidden_layers == before.config.num_hidden_layers
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer) == after.config.vocab_size == before.config.vocab_size
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hello."}], tokenize=False, add_generation_prompt=True
    )
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        ours, theirs = after(tokens).logits, before(tokens).logits
    assert ours.isfinite().all() and 0 < float((ours.float() - theirs.float()).abs().max()) < 20
