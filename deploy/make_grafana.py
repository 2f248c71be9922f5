"""Writes deploy/grafana.json: a dashboard of the gauges that campaigns export through Ray (`python deploy/make_grafana.py`)."""

import json
from pathlib import Path

PANELS = {
    "Progress": [
        ("Updates taken", ["step"], "short"),
        ("Held-out accuracy", ["eval_accuracy", "eval_accuracy_sampled"], "percentunit"),
        ("Reverse KL", ["reverse_kl", "eval_reverse_kl"], "short"),
        ("Tokens sampled", ["tokens_generated"], "short"),
    ],
    "Health": [
        ("Entropy", ["entropy"], "short"),
        ("Gradient norm", ["grad_norm"], "short"),
        ("Response length", ["response_length_mean"], "short"),
        ("Truncated", ["truncated_fraction"], "percentunit"),
    ],
    "Pipeline": [
        ("Busy seconds an update", ["busy_rollout", "busy_teacher", "busy_learner"], "s"),
        ("Staleness", ["staleness_mean", "staleness_max"], "short"),
        ("Dropped trajectories", ["dropped"], "short"),
        ("Publishing weights", ["publish_seconds"], "s"),
    ],
}
"""Row -> panels: (title, metrics of metrics.jsonl with their names as gauges, unit)."""


def dashboard() -> dict:
    """The dashboard as Grafana imports it; the data source and the campaigns are chosen on the page."""
    panels: list[dict] = []
    y = 0
    for row, charts in PANELS.items():
        panels.append(
            {"type": "row", "title": row, "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}, "id": len(panels) + 1}
        )
        for i, (title, metrics, unit) in enumerate(charts):
            targets = [
                {
                    "expr": f'ray_understudy_{metric}{{run=~"$run"}}',
                    "legendFormat": "{{run}}" if len(metrics) == 1 else f"{{{{run}}}} {metric}",
                    "refId": chr(65 + j),
                }
                for j, metric in enumerate(metrics)
            ]
            panels.append(
                {
                    "type": "timeseries",
                    "title": title,
                    "id": len(panels) + 1,
                    "datasource": {"type": "prometheus", "uid": "$datasource"},
                    "gridPos": {"h": 7, "w": 6, "x": 6 * i, "y": y + 1},
                    "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                    "targets": targets,
                }
            )
        y += 8
    source = {"type": "prometheus", "uid": "$datasource"}
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "type": "query",
            "datasource": source,
            "query": "label_values(ray_understudy_step, run)",
            "multi": True,
            "includeAll": True,
            "refresh": 2,
        },
    ]
    return {
        "title": "Understudy",
        "uid": "understudy",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }


if __name__ == "__main__":
    path = Path(__file__).parent / "grafana.json"
    path.write_text(json.dumps(dashboard(), indent=2) + "\n", "utf-8")
    print(path)
