"""What the campaigns of the matrix need beside models: code of the user's own, a teacher's server, trackers, a cached dataset."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from actors.data.models import load_model
from actors.teacher.backends import SIGNALS, Backend
from actors.teacher.local import LocalTeacher


class OwnTeacher(LocalTeacher):
    """A teacher backend from outside the package: LocalTeacher with an option of its own."""

    backend = Backend(
        signals=SIGNALS, samples=True, follows_student=True, has_model_files=True, tempers=True, settings=("engine",)
    )

    def __init__(self, config: Any, *arguments: Any, **keywords: Any):
        assert config.engine == {"own": "option"}
        super().__init__(config, *arguments, **keywords)


def two_ahead(log_ratio_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float) -> torch.Tensor:
    """An estimator: A_t = r_t + gamma r_(t+1)."""
    return log_ratio_BT + gamma * torch.nn.functional.pad(log_ratio_BT, (0, 1))[:, 1:]


two_ahead.discounts = True  # type: ignore[attr-defined]


def hellinger(student_logprobs_nK: torch.Tensor, teacher_logprobs_nK: torch.Tensor) -> torch.Tensor:
    """A divergence: 1 - sum_k sqrt(pi_k q_k)."""
    return 1 - ((student_logprobs_nK + teacher_logprobs_nK) / 2).exp().sum(-1)


def squashed(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """A cost: the log-ratio, bounded smoothly by 5 nats."""
    return 5 * torch.tanh((student_logprobs - teacher_logprobs) / 5)


def length(response: str, reference: str | None) -> float:
    """A verifier: how many different characters a response has, of eight."""
    return min(len(set(response)), 8) / 8


class Served:
    """A server of several models, by the names under which it has them: the log-probs of prompts, and greedy responses.

    It takes part in tests.unit.actors.test_http_teacher.serving. The models in `locked` need the key SECRET.
    """

    SECRET = "of the matrix"

    def __init__(self, models: dict[str, Path], locked: tuple[str, ...] = ()):
        self._models = {name: load_model(str(path), "float32", "cpu", False, "a") for name, path in models.items()}
        self._locked = locked

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] in self._locked and request.headers.get("Authorization") != f"Bearer {self.SECRET}":
            return web.json_response({"error": "no"}, status=401)
        answer = self._scores(body) if "prompt_logprobs" in body else self._response(body)
        return web.json_response({"choices": [{"text": "", **answer}]})

    @torch.no_grad()
    def _logprobs(self, body: dict[str, Any], text: list[int]) -> torch.Tensor:
        return self._models[body["model"]](torch.tensor([text])).logits[0].log_softmax(-1)

    def _scores(self, body: dict[str, Any]) -> dict[str, Any]:
        text, count, places = body["prompt"], body["prompt_logprobs"], []
        for row, token in zip(self._logprobs(body, text)[:-1], text[1:], strict=True):
            listed = {*row.topk(count).indices.tolist(), token}
            places.append({str(other): {"logprob": row[other].item()} for other in listed})
        return {"prompt_logprobs": [None, *places]}

    def _response(self, body: dict[str, Any]) -> dict[str, Any]:
        """Greedy at the temperature 0, else sampled with the request's seed."""
        written: list[int] = []
        draw = torch.Generator().manual_seed(body.get("seed", 0))
        while len(written) < body["max_tokens"] and not {*written[-1:]} & {*body["stop_token_ids"]}:
            logprobs = self._logprobs(body, body["prompt"] + written)[-1]
            likely = logprobs.exp() if body["temperature"] else (logprobs == logprobs.max()).float()
            written.append(int(torch.multinomial(likely, 1, generator=draw)))
        return {"logprobs": {"tokens": [f"token_id:{token}" for token in written]}}


def cache_dataset(home: Path, owner: str, name: str, file: Path) -> None:
    """Makes a JSONL file the split `rest` of a dataset that was fetched from the hub once. home: HF_HOME."""
    import datasets

    made = datasets.load_dataset_builder("json", data_files={"rest": str(file)}, cache_dir=str(home / "building"))
    made.download_and_prepare()
    cached = home / "datasets" / f"{owner}___{name}" / "default" / "0.0.0" / ("0" * 40)
    shutil.copytree(made.cache_dir, cached)
    (cached / "json-rest.arrow").rename(cached / f"{name}-rest.arrow")
    described = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps({**described, "dataset_name": name}))


STUBS = {
    "wandb.py": """
import json, os
class Run:
    def __init__(self, folder): self.file = open(os.path.join(folder, "wandb.jsonl"), "a")
    def log(self, metrics, step): self.write({"step": step, **metrics})
    def finish(self): self.write({"finished": True})
    def write(self, row): self.file.write(json.dumps(row) + "\\n"); self.file.flush()
def init(project, name, id, dir, config, resume): return Run(dir)
""",
    "mlflow/__init__.py": "",
    "mlflow/entities.py": """
class Metric:
    def __init__(self, key, value, timestamp, step): self.row = {"name": key, "value": value, "step": step}
""",
    "mlflow/tracking.py": """
import json, types
class MlflowClient:
    def __init__(self, tracking_uri): self.path = tracking_uri.removeprefix("file://")
    def get_experiment_by_name(self, name): return None
    def create_experiment(self, name): return "1"
    def create_run(self, experiment, run_name): return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_name))
    def log_batch(self, run_id, metrics): self.write([metric.row for metric in metrics])
    def set_terminated(self, run_id): self.write([{"finished": True}])
    def write(self, rows):
        with open(self.path, "a") as file: file.writelines(json.dumps(row) + "\\n" for row in rows)
""",
}
"""Modules that stand for trackers which are not installed: they write what they get to a file."""


def write_stubs(folder: Path) -> None:
    """Writes the modules of STUBS below a folder, for PYTHONPATH."""
    for name, text in STUBS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def tracked(file: Path) -> list[dict[str, Any]]:
    """What a stub has written."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def sums(count: int = 3) -> Iterator[dict[str, str]]:
    """Records, as a user's own function yields them."""
    for i in range(count):
        yield {"prompt": f"{i}+1=", "answer": str(i + 1)}
