"""Exit statuses and lines of the command line, in a process of its own, for what needs no Ray."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from actors.errors import CampaignError, UserError
from cluster import cli
from cluster.config_file import load_config
from cluster.console.arguments import command_parser
from cluster.inputs import read_inputs
from tests.tiny_models import CHARACTERS, make_tiny_model, make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def understudy(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(cwd), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


class Here:
    """The command line in this process, in a folder with everything that a campaign needs."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self._capsys = folder, capsys

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        out, err = self._capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out, err)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, its teacher, and one whose tokenizer is another."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "student", hidden=32, layers=1, context=64)
    make_tiny_model(folder / "teacher", hidden=32, layers=2, seed=1, context=64)
    shutil.copytree(folder / "teacher", folder / "foreigner")
    make_tiny_tokenizer(CHARACTERS[::-1]).save_pretrained(folder / "foreigner")
    return folder


@pytest.fixture
def work(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher", "foreigner"):
        shutil.copytree(models / name, tmp_path / name)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "campaign.yaml").write_text(
        "name: here\nstudent: {model: student}\nteachers: {default: {model: teacher}}\n"
        "prompts: {path: train.jsonl}\nsampling: {max_response_tokens: 20}\n"
        "evaluation: {prompts: {path: train.jsonl}}\n"
    )
    return Here(tmp_path, capsys)


def refusal(work: Here, *overrides: str, command: tuple[str, ...] = ("check", "--offline")) -> str:
    return one_line(work.run(*command, "campaign.yaml", *overrides))


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert re.fullmatch(r"understudy: .+: found .+, expected .+", line)
    return line


def test_help_is_fast_and_loads_neither_torch_nor_ray() -> None:
    before = os.times()
    done = understudy("--help")
    assert os.times().children_user - before.children_user < 3  # processor seconds: no other process counts
    assert done.returncode == 0
    for command in ("run", "check", "report"):
        assert re.search(rf"^\s+{command}\s", done.stdout, re.MULTILINE)
    program = (
        "import sys\nfrom cluster.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n"
        "    print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'numpy') if m in sys.modules])"
    )
    for arguments in (
        ["--help"],
        ["run", "--help"],
        ["check", "absent.yaml"],
        ["run", "absent.yaml"],
        ["status", "absent"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.stdout.splitlines()[-1] == "[]", arguments


def test_every_command_that_can_be_typed_has_a_function() -> None:
    usage = command_parser().format_help()
    assert set(re.findall(r"^    (\w+) ", usage, re.MULTILINE)) == set(cli.COMMANDS) > set(cli.LONG_COMMANDS)


def test_no_command_and_an_unknown_one_are_the_users_fault() -> None:
    for arguments in ((), ("runn",), ("check",), ("check", "--onlin", "a.yaml")):
        done = understudy(*arguments)
        assert done.returncode == 2
        assert "usage:" in done.stderr and "Traceback" not in done.stderr


def test_a_good_configuration_passes_the_check(work: Here) -> None:
    done = understudy("check", "--offline", "campaign.yaml", cwd=work.folder)
    assert done.returncode == 0, done.stderr
    for name in ("configuration", "student", "teacher default", "prompts", "verifier"):
        assert f"{name}: ok" in done.stdout
    assert "cluster: not looked at (offline)" in done.stdout
    assert not done.stderr


def test_offline_leaves_what_is_elsewhere_for_the_cluster(work: Here) -> None:
    done = work.run("check", "--offline", "campaign.yaml", "student.model=owner/name")
    assert done.returncode == 0, done.stderr
    assert "student: not looked at (offline)" in done.stdout


@pytest.mark.parametrize("command", [("check",), ("check", "--offline"), ("run",)])
def test_a_configuration_that_is_not_there_is_named(work: Here, command: tuple[str, ...]) -> None:
    (work / "campaign.yaml").rename(work / "moved.yaml")
    assert "campaign.yaml" in refusal(work, command=command)


@pytest.mark.parametrize("command", [("check", "--offline"), ("run",)])
def test_a_misspelt_key_is_one_line(work: Here, command: tuple[str, ...]) -> None:
    assert "'replicas' perhaps" in refusal(work, "rollout.replica=2", command=command)


@pytest.mark.parametrize("key", ["student.model", "teachers.default.model"])
def test_a_missing_model_directory_is_named_by_its_key(work: Here, key: str) -> None:
    for path in ("./absent", str(work / "absent"), str(work / "studentt")):
        line = refusal(work, f"{key}={path}", command=("run",))
        assert line.startswith(f"understudy: {key}: found ")
    assert "did you mean" in line


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_corrupt_safetensors_are_named(work: Here, name: str) -> None:
    file = work / name / "model.safetensors"
    for content in (file.read_bytes()[:-100], b"", b"\xff" * 50, b"{" * 1000):
        file.write_bytes(content)
        assert "model.safetensors" in refusal(work)


def test_a_refusal_is_one_line_in_a_process_of_its_own_too(work: Here) -> None:
    file = work / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for command in (("check", "--offline"), ("run",)):
        assert "model.safetensors" in one_line(understudy(*command, "campaign.yaml", cwd=work.folder))
    one_line(understudy("report", ".", cwd=work.folder))


def test_a_model_without_weights_is_refused(work: Here) -> None:
    (work / "student" / "model.safetensors").unlink()
    assert refusal(work).startswith("understudy: student.model: ")


def test_a_config_json_that_is_no_json_is_refused(work: Here) -> None:
    (work / "teacher" / "config.json").write_text("{")
    assert refusal(work).startswith("understudy: teachers.default.model: ")


def test_a_teacher_with_another_tokenizer_is_refused(work: Here) -> None:
    assert "teachers.default.model" in refusal(work, "teachers.default.model=foreigner")


@pytest.mark.parametrize("command", [("check", "--offline"), ("run",)])
@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (("signal=topk", "top_k=103"), "teachers.default.top_k: found 103, expected at most 102"),
        (("signal=student_topk", "top_k=103"), "teachers.default.top_k: found 103, expected at most 102"),
        (("prompt_template='{prompt} {hint}'",), "prompt_template: found hint, expected a field of train.jsonl"),
        (("domains=[maths]",), "train.jsonl, line 1: found domain 0"),
    ],
)
def test_what_a_teacher_cannot_do_is_refused(
    work: Here, overrides: tuple[str, ...], found: str, command: tuple[str, ...]
) -> None:
    settings = [f"teachers.default.{override}" for override in overrides]
    if "domains" in overrides[0]:
        settings.append("prompts.domain_field=answer")
    assert found in refusal(work, *settings, command=command)


@pytest.mark.parametrize("command", [("check", "--offline"), ("run",)])
def test_a_role_that_no_token_has_is_refused(work: Here, command: tuple[str, ...]) -> None:
    (work / "student" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    line = refusal(work, "learner.objective.masked_token_roles=[end_of_sequence,template]", command=command)
    assert "learner.objective.masked_token_roles: found template" in line


def test_roles_name_the_tokens_of_the_template_and_those_that_end_a_response(work: Here) -> None:
    for roles, expected in (
        ("[template]", ["<user>", "<assistant>"]),
        ("[end_of_sequence]", ["<eos>"]),
        ("[end_of_sequence,template]", ["<eos>", "<user>", "<assistant>"]),
        ("[]", []),
    ):
        config = load_config(work / "campaign.yaml", [f"learner.objective.masked_token_roles={roles}"])
        inputs = read_inputs(config)
        assert inputs.tokenizer.convert_ids_to_tokens(inputs.masked_role_token_ids) == expected


@pytest.mark.parametrize(
    ("key", "token"), [("sampling.stop_token_ids", -3), ("learner.objective.masked_token_ids", 99999)]
)
def test_a_token_that_the_student_does_not_have_is_refused(work: Here, key: str, token: int) -> None:
    with pytest.raises(UserError, match=rf"^{key}: found {token}, expected ids of the student's tokens, 0 to \d+$"):
        read_inputs(load_config(work / "campaign.yaml", [f"{key}=[{token}]"]))


def set_template(work: Here, model: str, template: object, **more: object) -> None:
    for file in (work / model).glob("chat_template*"):
        file.unlink()
    file = work / model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template, **more}))


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}<assistant>"


@pytest.mark.parametrize(
    "begun", ["{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}", "{% if"]
)
def test_a_teachers_template_that_raises_is_no_error(work: Here, begun: str) -> None:
    set_template(work, "teacher", begun + CHAT)
    done = work.run("check", "--offline", "campaign.yaml")
    assert done.returncode == 0, done.stderr


def test_a_template_of_several_is_chosen_by_the_arguments_of_the_prompts(work: Here) -> None:
    set_template(work, "student", [{"name": "rag", "template": CHAT}])
    chosen = [f"{key}.chat_template_arguments={{chat_template: rag}}" for key in ("prompts", "evaluation.prompts")]
    done = work.run("check", "--offline", "campaign.yaml", *chosen, "learner.objective.masked_token_roles=[template]")
    assert done.returncode == 0, done.stderr
    line = refusal(work)
    assert "prompts.chat_template_arguments: found no chat_template, expected chat_template: rag, since" in line


def test_a_student_without_an_end_that_it_has_a_row_for_is_refused(work: Here) -> None:
    set_template(work, "student", CHAT, eos_token=None)
    file = work / "student" / "generation_config.json"
    file.write_text('{"eos_token_id": 99999}')
    assert "student/generation_config.json: found eos_token_id 99999, expected ids" in refusal(work)
    file.unlink()
    absent = refusal(work, "prompts.path=absent.jsonl", "evaluation.prompts.path=absent.jsonl")
    assert "sampling.stop_token_ids: found none, expected at least one" in absent


def test_a_target_above_the_teachers_own_accuracy_is_refused_before_anything_runs(work: Here) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", str(work / "campaign.yaml"), "--target", "2"])
    assert ended.value.code == 2 and not (work / "runs").exists()


def test_a_reference_scores_every_prompt_that_is_trained_on_and_teaches_none(work: Here) -> None:
    overrides = ["teachers.base.model=teacher", "learner.objective.reference_teacher=base",
                 "learner.objective.extrapolation=1.25"]  # fmt: skip
    inputs = read_inputs(load_config(work / "campaign.yaml", overrides))
    assert inputs.prompt_routes.routes == [{"default": 0.0, "base": 0.0}] * 4
    assert inputs.held_out_routes is not None
    assert inputs.held_out_routes.routes == [{"default": 0.0}] * 4


@pytest.mark.parametrize("key", ["prompts", "evaluation.prompts"])
def test_a_prompts_file_that_is_missing_is_refused(work: Here, key: str) -> None:
    line = refusal(work, f"{key}.path=trein.jsonl", command=("run",))
    assert line.startswith(f"understudy: {key}.path: found trein.jsonl")
    assert "train.jsonl" in line


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], "bad.jsonl: found no records"),
        (["", " "], "bad.jsonl: found no records"),
        (['{"prompt": "a", "answer": "b"}', '{"prompt": '], "bad.jsonl, line 2"),
        (['{"prompt": "a", "answer": "b"}', "", "[1]"], "bad.jsonl, line 3"),
        (['{"prompt": "a", "answer": "b"}', '{"promt": "a", "answer": "b"}'], "prompts.prompt_field"),
        (['{"prompt": "a"}'], "prompts.reference_field"),
        (['{"prompt": 3, "answer": "b"}'], "bad.jsonl, line 1"),
        (['{"prompt": "a", "answer": "b"}', json.dumps({"prompt": "a" * 60, "answer": ""})], "bad.jsonl, line 2"),
    ],
)
def test_a_bad_prompts_file_is_named_with_its_line(work: Here, lines: list[str], found: str) -> None:
    (work / "bad.jsonl").write_text("".join(line + "\n" for line in lines))
    assert found in refusal(work, "prompts.path=bad.jsonl")


def test_a_response_that_leaves_no_room_for_a_prompt_is_refused(work: Here) -> None:
    assert "sampling.max_response_tokens" in refusal(work, "sampling.max_response_tokens=64")


def test_an_unknown_verifier_and_a_broken_pattern_are_refused(work: Here) -> None:
    assert "evaluation.verifier" in refusal(work, "evaluation.verifier.name=exakt")
    assert "evaluation.verifier" in refusal(work, "evaluation.verifier.name=regex", "evaluation.verifier.pattern='['")


def test_code_of_the_users_own_is_imported_and_tried(work: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "own_code.py").write_text("def verify(response, reference): return None\nclass Teacher: pass\n")
    monkeypatch.syspath_prepend(work.folder)
    line = refusal(work, "evaluation.verifier.name=own_code:verify")
    assert "evaluation.verifier.name: found own_code:verify, which returned None, expected a finite reward" in line
    line = refusal(work, "teachers.default.backend=own_code:Teacher")
    assert (
        "teachers.default.backend: found own_code:Teacher without the attribute `backend`, expected a class with"
        in line
    )


def test_a_report_of_what_is_no_run_is_refused(work: Here) -> None:
    for path in (".", "absent", "campaign.yaml"):
        one_line(work.run("report", path))
    assert not (work / "report.html").exists()


def test_a_finished_campaign_is_not_run_again_and_another_is_refused(work: Here) -> None:
    from cluster.config_file import load_config
    from cluster.state.resume import claimed

    config = load_config(work / "campaign.yaml", ["output_dir=runs"])
    with claimed(config):
        (config.run_dir / "metrics.jsonl").write_text('{"step": 1, "wall_seconds": 1.0}\n')
        assert "a campaign that another process is running" in refusal(work, "output_dir=runs", command=("run",))
    changes = ("learner.optimizer.learning_rate=0.5", "seed=7", "rollout.cpus_per_replica=0.3")
    line = refusal(work, "output_dir=runs", *changes, command=("run",))
    assert "learner.optimizer.learning_rate=1e-06 where this one has 0.5, seed=0 where this one has 7, expected" in line
    again = one_line(work.run("run", "--resume", "runs/here", *changes))
    assert again.replace(f"{work.folder}/", "") == line
    assert load_config(work / "runs" / "here" / "config.yaml") == config


def test_what_there_is_to_run_is_said_once(work: Here) -> None:
    line = one_line(work.run("run", "--resume", "runs/absent"))
    assert "a run directory: one with config.yaml" in line
    assert "CONFIG, a YAML file, or --resume RUN_DIR" in one_line(work.run("run"))
    from cluster.config_file import load_config
    from cluster.state.resume import claimed, config_of

    config = load_config(work / "campaign.yaml", ["output_dir=runs"])
    with claimed(config):
        (config.run_dir / "metrics.jsonl").write_text('{"step": 1, "wall_seconds": 1.0}\n')
    for override in ("name=other", "output_dir=elsewhere"):
        assert "the run directory says them" in one_line(work.run("run", "--resume", "runs/here", override))
    assert "override: found 'campaign.yaml'" in one_line(work.run("run", "--resume", "runs/here", "campaign.yaml"))
    (work / "moved: here").mkdir()
    (work / "runs" / "here").rename(work / "moved: here" / "b")
    moved = config_of(work / "moved: here" / "b", ["rollout.replicas=3"])
    assert (moved.run_dir, moved.rollout.replicas) == (work / "moved: here" / "b", 3)
    with claimed(moved) as taken:
        assert taken.changed == [("rollout.replicas", 1, 3, "free")]
        taken.write()
    with claimed(moved) as taken:
        assert taken.changed == []


def test_an_output_directory_that_is_a_file_is_refused(work: Here) -> None:
    (work / "taken").write_text("")
    assert refusal(work, "output_dir=taken", command=("run",)).startswith("understudy: output_dir: found taken")
    (work / "runs").mkdir()
    (work / "runs" / "here").write_text("")
    assert refusal(work, command=("run",)).startswith("understudy: output_dir: found runs")


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (UserError("here", "this", "that"), 2, "understudy: here: found this, expected that\n"),
        (CampaignError("it broke"), 1, "understudy: it broke\n"),
        (KeyboardInterrupt(), 130, "understudy: interrupted\n"),
    ],
)
def test_errors_become_statuses_and_lines(
    raised: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> int:
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "check", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "any.yaml"])
    assert ended.value.code == status
    assert capsys.readouterr().err == line


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise ZeroDivisionError("a defect")

    monkeypatch.setitem(cli.COMMANDS, "check", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["check", "any.yaml"])
