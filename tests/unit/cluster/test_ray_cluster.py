"""The resources that each role needs, compared with those of a cluster. No cluster is started."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from actors.errors import UserError
from cluster import preflight as check
from cluster.fleet import ray_cluster
from cluster.fleet.ray_cluster import check_fits, role_resources, room_to_begin
from tests.small_config import config


def test_roles_that_ask_for_resources_of_their_own_get_them(tmp_path: Path) -> None:
    wanted = config(tmp_path, "rollout.resources={big: 1}", "rollout.replicas=2", "learner.resources={fast: 0.5}")
    needed = role_resources(wanted, 8.0, private=False)
    assert {name: one.custom for name, (_, one) in needed.items()} == {
        "rollout": {"big": 1.0},
        "teacher.default": {},
        "learner": {"fast": 0.5},
    }
    check_fits(needed, {"CPU": 8, "GPU": 8, "big": 2, "fast": 1}, "here")


@pytest.mark.parametrize("private", [True, False])
def test_an_actor_on_a_gpu_has_as_many_threads_as_cpus_also_in_a_private_cluster(tmp_path: Path, private: bool) -> None:
    wanted = config(tmp_path, "rollout.cpus_per_replica=8")
    needed = role_resources(wanted, 8.0, private=private)
    assert needed["rollout"][1].environment == {"OMP_NUM_THREADS": "8"}
    assert needed["learner"][1].environment == {}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"CPU": 3, "big": 2, "fast": 1}, "rollout.replicas: found 4 CPUs asked (rollout 2 x 1, teacher.default 1 x 1"),
        ({"CPU": 8, "big": 1, "fast": 1}, "rollout.replicas: found 2 big asked (rollout 2 x 1, teacher.default 1 x 0"),
        ({"CPU": 8, "big": 2}, "learner.replicas: found 0.5 fast asked"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, there: dict[str, float], message: str) -> None:
    wanted = config(tmp_path, "rollout.resources={big: 1}", "rollout.replicas=2", "learner.resources={fast: 0.5}")
    with pytest.raises(UserError) as caught:
        check_fits(role_resources(wanted, 0.0, private=False), there, "the cluster")
    assert str(caught.value).startswith(message)
    assert re.search(r"of the cluster(; rollout\.cpus_per_replica may be a fraction)?$", str(caught.value))
    assert ("CPUs" in message) == ("cpus_per_replica" in str(caught.value))


def test_a_cluster_that_is_short_of_nodes_is_begun_with_and_a_private_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path, "rollout.replicas=5", "learner.replicas=2", "teachers.default.replicas=3")

    def there(cpus: float) -> None:
        monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": cpus})

    there(10)
    room = room_to_begin(wanted, private=False)
    assert (room.begin, room.short) == ({"rollout": 5, "teacher.default": 3, "learner": 2}, None)
    there(9)
    room = room_to_begin(wanted, private=False)
    assert room.begin == {"rollout": 1, "teacher.default": 1, "learner": 2}
    assert {role: count for role, (count, _) in room.needed.items()} == {
        "rollout": 5, "teacher.default": 3, "learner": 2
    }  # fmt: skip
    assert str(room.short).startswith("rollout.replicas: found 10 CPUs asked")
    with pytest.raises(UserError, match="found 10 CPUs asked"):
        room_to_begin(wanted, private=True)
    monkeypatch.setattr(check, "connected", lambda config: nullcontext(False))
    with pytest.raises(UserError, match="found 10 CPUs asked"):  # what `run` would begin with, `check` refuses
        dict(check.checks(wanted, offline=False))["cluster"]()
    there(3)
    with pytest.raises(UserError, match=r"found 10 CPUs asked .* the 3 CPUs"):
        room_to_begin(wanted, private=False)


def test_a_served_teacher_takes_no_gpu_and_one_of_vllm_takes_one_for_each_rank(tmp_path: Path) -> None:
    served = ["teachers.default.backend=http", "teachers.default.urls=[http://h:1/v1]"]
    assert role_resources(config(tmp_path, *served), 8.0, private=False)["teacher.default"][1].gpus == 0
    spread = ["teachers.default.backend=vllm", "teachers.default.tensor_parallel_size=4"]
    assert role_resources(config(tmp_path, *spread), 8.0, private=False)["teacher.default"][1].gpus == 4


def test_each_rank_of_a_learner_has_a_whole_gpu(tmp_path: Path) -> None:
    assert role_resources(config(tmp_path), 1.0, private=False)["learner"][1].gpus < 1
    ranks = role_resources(config(tmp_path, "learner.replicas=2"), 1.0, private=False)
    assert (ranks["learner"][0], ranks["learner"][1].gpus) == (2, 1.0)
    with pytest.raises(UserError, match="GPUs asked"):
        check_fits(ranks, {"CPU": 8, "GPU": 1}, "the cluster")
    with pytest.raises(UserError, match=r"learner\.gpus_per_replica: found 0\.5, expected 1, or 0"):
        config(tmp_path, "learner.replicas=2", "learner.gpus_per_replica=0.5")
