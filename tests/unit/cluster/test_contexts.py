"""The longest text that each model can read: the smallest counts, before the start; what is refused later is dropped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config import TeacherConfig
from actors.data.contexts import context_length, engine_context
from actors.errors import CampaignError, UserError
from actors.teacher.backends import Backend
from actors.teacher.local import LocalTeacher
from actors.trajectory import Trajectories, offsets_of
from cluster.config_file import load_config
from cluster.inputs import read_inputs
from cluster.prompt_reading import max_prompt_tokens
from cluster.records.writer import read_jsonl
from tests import clean_process
from tests.light_campaign import assert_ledger_adds_up, configuration, make_folder, run_here
from tests.tiny_models import make_tiny_model
from tests.waiting import PATIENCE_SECONDS

ROPE = {"rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "options", "model", "engine"),
    [
        ("GPT2Config", {"n_positions": 77}, 77, 77),
        ("MptConfig", {"max_seq_len": 88}, 88, 88),
        ("Qwen3Config", {"max_position_embeddings": 100, "sliding_window": 8, "use_sliding_window": True}, 100, 100),
        ("Qwen3Config", {"max_position_embeddings": 100, "seq_length": 60}, 60, 60),
        ("Qwen3Config", {"max_position_embeddings": 100, "rope_scaling": ROPE | {"rope_type": "linear"}}, 400, 400),
        ("Qwen3Config", {"max_position_embeddings": 100, "rope_scaling": ROPE | {"rope_type": "yarn"}}, 100, 100),
        ("CohereConfig", {"max_position_embeddings": 100, "model_max_length": 900}, 900, 900),
        ("Gemma3TextConfig", {"max_position_embeddings": 100}, 100, 100),
        (
            "Phi3Config",
            {
                "max_position_embeddings": 1000,
                "original_max_position_embeddings": 100,
                "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
            },
            1000,
            100,
        ),
    ],
)
def test_the_context_of_an_architecture_is_that_of_its_engine(
    name: str, options: dict[str, Any], model: int, engine: int
) -> None:
    import transformers

    config = getattr(transformers, name)(**options)
    assert (context_length(config), engine_context(config, {}, "rollout.engine")) == (model, engine)
    assert engine_context(config, {"max_model_len": 50}, "rollout.engine") == 50
    assert engine_context(config, {"max_model_len": -1}, "rollout.engine") == engine
    assert engine_context(config, {"max_model_len": 10**6}, "rollout.engine") == model


@pytest.mark.parametrize("wrong", ["abc", 0, True, 1.5])
def test_a_length_that_is_none_is_refused(wrong: object) -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match=r"^rollout\.engine\.max_model_len: found .*, expected a number of tokens"):
        engine_context(GPT2Config(), {"max_model_len": wrong}, "rollout.engine")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student with a context of 256, a teacher with 64, and one prompt that is too long for the teacher."""
    make_tiny_model(tmp_path / "student", hidden=32, layers=1, context=256)
    make_tiny_model(tmp_path / "teacher", hidden=32, layers=1, context=64, seed=1)
    make_tiny_model(tmp_path / "far", hidden=32, layers=1, context=200, seed=1)
    rows = [{"prompt": "1+1=", "answer": "2", "kind": "short"}, {"prompt": "x" * 80, "answer": "2", "kind": "long"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def read(folder: Path, teachers: dict[str, Any], **prompts: Any) -> Any:
    sections = {"prompts": {"path": str(folder / "train.jsonl"), **prompts}, "evaluation": {"prompts": None}}
    file = configuration(folder, "run", **sections)
    config = load_config(file)
    config.teachers = {
        name: TeacherConfig(str(folder / model), dtype="float32", **more) for name, (model, more) in teachers.items()
    }
    return config, read_inputs(config)


def test_a_prompt_that_a_teacher_cannot_read_is_refused_before_the_start(folder: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: found 8\d tokens as teachers\.w reads it \(1 of 2 "):
        read(folder, {"w": ("teacher", {})})
    config, inputs = read(folder, {"w": ("far", {})})
    assert max_prompt_tokens(config) == 200 - 6 and inputs.prompt_routes.longest == {}
    _, served = read(folder, {"w": ("far", {"backend": "http", "urls": ["http://far/v1"], "temperature": 1.0})})
    assert served.prompt_routes.longest["w"] == served.prompts.lengths_of(np.arange(2)).max() + 6
    # A template adds tokens, which count; a context of the engine's own counts, too.
    with pytest.raises(UserError, match=r"as teachers\.w reads it .* at most 194: the context of teachers\.w, 200 tok"):
        read(folder, {"w": ("far", {"prompt_template": "{prompt}{prompt}{prompt}"})})
    with pytest.raises(UserError, match=r"at most 73: the context of teachers\.w, 79 tokens"):
        read(folder, {"w": ("far", {"backend": "vllm", "engine": {"max_model_len": 80}})})


def test_only_the_teachers_that_read_a_prompt_bound_it(folder: Path) -> None:
    teachers = {"near": ("teacher", {"domains": ["short"]}), "far": ("far", {})}
    _, inputs = read(folder, teachers, domain_field="kind")
    assert len(inputs.prompts) == 2


def test_a_context_without_room_for_a_response_says_whose_it_is(folder: Path) -> None:
    make_tiny_model(folder / "tiny", hidden=32, layers=1, context=6)
    with pytest.raises(UserError, match=r"max_response_tokens: found 6, expected less than the context of teachers\.w"):
        read(folder, {"w": ("tiny", {})})


def test_a_teacher_refuses_what_is_longer_than_its_context_and_scores_the_rest(folder: Path) -> None:
    lengths = [5, 70, 3, 63]
    written = Trajectories(
        ids=np.array([(0, i, 0) for i in range(4)]),
        prompt_tokens=np.full(4, 7, np.int32),
        prompt_offsets=offsets_of([1] * 4),
        response_tokens=(np.arange(sum(lengths)) % 50 + 6).astype(np.int32),
        response_offsets=offsets_of(lengths),
        behaviour_logprobs=np.zeros(sum(lengths), np.float32),
        policy_versions=np.zeros(sum(lengths), np.int32),
        finish_reasons=np.zeros(4, np.uint8),
    )
    for signal in ("sampled", "topk", "full", "hidden"):
        config = TeacherConfig(str(folder / "teacher"), dtype="float32", signal=signal)  # type: ignore[arg-type]
        teacher = LocalTeacher(config, "teachers.wise", 102)
        counts, scores = teacher.score(written.ids, written)
        assert dict(counts.refused) == {1: "71 tokens, and teachers.wise reads 64"} and counts.missing == 0
        rows = np.split(np.isnan(scores.logprobs), scores.response_offsets[1:-1])
        assert [row.all() for row in rows] == [False, True, False, False]
        alone = teacher.score(written.ids[2:3], written)[1]
        np.testing.assert_allclose(scores.logprobs[75:78], alone.logprobs, atol=1e-5)
        if signal == "hidden":
            np.testing.assert_allclose(scores.hidden[75:78], alone.hidden, atol=1e-5)


class Picky(LocalTeacher):
    """Refuses some trajectories, as a server does that cannot read them."""

    backend = Backend(signals=("sampled",), has_model_files=True, settings=("engine",))

    def score_tokens(self, trajectories: Trajectories) -> dict[str, Any]:
        fields: dict[str, Any] = super().score_tokens(trajectories)
        every = int(self.config.engine["every"])
        rows = [row for row, id_ in enumerate(trajectories.ids) if id_.any() and id_[:2].sum() % every == 0]
        return {**fields, "refused": dict.fromkeys(rows, "the server refuses: too long")}


def run(config_file: Path) -> None:
    try:
        run_here(config_file)
    except CampaignError as error:
        print(f"CampaignError: {error}")
        raise SystemExit(1) from None


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_refused_trajectory_is_dropped_with_its_reason_and_replaced(tmp_path: Path, staleness: int) -> None:
    make_folder(tmp_path)
    backend = {"backend": "tests.unit.cluster.test_contexts:Picky", "engine": {"every": 5}, "dtype": "float32"}
    file = configuration(
        tmp_path,
        "run",
        teachers={"default": {"model": str(tmp_path / "teacher"), **backend}},
        pipeline={"max_staleness": staleness, "updates": 6},
    )
    process = clean_process.start(run, file, log=tmp_path / "log")
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    run_dir = tmp_path / "runs" / "run"
    refused = [row for row in read_jsonl(run_dir / "ledger.jsonl") if row.get("reason") == "refused"]
    assert refused and {row["cause"] for row in refused} == {"the server refuses: too long"}
    assert_ledger_adds_up(run_dir, 6, 8, staleness)
    events = read_jsonl(run_dir / "events.jsonl")
    assert sum(event["kind"] == "trajectory_refused" for event in events) == len(refused)


def test_teachers_that_refuse_everything_end_the_campaign(tmp_path: Path) -> None:
    make_folder(tmp_path)
    backend = {"backend": "tests.unit.cluster.test_contexts:Picky", "engine": {"every": 1}, "dtype": "float32"}
    teachers = {"default": {"model": str(tmp_path / "teacher"), **backend}}
    file = configuration(tmp_path, "run", teachers=teachers, evaluation={"prompts": None})
    process = clean_process.start(run, file, log=tmp_path / "log")
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 1
    assert (
        "CampaignError: teachers have refused 16 trajectories in a row; the last, 0/" in (tmp_path / "log").read_text()
    )
