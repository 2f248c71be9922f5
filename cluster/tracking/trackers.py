"""Experiment trackers: TensorBoard, Weights & Biases and MLflow get copies of the metrics. One class each.

Each is built and called in a thread of its own (outbox.py): what a server does, or does not do, cannot hold a campaign up.
Campaigns resume from metrics.jsonl only.
"""

import os
import time
import warnings
from collections.abc import Callable, Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import as_dictionary
from cluster.tracking.outbox import Tracker

MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""By default MLflow tries a request eight times, for two minutes each. The outbox tries again anyway."""


class TensorBoard:
    """Writes event files below the run directory, for `tensorboard --logdir`."""

    def __init__(self, run_dir: Path, next_step: int):
        """next_step: older entries from this step on are removed; an earlier process wrote them before a restart."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=next_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project, named as the campaign. The key comes from the environment (WANDB_API_KEY)."""

    def __init__(self, project: str, config: CampaignConfig):
        import wandb

        run_dir = config.run_dir.resolve()
        same = sha256(str(run_dir).encode()).hexdigest()[:12]  # a resumed campaign continues the same run
        self._run = wandb.init(
            project=project, name=config.name, id=same, dir=run_dir, config=as_dictionary(config), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Marks the run as finished."""
        self._run.finish()


class MLflow:
    """A run of the experiment `understudy` on the tracking server. A resumed campaign finds it by its recorded id."""

    def __init__(self, uri: str, config: CampaignConfig):
        os.environ.update({name: os.environ.get(name, value) for name, value in MLFLOW_PATIENCE.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        known = config.run_dir / "mlflow_run"
        if not known.exists():
            found = self._client.get_experiment_by_name("understudy")
            experiment = found.experiment_id if found else self._client.create_experiment("understudy")
            known.write_text(self._client.create_run(experiment, run_name=config.name).info.run_id)
        self._run_id = known.read_text()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the step in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._run_id)


def make_trackers(
    config: CampaignConfig, more: Mapping[str, Callable[[int], Tracker]] | None = None
) -> dict[str, Callable[[int], Tracker]]:
    """What builds each tracker that the configuration asks for, by its key of `tracking`. UserError: a package is missing.

    more: further ones, which come first.
    """
    tracking = config.tracking
    wanted: list[tuple[str, Any, str, Callable[[int], Tracker]]] = [
        (
            "wandb_project",
            tracking.wandb_project,
            "wandb",
            lambda _: WeightsAndBiases(tracking.wandb_project or "", config),
        ),
        ("mlflow_uri", tracking.mlflow_uri, "mlflow", lambda _: MLflow(tracking.mlflow_uri or "", config)),
        ("tensorboard", tracking.tensorboard, "tensorboardX", lambda step: TensorBoard(config.run_dir, step)),
    ]
    makers = dict(more or {})
    for key, value, package, make in wanted:
        if not value:
            continue
        if find_spec(package) is None:
            raise UserError(f"tracking.{key}", f"{value}, but no package {package}", f"pip install {package}")
        makers[key] = make
    return makers
