"""Understudy beside TRL's DistillationTrainer: the same student, teacher, prompts and number of trajectories, on the
same cores, in turns; prints Markdown tables.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.19.0
    python -m benchmarks.trl_comparison --trl-python /tmp/trl/bin/python update [demo long] [--rounds 2] [--threads 2]
    python -m benchmarks.trl_comparison --trl-python /tmp/trl/bin/python loop [demo long] [--rounds 2] [--threads 1]

demo: written addition (examples/addition), answers of 30 to 52 tokens; 64 trajectories an update. long: counting down
with a student of 7M parameters (benchmarks/countdown.py), answers of log-normal length, median 64, cut at 512; 64 an
update. smollm2: SmolLM2-135M-Instruct (--model) is its own teacher, on prompts of examples/heal, whose answers are of mixed
length and cut at --tokens; 16 an update. Both compute in float32, minimise the reverse KL over the whole vocabulary, and
step with AdamW at the same rates.

update: one process each is given the same trajectories and takes them through the teacher, the student's forward and
backward pass, and the optimiser; the losses of both are printed, and must agree.
loop: campaigns beside whole trainings, sampling included. TRL samples with transformers' `generate`: its vLLM mode needs
GPUs. Start-up is apart: from the start of the process to the first update. Updates to 95% of the teacher's accuracy are
counted in runs of their own that evaluate after every second update; the seconds are those of so many updates.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import countdown, watch

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 0.95
"""Of the teacher's accuracy."""


@dataclass
class Setting:
    """What both sides do; the first of them reads it as JSON."""

    student: str
    teacher: str
    prompts: str
    held_out: str
    chat: bool
    max_response_tokens: int
    learning_rate: float
    trl_microbatch: int
    output: str
    trajectories: int = 64
    """Of an update."""
    updates: int = 8
    threads: int = 1
    given: str = ""
    """File of the trajectories, where they are given."""
    evaluate_every: int = 0
    config: str = "configs/quickstart.yaml"
    """What our campaign has where the setting says nothing."""
    signal: str = "full"
    """Of our teacher."""


def demo(folder: Path) -> Setting:
    """Short answers of nearly one length."""
    task = ROOT / "examples" / "addition"
    files = [str(task / name) for name in ("student", "teacher", "train.jsonl", "heldout.jsonl")]
    return Setting(*files, True, 80, 2e-4, 64, str(folder))


def long(folder: Path) -> Setting:
    """Answers with a long tail."""
    task = folder / "countdown"
    countdown.make(task, median=64, sigma=1.0, longest=512, prompts=2048)
    files = [str(task / name) for name in ("student", "teacher", "train.jsonl")]
    return Setting(*files, "", False, 512, 1e-5, 16, str(folder), updates=4)


def smollm2(folder: Path, model: str, tokens: int) -> Setting:
    """A real model with 49,152 tokens."""
    prompts, microbatch = str(ROOT / "examples" / "heal" / "train.jsonl"), max(1, 1024 // tokens)
    return Setting(
        *(model, model, prompts, "", True, tokens, 2e-5, microbatch, str(folder)),
        trajectories=16,
        updates=3,
        config="examples/heal/heal_short.yaml",
        signal="hidden",
    )


def write_trajectories(setting: Setting, file: Path) -> None:
    """What the student answers to the first prompts, sampled."""
    import torch

    from actors.config import PromptsConfig, TeacherConfig
    from actors.data.tokenizer import load_tokenizer
    from actors.prompts.prompt_set import load_prompts
    from actors.teacher.local import LocalTeacher
    from actors.trajectory import Limits, Prompts, offsets_of

    torch.manual_seed(0)
    tokenizer = load_tokenizer(setting.student, False, "student.model")
    source = PromptsConfig(path=setting.prompts, chat=setting.chat, reference_field=None)
    prompts = load_prompts(source, tokenizer, 512, "prompts")
    student = LocalTeacher(TeacherConfig(setting.student, dtype="float32"))
    count = setting.trajectories * setting.updates
    asked = [np.asarray(prompts.tokens_of(row)) for row in range(count)]
    written, lengths = [], []
    for start in range(0, count, setting.trajectories):
        rows = asked[start : start + setting.trajectories]
        tokens, offsets = student.generate(
            Prompts(np.concatenate(rows), offsets_of([len(row) for row in rows])),
            Limits(setting.max_response_tokens, [tokenizer.eos_token_id]),
            do_sample=True,
            top_k=0,
        )
        written.append(tokens)
        lengths.extend(np.diff(offsets).tolist())
    np.savez(
        file,
        prompt_tokens=np.concatenate(asked).astype(np.int32),
        prompt_offsets=offsets_of([len(row) for row in asked]),
        response_tokens=np.concatenate(written),
        response_offsets=offsets_of(lengths),
    )


def our_updates(setting: Setting) -> dict[str, Any]:
    """Teacher and learner in this process, one after the other, on the given trajectories."""
    started = time.perf_counter()
    import torch

    from actors.config import StudentConfig, TeacherConfig
    from actors.teacher.local import LocalTeacher
    from actors.trajectory import Trajectories
    from learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
    from learner.learner import Learner

    torch.set_num_threads(setting.threads)
    budget = 2048  # as in configs/quickstart.yaml
    teacher = LocalTeacher(
        TeacherConfig(setting.teacher, signal=setting.signal, dtype="float32", microbatch_tokens=budget)
    )
    learner = Learner(
        StudentConfig(setting.student),
        LearnerConfig(
            compute_dtype="float32",
            microbatch_tokens=budget,
            objective=ObjectiveConfig(estimator="full"),
            optimizer=OptimizerConfig(learning_rate=setting.learning_rate, warmup_updates=0),
        ),
        total_updates=setting.updates,
        temperature=1.0,
        publish_dtype="float32",
        bucket_bytes=1 << 24,
    )
    stored = np.load(setting.given)
    prompts = np.split(stored["prompt_tokens"], stored["prompt_offsets"][1:-1])
    responses = np.split(stored["response_tokens"], stored["response_offsets"][1:-1])
    found: dict[str, Any] = {"start": time.perf_counter() - started, "wall": [], "cpu": [], "losses": []}
    for start in range(0, len(prompts), setting.trajectories):
        written = trajectories(prompts[start:][: setting.trajectories], responses[start:][: setting.trajectories])
        wall, cpu = time.perf_counter(), time.process_time()
        assert isinstance(written, Trajectories)
        _, scores = teacher.score(written.ids, written)
        metrics = learner.update(written.ids, written, scores)
        found["wall"].append(time.perf_counter() - wall)
        found["cpu"].append(time.process_time() - cpu)
        found["losses"].append(metrics["loss"])
    return found


def trajectories(prompts: list[np.ndarray], responses: list[np.ndarray]) -> Any:
    """The same as the type that passes between roles; their behaviour log-probs are of no consequence here."""
    from actors.trajectory import Trajectories, offsets_of

    tokens = np.concatenate(responses)
    return Trajectories(
        ids=np.array([(0, row, 0) for row in range(len(prompts))]),
        prompt_tokens=np.concatenate(prompts),
        prompt_offsets=offsets_of([len(row) for row in prompts]),
        response_tokens=tokens,
        response_offsets=offsets_of([len(row) for row in responses]),
        behaviour_logprobs=np.zeros(len(tokens), np.float32),
        policy_versions=np.zeros(len(tokens), np.int32),
        finish_reasons=np.zeros(len(prompts), np.uint8),
    )


def process(setting: Setting, *command: str) -> dict[str, Any]:
    """Runs one side with the setting as its last argument; what it printed last."""
    done = subprocess.run(
        [*command, json.dumps(asdict(setting))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def campaign(setting: Setting, overrides: list[str]) -> dict[str, Any]:
    """One campaign with the quickstart's configuration but for the setting: seconds of each update, accuracy by update."""
    run = Path(tempfile.mkdtemp(dir=setting.output))
    never = setting.updates + 1
    settings = {
        "output_dir": run.parent,
        "name": run.name,
        "student.model": setting.student,
        "teachers.default.model": setting.teacher,
        "prompts.path": setting.prompts,
        "prompts.chat": setting.chat,
        "evaluation.every_updates": setting.evaluate_every or never,
        "checkpoint.every_updates": never,
        "pipeline.updates": setting.updates,
        "pipeline.prompts_per_update": setting.trajectories,
        "sampling.max_response_tokens": setting.max_response_tokens,
        "learner.optimizer.learning_rate": setting.learning_rate,
        "learner.optimizer.final_fraction": 0,
    }
    if not setting.held_out:
        settings |= {"evaluation.prompts": "null", "evaluation.sets": "{}", "prompts.reference_field": "null"}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "cluster", "run", setting.config, *pairs, *overrides]
    at = [1, setting.updates - bool(setting.held_out)]  # after the last update comes an evaluation
    with (run.parent / f"{run.name}.log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        seen = watch.marks(process, run / "metrics.jsonl", at)
        if process.wait():
            raise RuntimeError(f"the campaign ended with {process.returncode}:\n{Path(log.name).read_text()[-4000:]}")
    rows = watch.rows(run / "metrics.jsonl")
    ends = [row["wall_seconds"] for row in rows if row["step"] > 0]
    (first, before), (last, after) = ((mark.update, sum(seconds for _, seconds in mark.used.values())) for mark in seen)
    return {
        "start": next(row["seconds"] for row in watch.rows(run / "events.jsonl") if row["kind"] == "first_update"),
        "wall": np.diff([ends[0], *ends]).tolist(),
        "cpu": [(after - before) / (last - first)]
        * setting.updates,  # of all processes, the campaign's and Ray's own among them
        "accuracy": {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row},
        "teacher": rows[0].get("eval/accuracy_teacher"),
    }


def updates_until(accuracy: dict[Any, float], wanted: float) -> int | None:
    """The first update after which the accuracy was as wanted."""
    return next((int(step) for step, value in accuracy.items() if int(step) and value >= wanted), None)


def in_turns(sides: dict[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Each side once in every round, one after the other."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            found[name].append(run())
            print(f"{name}: {np.mean(found[name][-1]['wall'][1:]):.3f} s an update", file=sys.stderr, flush=True)
    return found


def per_thousand(runs: list[dict[str, Any]], field: str, trajectories: int) -> float:
    """Seconds for 1,000 trajectories: the mean over a run's updates but the first, and of the runs the fastest: other
    work on the machine only ever adds."""
    return 1000 / trajectories * min(float(np.mean(run[field][1:])) for run in runs)


def compare_updates(setting: Setting, trl_python: str, rounds: int) -> None:
    """The table of `update`."""
    setting = replace(setting, given=str(Path(setting.output, "trajectories.npz")))
    write_trajectories(setting, Path(setting.given))
    lengths = np.diff(np.load(setting.given)["response_offsets"])
    found = in_turns(
        {
            "TRL": lambda: process(setting, trl_python, "benchmarks/trl_side.py"),
            "Understudy": lambda: process(setting, sys.executable, "-m", "benchmarks.trl_comparison", "--ours"),
        },
        rounds,
    )
    print(f"\nAnswers: median {np.median(lengths):.0f}, mean {lengths.mean():.0f}, longest {lengths.max()} tokens.\n")
    print("| side | seconds / 1,000 trajectories | processor seconds / 1,000 | losses |\n|---|---|---|---|")
    for name, runs in found.items():
        wall, cpu = (per_thousand(runs, field, setting.trajectories) for field in ("wall", "cpu"))
        losses = " ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:4])
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {losses} … |")
    for field in ("wall", "cpu"):
        trl, ours = (per_thousand(runs, field, setting.trajectories) for runs in found.values())
        print(f"\nTRL / Understudy, {field}: {trl / ours:.2f}")


def compare_loops(setting: Setting, trl_python: str, rounds: int, overrides: list[str]) -> None:
    """The table of `loop`."""
    sides: dict[str, Callable[[Setting], dict[str, Any]]] = {
        "TRL": lambda s: process(s, trl_python, "benchmarks/trl_side.py"),
        "Understudy, K = 0": lambda s: campaign(s, overrides),
        "Understudy, K = 1": lambda s: campaign(s, ["pipeline.max_staleness=1", *overrides]),
    }
    steps: dict[str, int | None] = dict.fromkeys(sides)
    if setting.held_out:
        judged = replace(setting, updates=60, evaluate_every=2)
        judgements = {name: run(judged) for name, run in sides.items()}
        wanted = ENOUGH * judgements["Understudy, K = 0"]["teacher"]
        steps = {name: updates_until(found["accuracy"], wanted) for name, found in judgements.items()}
    timed = replace(setting, updates=40) if setting.held_out else setting
    found = in_turns({name: (lambda run=run: run(timed)) for name, run in sides.items()}, rounds)
    columns = (
        "side",
        "start-up",
        "seconds / 1,000 trajectories",
        "TRL / this",
        "processor seconds / 1,000",
        "TRL / this",
    )
    columns += ("updates to 95%", "seconds to 95%")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    each, spent = (
        {name: per_thousand(runs, field, setting.trajectories) for name, runs in found.items()}
        for field in ("wall", "cpu")
    )
    for name, runs in found.items():
        start, needed = median(run["start"] for run in runs), steps[name]
        until = "" if needed is None else f"{needed * setting.trajectories * each[name] / 1000:.1f}"
        ratios = [f"{of[name]:.2f} | {of['TRL'] / of[name]:.2f}" for of in (each, spent)]
        print(f"| {name} | {start:.1f} | {' | '.join(ratios)} | {needed or ''} | {until} |")


def main() -> None:
    """Parses the command line, and compares."""
    if sys.argv[1] == "--ours":
        print(json.dumps(our_updates(Setting(**json.loads(sys.argv[2])))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["update", "loop"])
    parser.add_argument("settings", nargs="*", default=["demo", "long"], help="demo, long, smollm2")
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of TRL, and of each side where trajectories are given")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="of smollm2")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most, of smollm2")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for the campaign")
    chosen = parser.parse_args()
    for name in chosen.settings:
        with tempfile.TemporaryDirectory() as folder:
            if name == "smollm2":
                setting = smollm2(Path(folder), chosen.model, chosen.tokens)
            else:
                setting = {"demo": demo, "long": long}[name](Path(folder))
            setting = replace(setting, threads=chosen.threads)
            print(f"\n## {name}, {chosen.what}")
            if chosen.what == "update":
                compare_updates(setting, chosen.trl_python, chosen.rounds)
            else:
                compare_loops(setting, chosen.trl_python, chosen.rounds, chosen.override)


if __name__ == "__main__":
    main()
