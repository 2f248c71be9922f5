"""Experiment trackers: TensorBoard, Weights & Biases and MLflow get copies of the metrics. One class each.

A tracker that fails is reported once and gets nothing more: an unreachable server must not end a campaign. Campaigns
resume from metrics.jsonl only.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import as_dictionary


class Tracker(Protocol):
    """Receives the metrics of each step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """metrics: the finite numbers of one line of metrics.jsonl."""

    def close(self) -> None:
        """Called after the last step."""


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


class Trackers:
    """All trackers of a campaign. None of them can end it."""

    def __init__(self, trackers: Iterable[Tracker], on_failure: Callable[..., None]):
        """on_failure: called once for a tracker that fails, with `tracker_failed`, its name and the cause."""
        self._trackers, self._on_failure = list(trackers), on_failure

    def log(self, record: Mapping[str, Any]) -> None:
        """Sends the finite numbers of a line of metrics.jsonl to all trackers."""
        numbers = {
            name: float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.log(int(record["step"]), numbers))

    def close(self) -> None:
        """Closes all trackers."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):  # a copy: failing trackers are removed meanwhile
            try:
                call(tracker)
            except Exception as error:  # a foreign library or server may raise anything
                self._trackers.remove(tracker)
                self._on_failure(
                    "tracker_failed", tracker=type(tracker).__name__, cause=f"{type(error).__name__}: {error}"
                )


def make_trackers(config: CampaignConfig, next_step: int, more: Iterable[Tracker] = ()) -> list[Tracker]:
    """The trackers that the configuration asks for. UserError: a package is missing, or a server refuses the connection.

    more: further trackers, which come first.
    """
    tracking = config.tracking
    wanted: list[tuple[str, Any, str, Callable[[], Tracker]]] = [
        (
            "wandb_project",
            tracking.wandb_project,
            "wandb",
            lambda: WeightsAndBiases(tracking.wandb_project or "", config),
        ),
        ("mlflow_uri", tracking.mlflow_uri, "mlflow", lambda: MLflow(tracking.mlflow_uri or "", config)),
        ("tensorboard", tracking.tensorboard, "tensorboardX", lambda: TensorBoard(config.run_dir, next_step)),
    ]
    trackers = list(more)
    for key, value, package, make in wanted:
        if not value:
            continue
        if find_spec(package) is None:
            raise UserError(f"tracking.{key}", f"{value}, but no package {package}", f"pip install {package}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trackers.append(make())
        except Exception as error:  # a foreign library may raise anything for what the user asked
            raise UserError(
                f"tracking.{key}", f"{value} ({type(error).__name__}: {error})", "a tracker that answers"
            ) from error
    return trackers
