"""Metrics for Prometheus: gauges that Ray's agent on this node exports (deploy/grafana.json shows them)."""

import re
import threading
from collections.abc import Mapping

from ray.util.metrics import Gauge

REPEAT_SECONDS = 5.0
"""Ray's agent forgets a gauge that nobody has set for two of its export intervals, 20 s. An update takes longer than that, and a
campaign that makes no progress sets none: its gauges have to stay for an alert to see that they stand still."""


class Prometheus:
    """A tracker: a gauge `ray_understudy_<metric>` for each metric, with the campaign's name as the tag `run`.

    A thread sets each gauge again to its last value until `close`; it ends with the process.
    """

    def __init__(self, name: str):
        self._tags = {"run": name}
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._repeat, name="prometheus", daemon=True).start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sets the gauges to the step's values."""
        with self._lock:
            for metric, value in {"step": float(step), **metrics}.items():
                if metric not in self._gauges:
                    name = "understudy_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
                    self._gauges[metric] = Gauge(name, description=f"{metric} of metrics.jsonl", tag_keys=("run",))
                self._values[metric] = value
            self._set()

    def close(self) -> None:
        """Ends the repetition; Ray forgets the gauges within 20 s."""
        self._closed.set()

    def _set(self) -> None:
        for metric, value in self._values.items():
            self._gauges[metric].set(value, tags=self._tags)

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_SECONDS):
            with self._lock:
                self._set()
