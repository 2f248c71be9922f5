"""A learner of two ranks in a real Ray, and a teacher whose answers are shared out between them."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.config import StudentConfig
from actors.errors import CampaignError
from actors.teacher.local import LocalTeacher
from actors.teacher_scores import TeacherScores
from actors.trajectory import TrajectoryId
from cluster.fleet.ray_actor import PerRank, Resources, fetched
from cluster.fleet.ray_fleet import Fleet
from cluster.fleet.ray_learner import LearnerGroup
from cluster.loop.teachers import PromptRoutes, Teachers
from cluster.loop.work import Sampled, Scored, scores_by_rank
from learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from learner.learner import Learner
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import sampled, teacher_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

LEARNER = LearnerConfig(
    compute_dtype="float32",
    objective=ObjectiveConfig(estimator="full"),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_updates=0),
)
HOW: dict[str, Any] = {"total_updates": 10, "temperature": 1.0, "publish_dtype": "float32", "bucket_bytes": 1 << 20}


def fleet(kind: type[Fleet], role: str, actor: type, *arguments: Any, replicas: int = 1, **keywords: Any) -> Any:
    return kind(
        role,
        actor,
        arguments,
        keywords,
        replicas=replicas,
        resources=Resources(0.1, 0.0),
        max_restarts=None,
        start_timeout_seconds=600.0,
        on_event=lambda kind, **fields: None,
    )


def test_each_rank_is_given_what_the_teacher_said_of_its_own_trajectories_and_no_other_is_taken(tmp_path: Path) -> None:
    models = {name: make_tiny_model(tmp_path / name, hidden=32, layers=1, seed=i) for i, name in enumerate(("student", "other"))}  # fmt: skip
    written, whole = sampled(models, "other", "topk")
    alone = Learner(StudentConfig(str(models["student"])), LEARNER, **HOW)
    expected = alone.update(written.ids, written, whole)

    async def body(teacher: Fleet, learner: LearnerGroup) -> None:
        await asyncio.gather(teacher.start(), learner.start())
        panel = Teachers({"teacher": teacher}, PromptRoutes([{"teacher": 0.0}] * 3, {}), each=True)
        references = [ray.put(written)]
        answer = await panel.score(written.ids, references)
        update = [
            Scored(Sampled(number, TrajectoryId(*row), references[0], 0, length, 0, False), found, 1)
            for number, (row, length, found) in enumerate(
                zip(written.ids.tolist(), written.lengths.tolist(), answer.references, strict=True)
            )
        ]
        own = scores_by_rank(update, np.diff(written.prompt_offsets) + written.lengths, 1, 2)
        parts = [await fetched(given) for given in own.arguments]
        assert all(isinstance(part, TeacherScores) and len(part) == 1 for given in parts for part in given)
        names = [[tuple(part.ids[0].tolist()) for part in given] for given in parts]
        assert sorted(names[0] + names[1]) == [TrajectoryId(*row) for row in written.ids] and all(names)

        metrics = await learner.call("update", written.ids, *references, own)
        for key in ("loss", "grad_norm", "reverse_kl", "tokens_trained"):
            assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key
        # A rank that is not given the scores of its own trajectories says so, by name.
        with pytest.raises(CampaignError, match=r"trajectory 0/\S+ scores of teachers with 0 of the whole weight came"):
            await learner.call("update", written.ids, *references, PerRank(own.arguments[::-1]))

    async def run() -> None:
        told = teacher_config(models, "other", "topk")
        teacher = fleet(Fleet, "teacher.teacher", LocalTeacher, told, "teachers.teacher")
        student = StudentConfig(str(models["student"]))
        learner = fleet(LearnerGroup, "learner", Learner, student, LEARNER, replicas=2, **HOW)
        try:
            await body(teacher, learner)
        finally:
            teacher.close()
            learner.close()

    asyncio.run(run())
