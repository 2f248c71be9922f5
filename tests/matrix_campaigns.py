"""The campaigns that make every choice of the configuration, and the choices that none of them makes, with the reason.

Each is BASE with the settings of its row, as a user would give them after the file: `key=value`. `{url}` is an http server,
`{mirror}` a directory. tests/unit/test_matrix.py says which choices are missing; tests/integration/test_matrix.py runs them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.choices import SOURCES as SOURCES_OF_PROMPTS
from tests.choices import Choice
from tests.light_engine import BACKEND

BASE = f"""
name: base
student: {{model: student}}
teachers: {{}}
prompts: {{path: train.jsonl}}
sampling: {{max_response_tokens: 6}}
rollout: {{dtype: float32, backend: "{BACKEND}", cpus_per_replica: 0.1}}
learner: {{compute_dtype: float32, cpus_per_replica: 0.1, optimizer: {{learning_rate: 1e-3, warmup_updates: 0}}}}
pipeline: {{updates: 2, prompts_per_update: 3, samples_per_prompt: 2}}
ray: {{max_restarts: 0}}
"""
TURNS = {"max_response_tokens": 30, "stop_token_ids": list(range(7, 60))}
"""Half of the tokens end a turn: an untrained student stops after one or two."""
VLLM = {"rollout.backend": "vllm", "rollout.engine": {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8}}
OWN = "tests.matrix_parts"
AGENT = Path(__file__).with_name("agent.py")


@dataclass(frozen=True)
class Campaign:
    """One run: what it sets beside BASE, and what it must do."""

    settings: dict[str, Any]
    events: tuple[str, ...] = ()
    """Kinds of events that it records beside those of every campaign."""
    status: int = 0
    after: str = ""
    """The campaign whose run this one reads."""
    scores: tuple[str, ...] = ()
    """Arguments of `understudy score`, which runs before with the same settings."""


def teacher(**settings: Any) -> dict[str, Any]:
    return {"model": "teacher", "dtype": "float32", "cpus_per_replica": 0.1, **settings}


def one(**settings: Any) -> dict[str, Any]:
    """The section `teachers` with one teacher."""
    return {"default": teacher(**settings)}


def foreign(**settings: Any) -> dict[str, Any]:
    return teacher(**{"model": "foreign", "tokenizer": "foreign", **settings})


HELD_OUT = {"path": "heldout.jsonl"}
SOURCES: dict[str, dict[str, Any]] = {
    "lines": {"path": "train.jsonl", "domain": "a", "limit": 2},
    "zipped": {"path": "train.jsonl.gz", "domain_field": "domain", "limit": 2},
    "zst": {"path": "train.jsonl.zst", "tools_field": "utilities", "limit": 2},
    "table": {"path": "questions.parquet", "prompt_field": "question", "reference_field": None, "limit": 2},
    "several": {"path": "more/*.jsonl", "limit": 2},
    "folder": {"path": "./rows", "limit": 2},
    "saved": {"path": "./saved", "limit": 2},
    "hub": {"path": "someone/sums", "split": "rest", "limit": 2},
    "own": {"function": f"{OWN}:sums", "function_arguments": {"count": 2}},
}
"""A source of every form."""
WEIGHED = {name: {**source, "weight": 1 + 0.5 * len(name)} for name, source in SOURCES.items()}
SERVED = {"backend": "http", "urls": ["{url}"]}
OURS = {"backend": f"{OWN}:OwnTeacher", "engine": {"own": "option"}}
SMALL = {"backend": "vllm", "engine": {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8}}

CAMPAIGNS: dict[str, Campaign] = {
    # Teachers of every backend with every signal that they send.
    "foreign": Campaign(
        {
            **VLLM,
            "teachers": {
                "local": foreign(domains=["a"], microbatch_tokens=64),
                "vllm": foreign(domains=["b"], **SMALL),
                "served": foreign(
                    domains=["c"],
                    **SERVED,
                    api_key_variable="WISE_KEY",
                    temperature=1.0,
                    timeout_seconds=60,
                    away_timeout_seconds=300,
                    requests_per_url=2,
                ),
                "own": foreign(**OURS),
            },
            "prompts.domain_field": "domain",
            "student.lora": {"rank": 4, "publish": "adapter", "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            "rollout.recompute_kv": False,
            "pipeline.max_staleness": 1,
            "pipeline.prompts_per_update": 4,
            "sampling.temperature": 0.8,
        },
    ),
    "topk": Campaign(
        {
            "teachers": {
                "local": teacher(domains=["a"], signal="topk", top_k=8, head_chunk_tokens=16),
                "vllm": teacher(domains=["b"], signal="topk", top_k=8, **SMALL),
                "served": teacher(domains=["c"], signal="topk", top_k=8, **SERVED),
                "own": teacher(signal="topk", top_k=8, **OURS),
            },
            "prompts.domain_field": "domain",
            "prompts.path": "train.parquet",
            "pipeline.prompts_per_update": 4,
            "learner.objective.estimator": "to_go_expected",
            "learner.objective.gamma": 0.9,
            "learner.objective.mismatch.pi_old": "learner",
        },
    ),
    "whole": Campaign(
        {
            **VLLM,
            "teachers": {
                "vllm": teacher(domains=["a", "b"], signal="full", **SMALL),
                "own": teacher(signal="full", **OURS),
            },
            "prompts.domain_field": "domain",
            "learner.objective.estimator": "full",
            "rollout.on_new_weights": "wait",
            "rollout.dtype": "bfloat16",
            "learner.objective.mismatch.pi_old": "engine",
            "pipeline.max_staleness": 1,
            "pipeline.oversample": 0.5,
            "evaluation.prompts": {"path": "./rows", "domain_field": "domain", "limit": 2},
            "weights.encoding": "delta",
            "weights.anchor_every": 1,
            "sampling": {**TURNS, "top_p": 0.9, "top_k": 20},
            "environment": {
                "name": "tests.guessing:Guess",
                "arguments": {"turns": 2, "own_prompt": True},
                "tool_parser": "hermes",
                "earlier_turns": "written",
                "max_turns": 3,
                "turns_schedule": [[1, 2], [2, 3]],
                "max_turn_tokens": 9,
                "step_timeout_seconds": 100,
                "episode_timeout_seconds": 200,
                "attempts": 2,
                "away_timeout_seconds": 300,
                "replicas": 2,
                "cpus_per_replica": 0.1,
                "resources": {"room": 1},
            },
            "prompts.max_prompt_tokens": 20,
        },
    ),
    "played": Campaign(
        {
            "teachers": one(),
            "learner.objective.estimator": "reward",
            "sampling": {**TURNS, "max_response_tokens": 50},  # of several conversations
            "environment": {
                "command": ["python", str(AGENT), "--turns", "1", "--branches"],
                "listen": "network",
                "episodes_per_replica": 4,
                "cpus_per_replica": 0.1,
            },
            "evaluation.prompts": {**HELD_OUT, "limit": 2},
        },
    ),
    # Estimators.
    "trajectory": Campaign(
        {
            "teachers": one(),
            "learner.objective.estimator": "trajectory",
            "learner.objective.baseline": "group_mean",
            "learner.objective.last_turns": 1,
            "rollout.engine": {"turns": 2},
            "student.lora": {"rank": 4, "dora": True},
            "learner.objective.mismatch": {"correction": "mask", "level": "sequence", "low": 0.4, "high": 3.0},
            "learner.objective.aggregation": "sequence_mean",
            "learner.gradient_checkpointing": True,
            "evaluation.prompts": {"path": "./saved"},
            "evaluation.verifier": {"name": "regex", "pattern": "[0-9]+"},
            "evaluation.every_updates": 1,
            "evaluation.keep_trajectories": 2,
            "evaluation.sets": {
                "near": {"prompts": {**HELD_OUT, "limit": 3}, "samples": 2, "exposure": True},
                "far": {
                    "prompts": {**HELD_OUT, "limit": 2},
                    "verifier": {"name": "numeric"},
                    "samples": 4,
                    "temperature": 0.5,
                    "top_p": 0.9,
                    "top_k": 5,
                    "max_response_tokens": 8,
                    "every_updates": 2,
                },
            },
            "checkpoint.best_by": "far",
        },
    ),
    "to_go": Campaign(
        {
            "teachers": one(),
            "deterministic": True,
            "learner.objective.estimator": "to_go",
            "learner.objective.baseline": "batch_mean",
            "prompts.keep": "margin",
            "prompts.margin": 0.5,
            "prompts.curriculum": "hard_first",
            "learner.objective.first_turns": 1,
            "rollout.engine": {"turns": 2},
            "student.lora": {"rank": 4, "rank_stabilised": True},
            "learner.objective.mismatch": {"correction": "truncate", "level": "token"},
            "learner.objective.aggregation": "sequence_sum",
            "learner.objective.masked_token_roles": ["end_of_sequence", "template"],
            "learner.objective.masked_token_ids": [7],
            "learner.objective.through_log_ratio": True,
            "sampling.response_tokens_schedule": [[1, 3], [2, 5]],
            "evaluation.keep_training_trajectories": 1,
            "tracking": {
                "wandb_project": "matrix",
                "mlflow_uri": "file://{mirror}/mlflow.jsonl",
                "tensorboard": False,
                "prometheus": False,
            },
        },
    ),
    "discounted": Campaign(
        {
            "teachers": {
                "one": teacher(weight=2.0, replicas=2),
                "two": teacher(model="larger", dtype="bfloat16", gpus_per_replica=0),
            },
            "prompts.path": "many.jsonl",
            "learner.objective.estimator": "discounted",
            "learner.objective.gamma": 0.5,
            "learner.objective.turn_discount": 0.5,
            "rollout.engine": {"turns": 2},
            "learner.objective.mismatch": {"correction": "truncate", "level": "prefix"},
            "learner.objective.trust_region": {"estimator": "k1", "beta": 0.1, "target_kl": 0.1},
            "prompts.curriculum": "easy_first",
            "learner.objective.log_ratio_clip": 5.0,
            "learner.objective.aggregation": "constant",
            "learner.objective.aggregation_constant": 6.0,
            "record": True,
            "learner.objective.position_weight": 0.5,
            "learner.microbatch_tokens": 64,
            "learner.head_chunk_tokens": 16,
            "learner.offload_optimizer": True,
            "learner.optimizer.schedule": "linear",
            "learner.optimizer.final_fraction": 0.5,
            "rollout.replicas": 2,
        },
        events=("prompts_cached",),
    ),
    "own": Campaign(
        {
            "teachers": one(dtype="float16"),
            "learner.objective.estimator": f"{OWN}:two_ahead",
            "learner.objective.gamma": 0.5,
            "learner.objective.cost": f"{OWN}:squashed",
            "learner.objective.reward_weight": 0.1,
            "evaluation.verifier": {"name": "numeric", "timeout_seconds": 20},
            "evaluation.prompts": {
                **HELD_OUT,
                "limit": 2,
                "shuffle": False,
                "chat_template_arguments": {"enable_thinking": False},
            },
            "evaluation.teacher": False,
            "prompts.path": "./rows",
            "learner.minibatches_per_update": 2,
        },
    ),
    "immediate": Campaign(
        {
            "teachers": one(signal="hidden", trust_remote_code=True),
            "learner.objective.baseline": "exact_kl",
            "learner.objective.trust_region": {"estimator": "exact", "max_kl": 0.5},
            "learner.objective.log_ratio_power": 0.5,
            "learner.objective.dual_clip": 3.0,
            "student.trust_remote_code": True,
            "learner.optimizer": {
                "beta1": 0.8,
                "beta2": 0.95,
                "epsilon": 1e-6,
                "weight_decay": 0.1,
                "warmup_updates": 1,
                "max_grad_norm": 0.5,
                "schedule": "cosine",
            },
            "prompts.chat": False,
            "prompts.shuffle": False,
            "prompts.limit": 5,
            "prompts.reference_field": None,
            "prompts.prompt_field": "question",
            "prompts.path": "questions.jsonl",
            "evaluation.prompts": {
                "path": "questions.jsonl",
                "prompt_field": "question",
                "reference_field": None,
                "chat": False,
            },
            "seed": 7,
            "output_dir": "elsewhere",
        },
    ),
    "reward": Campaign(
        {
            "teachers": one(),
            "learner.objective.estimator": "reward",
            "evaluation.verifier.name": f"{OWN}:length",
            "evaluation.verifiers": {
                "a": {"name": "tests.own_rewards:graded", "timeout_seconds": 20},
                # No prompt is of these domains: b to d are judged by length, in which answers of noise differ.
                "e": {"name": "exact"},
                "f": {"name": "numeric", "pattern": "[0-9]+"},
                "g": {"name": "math"},
                "h": {"name": "regex", "pattern": "[0-9]+"},
            },
            "prompts.domain_field": "domain",
            "learner.epochs_per_update": 2,
            "learner.objective.clip_low": 0.1,
            "learner.objective.clip_high": 0.3,
            "sampling.stop_token_ids": [20],
        },
    ),
    # Responses of a data set: no other actors; some are cut, and not trained on.
    "copied": Campaign(
        {
            "learner.objective.estimator": "sft",
            "learner.objective.truncated": "mask",
            "sampling.max_response_tokens": 2,
            "prompts.response_field": "answer",
            "pipeline.samples_per_prompt": 1,
            "pipeline.prompts_per_update": 8,
        },
    ),
    "conversations": Campaign(
        {
            "learner.objective.estimator": "sft",
            "pipeline.samples_per_prompt": 1,
            "sampling.max_response_tokens": 30,
            "prompts.path": None,
            "prompts.sources": {
                "talks": {"path": "talks.jsonl", "prompt_field": "messages", "response_field": "messages"},
                "sums": {"path": "./saved", "response_field": "answer"},
            },
            "evaluation.prompts": {
                "sources": {"talks": {"path": "talks.jsonl", "prompt_field": "messages", "response_field": "messages"}}
            },
            "evaluation.max_response_tokens": 4,
        },
    ),
    "sft": Campaign(
        {
            "teachers": one(**SERVED),
            "learner.objective.estimator": "sft",
            "learner.objective.clip_low": None,
            "learner.objective.clip_high": None,
            "prompts.path": "someone/sums",
            "prompts.split": "rest",
            "evaluation.prompts": {"path": "someone/sums", "split": "rest", "response_field": "answer"},
            "evaluation.verifier.name": "math",
        },
    ),
    # Divergences.
    "forward": Campaign(
        {
            "teachers": one(
                model="student", signal="student_topk", top_k=8, ema_decay=0.7, prompt_template="{prompt} is {answer}"
            ),
            "learner.objective.estimator": "full",
            "learner.objective.divergence": "forward_kl",
            "learner.objective.mismatch": {"correction": "truncate", "level": "prefix"},
            "checkpoint": {"every_updates": 1, "keep_last": 1, "keep_best": 0, "mirror": "file://{mirror}"},
            "prompts.chat_template_arguments": {"enable_thinking": False},
            "prompts.path": "train.jsonl.gz",
            "evaluation.prompts": {"path": "heldout.jsonl.gz"},
        },
        events=("mirrored",),
    ),
    "jsd": Campaign(
        {
            "teachers": one(signal="hidden"),
            "learner.objective.estimator": "full",
            "learner.objective.divergence": "jsd",
            "prompts.path": None,
            "prompts.function": f"{OWN}:sums",
            "prompts.function_arguments": {"count": 4},
            "evaluation.prompts": {"function": f"{OWN}:sums", "function_arguments": {"count": 2}},
            "learner.objective.mixture": 0.3,
            "record": True,
            "student.model": "sharded",
            "learner.replicas": 2,
            "learner.sequence_parallel": 2,
            "learner.gpus_per_replica": 0,
            "rollout.gpus_per_replica": 0,
            "weights.encoding": "delta",
            "weights.bucket_mebibytes": 1,
        },
    ),
    "skewed_forward": Campaign(
        {
            "teachers": {
                "wise": teacher(signal="student_topk", top_k=8),
                "base": teacher(model="student", signal="student_topk", top_k=8),
            },
            "learner.objective.estimator": "full",
            "learner.objective.divergence": "skewed_forward_kl",
            "learner.objective.extrapolation": 1.5,
            "learner.objective.reference_teacher": "base",
            "rollout.resources": {"room": 1},
            "learner.resources": {"room": 1},
            "prompts.path": None,
            "prompts.sources": WEIGHED,
            "prompts.max_prompt_tokens": 12,
            "prompts.too_long": "drop",
            "evaluation.prompts": {"sources": SOURCES, "max_prompt_tokens": 12, "too_long": "drop"},
        },
    ),
    "skewed_reverse": Campaign(
        {
            "teachers": one(signal="topk", top_k=8, resources={"room": 1}),
            "learner.objective.estimator": "full",
            "learner.objective.divergence": "skewed_reverse_kl",
            "prompts.path": "train.jsonl.zst",
            "evaluation.prompts": {"path": "more/*.jsonl", "limit": 2},
            "learner.objective.support": "renormalised",
            "rollout.dtype": "float16",
            "learner.compute_dtype": "bfloat16",
        },
    ),
    "gated": Campaign(
        {
            "teachers": one(signal="full", tensor_parallel_size=2, model="sharded"),
            "learner.objective.estimator": "full",
            "learner.objective.divergence": "entropy_gated_kl",
            "prompts.path": "more/*.jsonl",
            "prompts.duplicates": "drop",
            "evaluation.prompts": {"path": "heldout.jsonl.zst", "duplicates": "drop"},
            "learner.objective.entropy_threshold": 1.0,
            "learner.objective.proximal_weight": 0.8,
        },
    ),
    "hellinger": Campaign(
        {
            "teachers": one(signal="full"),
            "prompts.path": "./saved",
            "prompts.tools_field": "utilities",
            "evaluation.prompts": {
                "tools_field": "utilities",
                "path": "questions.parquet",
                "chat": False,
                "prompt_field": "question",
            },
            "learner.objective.estimator": "full",
            "learner.objective.divergence": f"{OWN}:hellinger",
            "ray": {
                "max_restarts": 1,
                "hang_timeout_seconds": 200,
                "start_timeout_seconds": 300,
            },
        },
    ),
    # Guards.
    "watched": Campaign(
        {
            "teachers": one(),
            "learner.objective.recompute_log_ratio": False,
            "prompts.path": None,
            "prompts.sources": {"all": {"path": "more/*.jsonl"}, "first": {"path": "train.jsonl", "limit": 2}},
            "guards": {
                "warns": {"metric": "entropy", "above": 0.0, "action": "warn"},
                "lowers": {"metric": "entropy", "above": 0.0, "updates": 2, "action": "lower_rate", "rate_factor": 0.1},
                "sleeps": {"metric": "entropy", "below": 100.0, "action": "none"},
            },
        },
        events=("guard_warned", "guard_lowered_rate"),
    ),
    "stopped": Campaign(
        {
            "teachers": one(),
            "checkpoint.every_updates": 1,
            "guards": {
                "back": {"metric": "entropy", "above": 0.0, "updates": 2, "action": "roll_back", "at_most": 1},
                "ends": {"metric": "grad_norm", "below": 0.5, "relative_to_updates": 2, "action": "stop"},
            },
        },
        events=("guard_rolled_back", "guard_stopped", "learner_restored", "failed"),
        status=1,
    ),
}
CAMPAIGNS["replayed"] = Campaign(
    {**CAMPAIGNS["discounted"].settings, "record": False, "replay": "runs/discounted"},
    events=("replays", "prompts_cached"),
    after="discounted",
)
"""The same campaign as `discounted`, from its record: tests/integration/test_matrix.py compares their weights."""
CAMPAIGNS["scored"] = Campaign(
    {"teachers": one(signal="topk", top_k=4), "learner.objective.estimator": "sft", "replay": "scored"},
    events=("replays",),
    scores=("train.jsonl", "--response-field", "answer", "--output", "scored"),
)


def overrides(name: str, **places: str) -> list[str]:
    """The settings of a campaign as arguments of `understudy run`. places: the texts for `{url}` and other braces."""
    found = [f"name={name}", f"ray.address={places.get('address', PLACES['address'])}"]
    for key, value in CAMPAIGNS[name].settings.items():
        text = json.dumps(value)
        for place in ("url", "mirror"):
            text = text.replace(f"{{{place}}}", places.get(place, PLACES[place]))
        found.append(f"{key}={text}")
    return found


PLACES = {"url": "http://127.0.0.1:1/v1", "mirror": "/tmp/mirror", "address": "127.0.0.1:1"}
"""What stands for the places that only a run knows."""

EXCEPTIONS: dict[Choice, str] = {
    ("ray.address", "null"): "the campaigns share a cluster; those of test_run.py have private ones",
    ("ray.object_store_mebibytes", "set"): "of a private cluster: test_run.py",
    ("alerts.command", "set"): "calls a program: tests/unit/cluster/test_alerts.py",
    ("alerts.timeout_seconds", "other"): "of these: tests/unit/cluster/test_alerts.py",
    ("alerts.webhook", "set"): "calls a server: tests/unit/cluster/test_alerts.py",
    ("student.optimizer", "keep"): "begins with another campaign's checkpoint: tests/unit/cluster/test_week_two.py",
    ("learner.compile", "true"): "compiling takes half a minute without a GPU: test_compile.py",
    **dict.fromkeys(
        [
            ("student.revision", "set"),
            ("teachers.*.revision", "set"),
            ("teachers.*.tokenizer_revision", "set"),
            *((f"{source}revision", "set") for source in SOURCES_OF_PROMPTS),
            *((f"{source}streaming", "true") for source in SOURCES_OF_PROMPTS),
        ],
        "of names on a hub: test_pins.py and test_sources.py have campaigns on one",
    ),
    ("evaluation.prompts.sources.*.weight", "set"): "refused: each held-out prompt is answered once",
    ("checkpoint.grace_seconds", "set"): "compared with the time of a checkpoint: test_trial.py, test_checkpoints.py",
    ("rollout.tensor_parallel_size", "other"): "half a minute without GPUs: test_tensor_parallel.py",
}
"""Choices that no campaign makes -> why, and where they run."""
