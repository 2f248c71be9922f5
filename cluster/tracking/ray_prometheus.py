"""Metrics for Prometheus: gauges that Ray's agent on this node exports (deploy/grafana.json shows them)."""

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


class Prometheus:
    """A tracker: a gauge `ray_understudy_<metric>` for each metric, with the campaign's name as the tag `run`."""

    def __init__(self, name: str):
        self._name = name
        self._gauges: dict[str, Gauge] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sets the gauges to the step's values."""
        for metric, value in {"step": float(step), **metrics}.items():
            if metric not in self._gauges:
                name = "understudy_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
                self._gauges[metric] = Gauge(name, description=f"{metric} of metrics.jsonl", tag_keys=("run",))
            self._gauges[metric].set(value, tags={"run": self._name})

    def close(self) -> None:
        """Does nothing: Ray keeps the last values as long as this process lives."""
