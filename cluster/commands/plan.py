"""`understudy plan`: the stages of a campaign, from a measured run, a short calibration run, or data sheets."""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.errors import UserError
from actors.vllm_options import check_options
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.console.status import live_status, read_status
from cluster.planning.datasheet import (
    GPUS,
    Gpu,
    Load,
    ModelSize,
    cached_sequences,
    learner_seconds,
    rollout_seconds,
    teacher_seconds,
)
from cluster.planning.measured_run import environments_of, gpus_of, plan_of_run
from cluster.planning.memory import network_without_memory, roles
from cluster.planning.throughput import Plan, Stage, mean_of
from cluster.records.utilisation import role_of
from cluster.records.writer import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, read_jsonl, summary_if_whole
from learner.memory_items import peak

CALIBRATION_UPDATES = 4


def from_run(config: CampaignConfig, run_dir: Path) -> Plan:
    """The plan of `config` with the speed of a run: its work for one update, scaled by the number of trajectories.

    A run that has not ended is measured by the updates of its newest process so far. UserError: fewer than two of them.
    """
    if not (run_dir / CONFIG_FILE).exists():
        raise UserError("--run", run_dir, "the directory of a run, or --calibrate, or --gpu NAME")
    ran = load_config(run_dir / CONFIG_FILE, environment=False)
    summary = summary_if_whole(run_dir)
    metrics = [row for row in read_jsonl(run_dir / METRICS_FILE, checked=True) if row["step"] > 0]
    if not summary:
        metrics, summary = _so_far(run_dir, metrics, ran.replicas)
    counted = summary["actors"]["mean"] if "actors" in summary else ran.replicas
    try:
        plan = plan_of_run(ran, summary, counted, metrics, live_status(run_dir))
    except ValueError as error:
        raise UserError("--run", f"{run_dir} ({error})", "a run that has taken updates") from error
    # Work is proportional to trajectories; the fixed part of an update is ignored (docs/benchmarks.md measures the error).
    share = config.trajectories_per_update / ran.trajectories_per_update
    replicas, gpus = config.replicas, gpus_of(config)
    stages = tuple(
        replace(s, work_seconds=s.work_seconds * share, replicas=replicas[s.role], gpus_per_replica=gpus[s.role])
        for s in plan.stages
        if not s.at_once
    )
    thinking = mean_of(metrics, "environment_seconds_mean")
    if thinking and config.environment is not None:
        stages += (environments_of(config, thinking),)
    return replace(plan, stages=stages, overlapped=config.pipeline.max_staleness > 0)


def _so_far(
    run_dir: Path, metrics: list[dict[str, Any]], configured: Mapping[str, int]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The updates of the newest process after its first, and what a summary would say of them."""
    events = read_jsonl(run_dir / EVENTS_FILE)
    began = [event.get("step") or 0 for event in events if event["kind"] == "loop_started"]
    rows = [row for row in metrics if row["step"] > (began[-1] if began else 0)]
    if len(rows) < 2:
        raise UserError("--run", f"{run_dir}, which has taken {len(rows)} updates", "a run that has taken at least two")
    status = read_status(run_dir)
    there = Counter(role_of(actor["name"]) for actor in status["actors"])
    print(f"{run_dir} is {status['state']}: measured over updates {rows[1]['step']} to {rows[-1]['step']}")
    return rows[1:], {
        "updates": len(rows) - 1,
        "busy": {role: sum(row.get(f"busy_{role}", 0.0) for row in rows[1:]) for role in configured},
        "loop_seconds": rows[-1]["wall_seconds"] - rows[0]["wall_seconds"],
        "actors": {"mean": {role: there[role] or count for role, count in configured.items()}},
    }


def from_calibration(config: CampaignConfig, run: Callable[[CampaignConfig], Any]) -> Plan:
    """The plan from a run of CALIBRATION_UPDATES updates in a temporary directory.

    run: runs a campaign to its end (`cluster.run.run_campaign`).
    """
    with tempfile.TemporaryDirectory(prefix="understudy-plan-") as folder:
        short = dataclasses.replace(
            config,
            name="calibration",
            output_dir=folder,
            pipeline=replace(config.pipeline, updates=CALIBRATION_UPDATES),
            evaluation=replace(config.evaluation, prompts=None),
        )
        run(short)
        return from_run(config, short.run_dir)


def from_data_sheet(config: CampaignConfig, gpu_name: str, load: Load) -> tuple[Plan, list[list[str]]]:
    """The plan on GPUs of this name, and a table of memory: [role, what, GB of one GPU, GB that it has].

    UserError: an unknown GPU, or a model whose configuration cannot be read.
    """
    if gpu_name not in GPUS:
        raise UserError("--gpu", gpu_name, "a GPU that is known", list(GPUS))
    gpu, gpus, replicas = GPUS[gpu_name], gpus_of(config), config.replicas
    student = model_size(config.student.source, config.student.trust_remote_code, "student.model")
    teachers = {
        name: model_size(teacher.source, teacher.trust_remote_code, f"teachers.{name}.model")
        for name, teacher in config.teachers.items()
    }
    largest = max(teachers.values(), key=lambda size: size.parameters)
    check_options(config.rollout.engine, "rollout.engine")
    concurrency = int(config.rollout.engine.get("max_num_seqs", 256))
    seconds = {
        "rollout": rollout_seconds(load, student, gpu, max(gpus["rollout"], 1), concurrency),
        "teacher": teacher_seconds(load, largest, gpu, max(gpus["teacher"], 1)),
        "learner": learner_seconds(load, student, gpu, replicas["learner"], config.learner.gradient_checkpointing),
    }
    stages = tuple(Stage(role, seconds[role], replicas[role], gpus[role]) for role in seconds)
    sequences = cached_sequences(load, student, gpu, max(gpus["rollout"], 1))
    memory = [["role", "of one GPU", "GB", "of"], *_memory(config, gpu)]
    memory[1][1] += f"; the rest holds {sequences:,.0f} sequences"
    return Plan(stages, config.pipeline.max_staleness > 0), memory


def _memory(config: CampaignConfig, gpu: Gpu) -> list[list[str]]:
    """[role, its largest items, GB, GB of the GPU] for an engine, the largest teacher and a rank of the learner."""
    held = {role.name: peak(role.device) for role in roles(config)}
    largest = max((name for name in held if name.startswith("teachers.")), key=lambda name: held[name][0])
    rows = []
    for name, (nbytes, items) in zip(
        ("rollout", "teacher", "learner"), (held["rollout"], held[largest], held["learner"]), strict=True
    ):
        parts = ", ".join(item.name for item in sorted(items, key=lambda item: -item.nbytes)[:4])
        fits = "" if nbytes <= 0.95 * gpu.memory else ", does not fit"
        rows.append([name, parts, f"{nbytes / 1e9:.3g}", f"{gpu.memory / 1e9:.0f}{fits}"])
    return rows


def model_size(model: str, trust_remote_code: bool, key: str) -> ModelSize:
    """Sizes from config.json alone, without reading weights. If a token uses k of E experts, k / E of their parameters are
    active."""
    network = network_without_memory(model, trust_remote_code, key)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    total, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
    text = network.config.get_text_config()
    count = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    idle = experts * (1 - getattr(text, "num_experts_per_tok", count) / count)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        parameters=total,
        active_parameters=total - idle,
        cache_bytes_per_token=2.0 * 2 * text.num_hidden_layers * heads * width,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
    )
