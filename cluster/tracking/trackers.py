"""Experiment trackers: what metrics.jsonl gets, others may have too. One interface, a class for each.

A tracker is a copy: metrics.jsonl is what a campaign goes on from. One that fails is told once and left out; a campaign
does not end because a server of curves is away.
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
    """Where curves go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The finite numbers of one step."""

    def close(self) -> None:
        """After the last step."""


class TensorBoard:
    """Event files below the run directory, for `tensorboard --logdir`."""

    def __init__(self, run_dir: Path, next_step: int):
        """next_step: what is there of this step and later ones belongs to a past that was left."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=next_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As Tracker."""
        for name, value in metrics.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """As Tracker."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project, of the campaign's name; the key comes from the environment (WANDB_API_KEY)."""

    def __init__(self, project: str, config: CampaignConfig):
        import wandb

        run_dir = config.run_dir.resolve()
        same = sha256(str(run_dir).encode()).hexdigest()[:12]  # a campaign that is taken up again is the same run
        self._run = wandb.init(
            project=project, name=config.name, id=same, dir=run_dir, config=as_dictionary(config), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As Tracker."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """As Tracker."""
        self._run.finish()


class MLflow:
    """A run of the experiment `understudy` on the tracking server, which is taken up again by its recorded id."""

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
        """As Tracker."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        """As Tracker."""
        self._client.set_terminated(self._run_id)


class Trackers:
    """All trackers of a campaign, of which none can end it."""

    def __init__(self, trackers: Iterable[Tracker], on_failure: Callable[..., None]):
        """on_failure: called with `tracker_failed`, the tracker and the cause, once for each."""
        self._trackers, self._on_failure = list(trackers), on_failure

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: its finite numbers."""
        numbers = {
            name: float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.log(int(record["step"]), numbers))

    def close(self) -> None:
        """Ends all of them."""
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # of a library or a server that is not ours: whatever it is
                self._trackers.remove(tracker)
                self._on_failure(
                    "tracker_failed", tracker=type(tracker).__name__, cause=f"{type(error).__name__}: {error}"
                )


def make_trackers(config: CampaignConfig, next_step: int, more: Iterable[Tracker] = ()) -> list[Tracker]:
    """Those that the configuration asks for. UserError: a package is not installed, or a server refuses us."""
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
        except Exception as error:  # of a library that is not ours, on what the user asked for
            raise UserError(
                f"tracking.{key}", f"{value} ({type(error).__name__}: {error})", "a tracker that answers"
            ) from error
    return trackers
