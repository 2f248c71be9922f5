"""Every choice of the configuration has run on Ray: the campaigns of tests/matrix_campaigns.py, as a user types them.

They share one Ray, run three at a time, and their processes are forks of one that has imported everything.
"""

import contextlib
import gzip
import json
import math
import os
import secrets
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from safetensors.torch import load_file

from actors.prompts.spool import MANY
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.records.writer import read_jsonl
from cluster.state import recorded
from tests.matrix_campaigns import BASE, CAMPAIGNS, overrides
from tests.matrix_parts import Served, cache_dataset, tracked, write_stubs
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizers import byte_level
from tests.unit.actors.test_http_teacher import serving
from tests.waiting import PATIENCE_SECONDS
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
ORDINARY = {
    *("started", "tried", "loop_started", "first_update", "checkpoint", "finished", "actor_started", "actor_ended"),
    *("waiting_for_resources", "actor_starting", "actor_silent", "actor_heard"),  # on a busy machine
    "pinned",  # of a hub name
    "held_out_overlap",  # the held-out prompts are the first of the training prompts
}
"""Kinds of events that any campaign may record."""

pytestmark = pytest.mark.integration


def make_folder(folder: Path) -> None:
    """Models, prompts in every form, and what stands for trackers."""
    small = {"hidden": 32, "layers": 1, "context": 64}
    make_tiny_model(folder / "student", **small)
    make_tiny_model(folder / "teacher", **small, seed=1)
    make_tiny_model(folder / "larger", hidden=64, layers=2, context=64, seed=2, architecture="llama")
    make_tiny_model(folder / "sharded", hidden=64, layers=1, context=64, seed=3, heads_of_keys=2)
    make_tiny_model(folder / "foreign", hidden=32, layers=1, context=128, seed=4, tokenizer=byte_level())
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "domain": "abcd"[i % 4]} for i in range(8)]
    talks = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["answer"]},
                {"role": "user", "content": "ok?"},
                {"role": "assistant", "content": "yes"},
            ],
            "answer": row["answer"],
        }
        for row in rows
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    asked = [{"question": row["prompt"], "answer": row["answer"]} for row in rows]
    for name, records in (("train", rows), ("heldout", rows[:3]), ("questions", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        datasets.Dataset.from_list(records).to_parquet(folder / f"{name}.parquet")
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress((folder / f"{name}.jsonl").read_bytes()))
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl.zst").write_bytes(
            pa.compress((folder / f"{name}.jsonl").read_bytes(), "zstd", asbytes=True)
        )
    many = (json.dumps({**rows[number % 8], "number": number}) + "\n" for number in range(MANY))
    (folder / "many.jsonl").write_text("".join(many))
    for name in ("rows", "more"):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text((folder / "train.jsonl").read_text())
    (folder / "base.yaml").write_text(BASE)
    write_stubs(folder / "stubs")
    cache_dataset(folder / "hub", "someone", "sums", folder / "train.jsonl")


class Runs:
    """Campaigns that run in the background, in the order in which they were asked for."""

    def __init__(self, folder: Path, python: str, address: str, url: str, environment: dict[str, str]):
        self.folder, self._python, self._environment = folder, python, environment
        self._places = {"url": url, "address": address}
        self._pool = ThreadPoolExecutor(3)
        self._running: dict[str, Future[subprocess.CompletedProcess[str]]] = {}

    def begin(self, name: str) -> None:
        self._running[name] = self._pool.submit(self._run, name)

    def result(self, name: str) -> tuple[CampaignConfig, subprocess.CompletedProcess[str]]:
        arguments = self._arguments(name)
        with contextlib.chdir(self.folder):  # paths in the configuration are relative
            config = load_config(self.folder / "base.yaml", arguments)
        return config, self._running[name].result()

    def _arguments(self, name: str) -> list[str]:
        kept = self.folder / "kept" / name
        kept.mkdir(parents=True, exist_ok=True)
        return overrides(name, mirror=str(kept), **self._places)

    def _run(self, name: str) -> subprocess.CompletedProcess[str]:
        if before := CAMPAIGNS[name].after:
            self._running[before].result()
        arguments = self._arguments(name)
        if CAMPAIGNS[name].scores:
            done = self._command("score", "base.yaml", *CAMPAIGNS[name].scores, *arguments)
            assert done.returncode == 0 and "scored: 8 responses" in done.stdout, done.stdout + done.stderr
        return self._command("run", "base.yaml", *arguments)

    def _command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._python, "-m", "cluster", *arguments],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("m")
    make_folder(folder)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_WAIT_POLICY": "PASSIVE"},
        **{"PYTHONPATH": f"{ROOT}:{folder / 'stubs'}", "HOME": str(folder / "home")},
        **{"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "WISE_KEY": Served.SECRET},
    }
    served = Served({name: folder / name for name in ("teacher", "foreign")}, locked=("foreign",))
    with serving(served) as [url], warm_python(folder, environment) as python:
        keeper = subprocess.Popen(
            [python, "-m", "tests.shared_ray"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert keeper.stdin and keeper.stdout
        try:
            address = keeper.stdout.readline().strip()
            assert address, "Ray did not start"
            found = Runs(folder, python, address, url, environment)
            wanted = [
                item.callspec.params["name"]
                for item in request.session.items
                if hasattr(item, "callspec") and item.module is request.module
            ]  # type: ignore[attr-defined]
            first = [name for name in (CAMPAIGNS[own].after for own in wanted) if name]
            for name in dict.fromkeys([*first, *wanted]):
                found.begin(name)
            yield found
            found._pool.shutdown()
        finally:
            keeper.stdin.close()
            keeper.wait(timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_campaign_runs_to_its_end(name: str, runs: Runs) -> None:
    config, done = runs.result(name)
    wanted = CAMPAIGNS[name]
    assert done.returncode == wanted.status, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stdout + done.stderr
    run_dir = runs.folder / config.run_dir
    kinds = {event["kind"] for event in read_jsonl(run_dir / "events.jsonl")}
    assert kinds - ORDINARY == set(wanted.events)
    assert_ledger_is_exact(run_dir, config)
    assert_metrics_are_sound(run_dir, config)
    if wanted.status == 0:
        assert_weights_moved(runs.folder, run_dir, config)
    if config.record:
        assert recorded.opened(str(run_dir)).updates == config.pipeline.updates
    cached = [row["cause"] for row in read_jsonl(run_dir / "events.jsonl") if row["kind"] == "prompts_cached"]
    assert not cached or (" mapped from " if wanted.after else " kept for the next start in ") in cached[0]
    if wanted.after:
        assert_same_bits(run_dir, runs.folder / runs.result(wanted.after)[0].run_dir)
    if config.tracking.wandb_project is not None:
        assert_trackers_got_everything(run_dir, Path(config.tracking.mlflow_uri.removeprefix("file://")))


def assert_ledger_is_exact(run_dir: Path, config: CampaignConfig) -> None:
    """Every number issued is trained once or dropped, and every update has as many as it should."""
    rows = read_jsonl(run_dir / "ledger.jsonl")
    trained, dropped = (
        [number for row in rows for a, b in row.get(kind, []) for number in range(a, b)]
        for kind in ("trained", "dropped")
    )
    assert all(
        sum(b - a for a, b in row["trained"]) == config.trajectories_per_update for row in rows if "trained" in row
    )
    assert len(set(trained)) == len(trained) and not set(trained) & set(dropped)
    if (run_dir / "summary.json").exists():
        counts = json.loads((run_dir / "summary.json").read_text())["ledger"]
        assert len(trained) == counts["trained"] == config.pipeline.updates * config.trajectories_per_update
        assert sorted(trained + dropped) == list(range(counts["issued"]))


def assert_metrics_are_sound(run_dir: Path, config: CampaignConfig) -> None:
    """All numbers are finite, and the first update is on-policy: ratio 1, nothing clipped."""
    rows = read_jsonl(run_dir / "metrics.jsonl")
    updates = [row for row in rows if row["step"] > 0]
    assert [row["step"] for row in updates] == list(range(1, len(updates) + 1))
    for row in rows:
        wrong = {key: value for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        assert not wrong
    first, learner = updates[0], config.learner
    exact = (config.rollout.dtype, learner.compute_dtype) == ("float32", "float32")
    if learner.objective.estimator != "sft" and learner.minibatches_per_update == learner.epochs_per_update == 1:
        assert first["ratio_mean"] == pytest.approx(1, abs=1e-4 if exact else 0.03)
        assert first["clip_fraction"] == 0
        assert first["forward_kl_old"] == pytest.approx(0, abs=1e-5 if exact else 1e-2)
    assert all(row["staleness_max"] <= config.pipeline.max_staleness for row in updates)
    assert all(row["tokens_trained"] > 0 for row in updates) and max(row["grad_norm"] for row in updates) > 0


def assert_weights_moved(folder: Path, run_dir: Path, config: CampaignConfig) -> None:
    """The last checkpoint is another model than the student, and its numbers are finite."""
    after = load_file(run_dir / "checkpoints" / f"step_{config.pipeline.updates:08d}" / "model.safetensors")
    before = load_file(folder / config.student.model / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(tensor.isfinite().all() for tensor in after.values())
    moved = {name for name in before if not after[name].equal(before[name])}
    adapted = config.student.lora.target_modules if config.student.lora else []
    assert moved and all(any(part in name for part in adapted) for name in moved if adapted)


def assert_same_bits(replayed: Path, first: Path) -> None:
    """The replay has the weights and moments of the campaign that it replays, and has started the learner alone."""
    for file in sorted(first.glob("checkpoints/*/**/*.safetensors")):
        assert (replayed / file.relative_to(first)).read_bytes() == file.read_bytes()
    assert list(first.glob("checkpoints/*/training/optimizer.safetensors"))
    events = read_jsonl(replayed / "events.jsonl")
    assert [event["actor"] for event in events if event["kind"] == "actor_started"] == ["learner-0"]


def assert_trackers_got_everything(run_dir: Path, mlflow: Path) -> None:
    for rows in (tracked(run_dir / "wandb.jsonl"), tracked(mlflow)):
        assert {row.get("step") for row in rows} == {1, 2, None} and rows[-1] == {"finished": True}
