"""Every fault of a configuration is one line that names where it is; what is written is read back as it was."""

import subprocess
import sys
from pathlib import Path

import pytest

from actors.errors import UserError
from cluster.config_file import differences, load_config, write_config
from cluster.guards import default_guards
from cluster.state.changes import changes, class_of

ROOT = Path(__file__).resolve().parents[3]
GOOD = """
name: here
student: {model: student}
teachers:
  default: {model: teacher, signal: full}
prompts: {path: train.jsonl}
"""


def written(tmp_path: Path, text: str = GOOD) -> Path:
    path = tmp_path / "campaign.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str = GOOD, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(written(tmp_path, text), overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert "found" in line and "expected" in line
    return line


def test_a_minimal_configuration_has_defaults_for_the_rest(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    assert config.run_dir == Path("runs/here")
    assert config.pipeline.max_staleness == 0
    assert config.trajectories_per_update == 64


@pytest.mark.parametrize(
    ("line", "where", "nearest"),
    [
        ("teacher: {}", "teacher", "teachers"),
        ("rollouts: {}", "rollouts", "rollout"),
        ("rollout: {replica: 2}", "rollout.replica", "replicas"),
        ("learner: {optimizer: {learning_rat: 1}}", "learner.optimizer.learning_rat", "learning_rate"),
        ("learner: {objective: {trust_region: {bta: 1}}}", "learner.objective.trust_region.bta", "beta"),
        ("evaluation: {prompts: {path: x, limt: 3}}", "evaluation.prompts.limt", "limit"),
        ("pipeline: {max_stalenes: 1}", "pipeline.max_stalenes", "max_staleness"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, line: str, where: str, nearest: str) -> None:
    message = refusal(tmp_path, GOOD + line)
    assert where in message
    assert repr(nearest) in message
    override = f"{where}=1"
    assert repr(nearest) in refusal(tmp_path, GOOD, override)


def test_an_unknown_key_of_a_teacher_names_the_nearest(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD.replace("signal: full", "signl: full"))
    assert "teachers.default.signl" in message
    assert "'signal'" in message
    message = refusal(tmp_path, GOOD, "teachers.default.replcas=2")
    assert "teachers.default.replcas" in message
    assert "'replicas'" in message
    assert "'model'" in refusal(tmp_path, GOOD, "teachers.second.modl=x")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("rollout.replicas=many", "rollout.replicas"),
        ("rollout.replicas=1.5", "rollout.replicas"),
        ("rollout.replicas=[1]", "rollout.replicas"),
        ("rollout.replicas={a: 1}", "rollout.replicas"),
        ("rollout.replicas=null", "rollout.replicas"),
        ("learner.optimizer.learning_rate=fast", "learner.optimizer.learning_rate"),
        ("learner.optimizer=fast", "learner.optimizer"),
        ("learner=null", "learner: found None"),
        ("learner=7", "learner: found 7"),
        ("learner.objective.trust_region=hard", "learner.objective.trust_region: found 'hard'"),
        ("evaluation.prompts=7", "evaluation.prompts: found 7"),
        ("teachers.default.signal=everything", "teachers.default.signal"),
        ("teachers.default=7", "teachers.default: found 7"),
        ("teachers=[1]", "teachers: found"),
        ("teachers.default=null", "teachers.default"),
        ("teachers=null", "teachers"),
        ("rollout.dtype=int4", "rollout.dtype"),
        ("rollout.engine=7", "rollout.engine"),
        ("prompts.shuffle=perhaps", "prompts.shuffle"),
        ("prompts.limit=all", "prompts.limit"),
        ("sampling.stop_token_ids=[a]", "sampling.stop_token_ids"),
        ("student=[]", "student"),
        ("name=[1]", "name"),
        (f"name={'a' * 300}", "name"),
    ],
)
def test_a_wrong_type_is_refused_by_its_key(tmp_path: Path, override: str, where: str) -> None:
    assert where in refusal(tmp_path, GOOD, override)


@pytest.mark.parametrize(
    "override",
    [
        "rollout.replicas=0",
        "rollout.replicas=-1",
        "teachers.default.replicas=0",
        "teachers.default.top_k=0",
        "teachers.default.weight=0",
        "learner.replicas=0",
        "learner.optimizer.learning_rate=0",
        "learner.optimizer.learning_rate=.nan",
        "learner.optimizer.beta1=1.5",
        "pipeline.updates=0",
        "pipeline.prompts_per_update=-4",
        "pipeline.samples_per_prompt=0",
        "pipeline.max_staleness=-1",
        "evaluation.every_updates=0",
        "checkpoint.keep_last=0",
        "checkpoint.every_updates=0",
        "sampling.temperature=0",
        "sampling.top_p=0",
        "sampling.top_p=1.1",
        "sampling.max_response_tokens=0",
        "prompts.limit=0",
        "weights.bucket_mebibytes=0",
        "ray.start_timeout_seconds=0",
        "ray.max_restarts=-1",
        "seed=-1",
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_key(tmp_path: Path, override: str) -> None:
    key, _, value = override.partition("=")
    message = refusal(tmp_path, GOOD, override)
    assert message.startswith(f"{key}: found {value.strip('.')}")


@pytest.mark.parametrize("key", ["name", "student.model", "teachers.default.model", "prompts.path"])
def test_a_mandatory_value_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    values = {
        "name": "here",
        "student.model": "student",
        "teachers.default.model": "teacher",
        "prompts.path": "train.jsonl",
    }
    message = refusal(tmp_path, GOOD.replace(f": {values[key]}", ": '???'"))
    assert f"{key}: found nothing" in message


@pytest.mark.parametrize(
    "text",
    ["name: [1", "name: 'a", "a: 1\n b: 2", "\tname: x", "- 1\n- 2", "just a sentence", "7", "{", "name: ${nowhere}"],
)
def test_what_is_not_yaml_with_keys_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "campaign.yaml") in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("name: a\nA sentence\nseed: 1\n", ", line 2: found invalid YAML (could not find expected ':')"),
        ("name: a\nstudent: 'b\nseed: 1\n", ", line 2: found invalid YAML (found unexpected end of stream)"),
        ("name: a\n b: 2\n", ", line 2: found invalid YAML (mapping values are not allowed"),
        ("name: a\nseed: 1\nseed: 2\n", ", line 3: found invalid YAML (found duplicate key seed)"),
    ],
)
def test_a_mistake_in_yaml_is_named_by_its_line(tmp_path: Path, text: str, found: str) -> None:
    assert refusal(tmp_path, text).startswith(f"{tmp_path / 'campaign.yaml'}{found}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.replicas=1.5", "rollout.replicas: found 1.5, expected a whole number"),
        ("rollout.replicas=true", "rollout.replicas: found True, expected a whole number"),
        ("learner.optimizer.beta1=x", "learner.optimizer.beta1: found 'x', expected a number"),
        ("prompts.shuffle=perhaps", "prompts.shuffle: found 'perhaps', expected true or false"),
        ("name=[1]", "name: found [1], expected text"),
        ("rollout.dtype=int4", "rollout.dtype: found 'int4', expected one of float32, bfloat16, float16"),
        ("sampling.stop_token_ids=3", "sampling.stop_token_ids: found 3, expected a list"),
        ("sampling.stop_token_ids=[1,a]", "sampling.stop_token_ids[1]: found 'a', expected a whole number"),
        ("teachers.default.resources={big: x}", "teachers.default.resources.big: found 'x', expected a number"),
        ("student.lora=7", "student.lora: found 7, expected keys with values"),
    ],
)
def test_a_wrong_type_is_told_in_plain_words(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(tmp_path, GOOD, override) == f"override {override!r}: {message}"


def test_a_value_is_converted_where_it_loses_nothing(tmp_path: Path) -> None:
    config = load_config(written(tmp_path), ["rollout.replicas='3'", "name=7", "learner.optimizer.learning_rate=1"])
    assert (config.rollout.replicas, config.name, config.learner.optimizer.learning_rate) == (3, "7", 1.0)
    assert load_config(written(tmp_path), ["seed=${pipeline.updates}"]).seed == config.pipeline.updates


def test_an_empty_file_lacks_what_is_mandatory(tmp_path: Path) -> None:
    assert "name: found nothing" in refusal(tmp_path, "")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    assert "seed" in refusal(tmp_path, GOOD + "seed: 1\nseed: 2\n")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            load_config(path)
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match=r"binary\.yaml"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    "override", ["rollout.replicas", "=2", "", "rollout..replicas=2", "rollout.replicas=[1", "a b"]
)
def test_an_override_that_is_no_key_and_value_is_refused(tmp_path: Path, override: str) -> None:
    assert repr(override) in refusal(tmp_path, GOOD, override)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "/absolute", ".", "..", "", ".hidden", "a b", "a\nb", "-rf"])
def test_a_name_that_is_no_plain_directory_name_is_refused(tmp_path: Path, name: str) -> None:
    text = GOOD.replace("name: here", f"name: {name!r}".replace("\n", "\\n").replace("'", '"'))
    assert refusal(tmp_path, text).startswith("name:")


def test_an_objective_that_needs_a_distribution_refuses_a_sampled_teacher(tmp_path: Path) -> None:
    for setting in ("estimator=full", "estimator=to_go_expected", "baseline=exact_kl"):
        message = refusal(tmp_path, GOOD.replace("full", "sampled"), f"learner.objective.{setting}")
        assert message.startswith("teachers.default.signal: found sampled")
        assert setting in message


@pytest.mark.parametrize(("resources", "where"), [("{GPU: 1}", ""), ("{big: 0}", ".big"), ("{big: .nan}", ".big")])
def test_a_resource_that_is_no_name_of_ones_own_or_no_amount_is_refused(
    tmp_path: Path, resources: str, where: str
) -> None:
    for role in ("rollout", "teachers.default", "learner"):
        message = refusal(tmp_path, GOOD, f"{role}.resources={resources}")
        assert message.startswith(f"{role}.resources{where}: found")


KEY = "learner.objective."
PAIR = ("pipeline.prompts_per_update=2", "pipeline.samples_per_prompt=1")
REFERENCE = ("teachers.base.model=base", "teachers.base.signal=full", KEY + "reference_teacher=base")
CONTRADICTIONS: dict[str, tuple[str, ...]] = {
    "learner.objective.extrapolation: found 1.25": (KEY + "extrapolation=1.25",),
    "learner.objective.extrapolation: found 1.0": REFERENCE,
    "learner.objective.reference_teacher: found base": (KEY + "reference_teacher=base", KEY + "extrapolation=1.25"),
    "learner.objective.reference_teacher: found default": (KEY + "reference_teacher=default", KEY + "extrapolation=2"),
    "teachers.base.domains": (*REFERENCE, KEY + "extrapolation=2", "teachers.base.domains=[a]",
                              "prompts.domain_field=domain"),
    "learner.objective.log_ratio_power": (*REFERENCE, KEY + "extrapolation=2", KEY + "log_ratio_power=1"),
    "learner.objective.proximal_weight": (*REFERENCE, KEY + "extrapolation=2", KEY + "proximal_weight=0.5"),
    "learner.objective.support": (KEY + "support=renormalised",),
    "learner.objective.baseline": (KEY + "estimator=full", KEY + "baseline=batch_mean"),
    "learner.minibatches_per_update: found 5, expected at most 2": (*PAIR, "learner.minibatches_per_update=5"),
    "learner.objective.baseline: found batch_mean, expected none or exact_kl": (
        *PAIR[1:], "pipeline.prompts_per_update=1", KEY + "baseline=batch_mean",
    ),
    "learner.objective.dual_clip": (KEY + "estimator=full", KEY + "dual_clip=3"),
    "learner.objective.through_log_ratio": (KEY + "estimator=full", KEY + "through_log_ratio=true"),
    "learner.objective.position_weight": (KEY + "estimator=full", KEY + "position_weight=0.5"),
    "learner.objective.divergence": (KEY + "divergence=jsd",),
    "learner.objective.divergence: found forward_kl": (KEY + "estimator=full", KEY + "divergence=forward_kl",
                                                       KEY + "log_ratio_clip=3"),
    "learner.objective.gamma": (KEY + "gamma=0.9",),
    "learner.objective.turn_discount": (KEY + "estimator=to_go", KEY + "turn_discount=0.9"),
    "learner.objective.turn_discount: found 0.5": (KEY + "estimator=tests.matrix_parts:two_ahead", KEY + "turn_discount=0.5"),
    "evaluation.verifier: found numeric": ("environment.name=a:B", "evaluation.verifier.name=numeric"),
    "evaluation.verifiers: found maths": ("environment.name=a:B", "evaluation.verifiers.maths.name=numeric"),
    "learner.objective.last_turns: found 2": (KEY + "first_turns=1", KEY + "last_turns=2"),
    "learner.objective.recompute_log_ratio": (KEY + "estimator=to_go_expected", KEY + "recompute_log_ratio=false"),
    "learner.objective.log_ratio_clip": (KEY + "estimator=to_go_expected", KEY + "log_ratio_clip=3"),
    "learner.objective.mixture": (KEY + "estimator=full", KEY + "divergence=jsd", KEY + "mixture=1"),
    "learner.objective.aggregation_constant: found None": (KEY + "aggregation=constant",),
    "learner.objective.aggregation_constant: found 100": (KEY + "aggregation_constant=100",),
    "learner.objective.trust_region.beta": (KEY + "trust_region.target_kl=0.1",),
    "learner.objective.mismatch.low": (KEY + "mismatch.low=3",),
    "learner.objective.mismatch.level": (KEY + "estimator=full", KEY + "mismatch.correction=truncate"),
    "teachers.default.signal: found full": ("teachers.default.tokenizer=t", "teachers.default.signal=full"),
    "teachers.default.tokenizer: found mine": ("teachers.default.tokenizer=mine", "teachers.default.ema_decay=0.9",
                                               "teachers.default.model=student", "teachers.default.signal=sampled"),
    "teachers.default.tokenizer: found its": ("teachers.default.tokenizer=its", KEY + "estimator=sft",
                                              "teachers.default.signal=sampled"),
    "teachers.other.tokenizer: found t": ("teachers.other.model=o", "teachers.other.tokenizer=t",
                                            "teachers.default.signal=sampled"),
    "student.lora.rank: found 513": ("student.lora={rank: 513, publish: adapter}",),
    "student.lora.dora: found true": ("student.lora={dora: true, publish: adapter}",),
    "weights.encoding: found delta": ("student.lora={publish: adapter}", "weights.encoding=delta"),
    "teachers.default.model: found teacher": ("teachers.default.ema_decay=0.9",),
    "teachers.default.ema_decay: found 1": ("teachers.default.ema_decay=1",),
    "teachers.default.signal: found hidden": ("teachers.default.ema_decay=0.9", "teachers.default.model=student",
                                              "teachers.default.signal=hidden"),
    "teachers.default.backend: found vllm": ("teachers.default.ema_decay=0.9", "teachers.default.model=student",
                                             "teachers.default.backend=vllm"),
    "pipeline.samples_per_prompt": (KEY + "baseline=group_mean",),
    "pipeline.samples_per_prompt: found 1, expected 2": (KEY + "estimator=reward",),
    "pipeline.samples_per_prompt: found 1": (KEY + "reward_weight=0.5",),
    "learner.objective.reward_weight": (KEY + "estimator=sft", KEY + "reward_weight=0.5", "pipeline.samples_per_prompt=2"),
    "learner.objective.baseline: found group_mean": (KEY + "estimator=reward", KEY + "baseline=group_mean",
                                                     "pipeline.samples_per_prompt=2"),
    "learner.objective.proximal_weight: found 0.5": (KEY + "estimator=sft", KEY + "proximal_weight=0.5"),
    "learner.objective.mismatch.correction": (KEY + "estimator=sft", KEY + "mismatch.correction=mask"),
    "learner.objective.trust_region.max_kl": (KEY + "estimator=sft", KEY + "trust_region.max_kl=0.1"),
    "evaluation.verifier.timeout_seconds: found 300": (KEY + "estimator=reward", "pipeline.samples_per_prompt=2",
                                                       "evaluation.verifier.timeout_seconds=300"),
    "prompts.reference_field: found null": (KEY + "estimator=reward", "pipeline.samples_per_prompt=2",
                                            "prompts.reference_field=null"),
    "learner.objective.masked_token_roles": (KEY + "masked_token_roles=[padding]",),
}  # fmt: skip


@pytest.mark.parametrize("start", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused_by_the_key_at_fault(tmp_path: Path, start: str) -> None:
    assert start in refusal(tmp_path, GOOD, *CONTRADICTIONS[start])


def test_teachers_that_cannot_be_mixed_or_compared_are_refused(tmp_path: Path) -> None:
    two = GOOD.replace("signal: full}", "signal: topk}\n  base: {model: base, signal: topk}")
    assert "several teachers with signal=topk" in refusal(tmp_path, two)
    reference = (KEY + "reference_teacher=base", KEY + "extrapolation=2")
    assert refusal(tmp_path, two, *reference).startswith("teachers.base.signal: found topk")
    load_config(written(tmp_path, two.replace("topk", "student_topk")), reference)
    assert load_config(written(tmp_path, two.replace("topk", "student_topk"))).student_support_size == 64
    assert load_config(written(tmp_path)).student_support_size == 0


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["backend=http", "signal=sampled"], "urls: found none"),
        (["backend=http", "urls=[http://h:1/v1]"], "signal: found full, expected sampled or topk"),
        (["backend=vllm", "signal=hidden"], "signal: found hidden, expected sampled or topk or full"),
        (["urls=[http://h:1/v1]"], "urls: found ['http://h:1/v1'], expected nothing, or backend: http"),
        (["backend=http", "signal=sampled", "urls=[http://me:key@h:1/v1]"], "urls: found http://me:key@h:1/v1"),
        (["backend=http", "signal=sampled", "urls=[http://h:99999/v1]"], "urls: found http://h:99999/v1"),
        (["backend=http", "signal=sampled", "urls=['http://[::1/v1']"], "urls: found http://[::1/v1"),
        (["engine={quantization: fp8}"], "engine: found"),
        (
            ["tensor_parallel_size=2", "ema_decay=0.9", "model=student"],
            "tensor_parallel_size: found 2, expected 1 with ema_decay",
        ),
        (["api_key_variable=KEY"], "api_key_variable: found KEY"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(tmp_path: Path, overrides: list[str], where: str) -> None:
    message = refusal(tmp_path, GOOD, *(f"teachers.default.{override}" for override in overrides))
    assert message.startswith(f"teachers.default.{where}")


def test_a_teacher_that_cannot_be_tempered_is_refused_at_another_temperature(tmp_path: Path) -> None:
    http = [f"teachers.default.{x}" for x in ("backend=http", "signal=sampled", "urls=[http://h:1/v1]")]
    hot, one = "sampling.temperature=0.6", "teachers.default.temperature=1"
    message = refusal(tmp_path, GOOD, *http, hot)
    assert message.startswith(
        "teachers.default.temperature: found null, so sampling.temperature, 0.6, expected 1: the "
    )
    assert refusal(tmp_path, GOOD, *http, "teachers.default.temperature=2").startswith(
        "teachers.default.temperature: f"
    )
    load_config(written(tmp_path), [*http, hot, one])
    load_config(written(tmp_path), [hot])


def test_a_campaign_without_a_teacher_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "name: a\nstudent: {model: s}\nprompts: {path: p}\n").startswith("teachers:")
    assert refusal(tmp_path, GOOD.replace("  default: {model: teacher, signal: full}", "  {}")).startswith("teachers:")


def test_teachers_of_different_signals_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD, "teachers.other.model=x", "teachers.other.signal=sampled").startswith("teachers:")


def test_held_out_prompts_need_no_reference_and_math_may_give_rewards(tmp_path: Path) -> None:
    held_out = ["evaluation.prompts.path=x", "evaluation.prompts.reference_field=null"]
    rewards = [KEY + "reward_weight=0.5", "pipeline.samples_per_prompt=2", "evaluation.verifier.name=math"]
    config = load_config(written(tmp_path), [*held_out, *rewards])
    assert config.evaluation.prompts and config.evaluation.prompts.reference_field is None


def test_guards_are_added_by_name_and_those_that_are_always_there_can_be_changed(tmp_path: Path) -> None:
    mine = ["guards.mine.metric=entropy", "guards.mine.below=0.01"]
    guards = load_config(written(tmp_path), [*mine, "guards.truncation.action=none"]).guards
    assert list(guards) == [*default_guards(), "mine"]
    assert (guards["truncation"].action, guards["kl_rises"].action, guards["mine"].below) == ("none", "warn", 0.01)
    line = refusal(tmp_path, GOOD, *mine, "guards.mine.metric=entropi")
    assert line.startswith("guards.mine.metric: found entropi") and "did you mean 'entropy'" in line
    assert "guards.mine.metric: found nothing, expected a value" in refusal(tmp_path, GOOD, "guards.mine.above=1")
    assert "guards.mine: found 3, expected keys with values" in refusal(tmp_path, GOOD, "guards.mine=3")


def test_the_last_override_wins(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "rollout: {replicas: 2}\n")
    overrides = ["rollout.replicas=3", "rollout.replicas=4", "rollout.engine.max_num_seqs=8", "output_dir=a=b"]
    config = load_config(path, overrides)
    assert config.rollout.replicas == 4
    assert config.rollout.engine == {"max_num_seqs": 8}
    assert config.output_dir == "a=b"


def test_an_override_with_empty_braces_empties_what_the_file_has(tmp_path: Path) -> None:
    sets = "  sets: {far: {prompts: {path: far.jsonl}, verifier: {name: exact}}}\n"
    path = written(tmp_path, f"{GOOD}evaluation:\n{sets}rollout: {{engine: {{max_num_seqs: 8}}, replicas: 2}}\n")
    assert load_config(path).evaluation.sets and load_config(path).rollout.engine
    config = load_config(path, ["evaluation.sets={}", "rollout.engine={}", "rollout.engine.seed=1", "guards={}"])
    assert config.evaluation.sets == {} and config.rollout.engine == {"seed": 1} and config.rollout.replicas == 2
    assert "teachers: found none" in refusal(tmp_path, GOOD, "teachers={}")
    others = load_config(path, ["teachers={}", "teachers.other.model=b"]).teachers
    assert {name: teacher.model for name, teacher in others.items()} == {"other": "b"}


def test_what_is_written_is_read_back_as_an_equal_object(tmp_path: Path) -> None:
    overrides = [
        "evaluation.prompts.path=heldout.jsonl",
        "evaluation.verifier={name: regex, pattern: ';(\\d+)$'}",
        "rollout.engine={kv_cache_memory_bytes: 67108864, compilation: {level: 0}}",
        "learner.optimizer.learning_rate=1e-5",
        "prompts.chat_template_arguments={enable_thinking: false}",
        "sampling.stop_token_ids=[3,4]",
        "teachers.default.prompt_template='{prompt} {answer}'",
    ]
    config = load_config(written(tmp_path), overrides)
    write_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert not differences(load_config(tmp_path / "config.yaml"), config)


def test_a_home_directory_is_resolved(tmp_path: Path) -> None:
    assert load_config(written(tmp_path), ["output_dir=~/runs"]).output_dir == str(Path.home() / "runs")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "student.model=another",
        "teachers.default.model=another",
        "teachers.default.signal=topk",
        "teachers.second.model=another",
        "learner.optimizer.learning_rate=1e-3",
        "learner.objective.clip_low=null",
        "sampling.temperature=0.5",
        "prompts.path=others.jsonl",
        "pipeline.prompts_per_update=2",
        "pipeline.max_staleness=2",
        "guards.truncation.action=none",
        "rollout.dtype=float32",
    ],
)
def test_differences_name_what_matters(tmp_path: Path, override: str) -> None:
    path = written(tmp_path)
    before = load_config(path, ["teachers.second.signal=full", "teachers.second.model=x", "teachers.default.domains=[a]",
                                "prompts.domain_field=domain"] if "second" in override else [])  # fmt: skip
    after = load_config(path, [*(["teachers.second.signal=full", "teachers.default.domains=[a]",
                                  "prompts.domain_field=domain"] if "second" in override else []), override])  # fmt: skip
    key = override.partition("=")[0]
    [(found, _, _)] = differences(before, after)
    assert found == key and class_of(found, after) != "free"


@pytest.mark.parametrize(
    "override",
    [
        "rollout.engine.max_num_seqs=7",
        "rollout.replicas=4",
        "learner.replicas=2",
        "learner.microbatch_tokens=512",
        "learner.gradient_checkpointing=true",
        "learner.offload_optimizer=true",
        "rollout.gpus_per_replica=0.5",
        "teachers.default.replicas=3",
        "teachers.default.cpus_per_replica=3",
        "learner.cpus_per_replica=2",
        "teachers.default.resources={big: 1}",
        "pipeline.updates=500",
        "evaluation.every_updates=7",
        "evaluation.prompts.path=other.jsonl",
        "evaluation.verifier.name=numeric",
        "checkpoint.keep_last=9",
        "ray.max_restarts=1",
        "output_dir=moved",
    ],
)
def test_differences_pass_what_may_change(tmp_path: Path, override: str) -> None:
    path = written(tmp_path)
    before, after = load_config(path), load_config(path, [override])
    assert all(one.change == "free" for one in changes(before, after, [])) and before != after


def test_importing_the_configuration_loads_nothing_heavy() -> None:
    program = (
        "import sys, cluster.config, actors.config, learner.config;"
        "print([m for m in ('torch', 'numpy', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_the_project_loads(path: Path) -> None:
    load_config(path)


def test_adapters_are_asked_for_by_a_section_or_a_single_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(GOOD)
    assert load_config(path).student.lora is None
    lora = load_config(path, ["student.lora.rank=8"]).student.lora
    assert lora is not None and (lora.rank, lora.alpha) == (8, 32.0)
    with pytest.raises(UserError, match=r"student\.lora: found adapters, expected null where teachers\.default\.ema"):
        load_config(
            path, ["student.lora={rank: 8}", "teachers.default.ema_decay=0.9", "teachers.default.model=student"]
        )
