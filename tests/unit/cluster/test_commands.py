"""Every command of README, documentation and examples exists in this version.

Commands that take a second are run: `status`, `tail`, `report` and `plan` on a finished run, `check` with `--offline`, which also
tries the configurations of `run` and `submit`. Of the others the arguments are parsed: RUN_BY names the tests that run them,
SCRIPTS says why a script is not run. NOT_HERE lists the rest.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from actors.prompts.files import is_pattern
from actors.teacher.backends import backend_of
from cluster.cli import main
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.console.arguments import command_parser
from cluster.pins import places
from tests.documented import ROOT, Command, commands, commands_of, examples_in
from tests.fake_run import make_fake_run

COMMANDS = commands()
NOT_HERE = {
    ("lm_eval",): "lm-evaluation-harness, which is not installed; docs/harness was run with it (docs/evaluation.md)",
    ("lighteval",): "lighteval, which is not installed, and does not run with transformers 5 yet (docs/evaluation.md)",
    ("export",): "sets a variable of the reader's shell",
    ("source",): "sets variables of the reader's shell",
    ("(umask",): "makes a token; every LocalCluster runs it",
    ("pip", "install"): "changes the installation; what is installed is in pyproject.toml",
    ("pip", "config"): "tells about pip",
    ("pip", "check"): "tells about the installation",
    ("mkdocs", "serve"): "goes on for ever; the site is built by a test of its own",
    ("ray", "status"): "asks a cluster",
    ("sbatch",): "asks a Slurm cluster",
    ("prometheus",): "a program that the tests do not have; the file is read in tests/unit/deploy",
    ("kubectl", "apply"): "asks a Kubernetes cluster; the manifests are tested in tests/unit/deploy",
    ("docker", "run"): "starts a container",
    ("vllm", "serve"): "goes on for ever; tests/unit/cluster/test_export.py loads what it would serve",
    ("hf", "download"): "asks a hub",
    ("nvidia-smi",): "asks a driver",
    ("df",): "tells about the reader's machine",
    ("git", "pull"): "changes the reader's clone",
    ("curl", "http://127.0.0.1:8000/v1/chat/completions"): "asks that server",
}
"""First words -> why they are not run."""
RUN_BY = {
    "understudy run": "tests/integration/test_run.py",
    "understudy submit": "tests/integration/test_job.py",
    "understudy compare": "tests/unit/cluster/test_compare.py",
    "understudy export": "tests/unit/cluster/test_export.py",
    "understudy evaluate": "tests/unit/cluster/test_evaluate.py",
    "understudy score": "tests/unit/cluster/test_score.py",
    "understudy pause": "tests/integration/test_steering.py",
    "understudy resume": "tests/integration/test_steering.py",
    "understudy stop": "tests/integration/test_steering.py",
    "understudy scale": "tests/integration/test_steering.py",
    "ray start": "tests/e2e/test_walk.py",
    "ray job submit": "tests/integration/test_job.py",
    "make demo": "tests/e2e/conftest.py",
    "make test": "",
    "make test-all": "",
    "make lint": "",
    "make setup": "",
}
"""First words of a command -> the test that runs it; here only its arguments are checked. "": the command runs the tests."""
SCRIPTS = {
    "benchmarks": "minutes to hours, or a GPU",
    "docs/make_configuration.py": "writes pages; tests/unit/cluster/test_documentation.py runs it with --check",
    "docs/make_metrics.py": "writes a page; tests/unit/cluster/test_documentation.py runs it with --check",
    "docs/make_walk.py": "minutes, on a cluster of its own; tests/e2e/test_walk.py takes its steps",
    "deploy/make_grafana.py": "writes what tests/unit/deploy/test_manifests.py compares",
    "examples": "trains models for minutes; tests/unit/test_examples.py reads what is committed",
    "tests.unit": "a table of a test's own figures, which the test asserts",
}
"""Script, module, or a folder of them -> why it is not run here."""
READERS_OWN = ("/shared/", "~/understudy-models/", "RUN/checkpoints/")
"""Where configurations expect files that the reader brings or makes. Everything else that they name is in the repository."""
CHECKED: set[tuple[str, ...]] = set()
"""Arguments of `check` that were tried and found good: many pages have the same command."""
READ_ARGUMENTS = """
import argparse, json, runpy, sys, traceback
parse = argparse.ArgumentParser.parse_args
def stop(*arguments, **keywords):
    parse(*arguments, **keywords)
    sys.exit(0)
argparse.ArgumentParser.parse_args = stop
sys.path.insert(0, "")
wrong = {}
for words in json.loads(sys.argv[1]):
    sys.argv = words[words[0] == "-m":]
    try:
        (runpy.run_module if words[0] == "-m" else runpy.run_path)(sys.argv[0], run_name="__main__")
        wrong[" ".join(words)] = "it reads no arguments, or none before it works"
    except SystemExit as ended:
        if ended.code:
            wrong[" ".join(words)] = f"exit status {ended.code}"
    except BaseException:
        wrong[" ".join(words)] = traceback.format_exc()
print(json.dumps(wrong))
"""
"""Runs scripts until they have parsed their arguments; in one process, because most of them import torch."""


def refused(scripts: list[list[str]]) -> dict[str, str]:
    """Command -> why the script refuses its arguments."""
    command = [sys.executable, "-c", READ_ARGUMENTS, json.dumps(scripts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the quickstart that looks finished."""
    run = make_fake_run(tmp_path_factory.mktemp("documented") / "quickstart")
    config = ROOT.joinpath("configs/quickstart.yaml").read_text().replace("~/understudy-runs", str(run.parent))
    (run / "config.yaml").write_text(config)
    [mine] = examples_in("yaml", "README.md")
    for name in ("train.jsonl", "heldout.jsonl"):
        mine = mine.replace(name, str(ROOT / "examples" / "addition" / name))
    (run.parent / "mine.yaml").write_text(mine)
    return run


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.text[:60]}")
def test_the_command_is_one_that_this_version_has(
    command: Command, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))  # whose models and runs are of no consequence
    program, *words = [
        {"RUN": str(run_dir), "MINE": str(run_dir.parent / "mine.yaml")}.get(word, word) for word in command.words
    ]
    if any(tuple([program, *words][: len(prefix)]) == prefix for prefix in NOT_HERE):
        return
    if words[:2] == ["-m", "benchmarks.methods"]:  # which takes the same arguments
        program, words = "understudy", ["compare", *words[2:]]
    if program == "understudy":
        return of_understudy(words, tmp_path, run_dir)
    look = {"python": of_python, "make": of_make, "ray": of_ray, "pytest": of_pytest}
    assert program in look, f"{program}: neither looked into nor in NOT_HERE"
    return look[program](words)


def of_understudy(words: list[str], folder: Path, run_dir: Path) -> None:
    if len(words) == 1:  # a command's name, or an option, alone
        assert words[0] in command_parser().format_help()
        return
    if words[0] in ("plan", "submit") and words[1].startswith("--"):  # what is to be added to `plan CONFIG`
        words.insert(1, "configs/quickstart.yaml")
    options, others = command_parser().parse_known_args(words)
    assert not [other for other in others if other.startswith("-")]
    if config := getattr(options, "config", None):
        overrides = [*options.overrides, *others]
        load_config(config, [override for override in overrides if ":" not in override.partition("=")[0]])
    elif words[0] == "evaluate":
        load_config([word for word in options.sources if "=" not in word][-1])
    elif others:
        raise AssertionError(f"unrecognized: {others}")
    if words[0] in ("run", "submit") and config and not getattr(options, "allow_change", None):
        words = ["check", config, *overrides]  # all that comes before the actors
    if words[0] in ("status", "tail", "report", "plan", "check"):
        extra = {
            "report": ["--output", str(folder / "page.html")],
            "plan": [] if "--run" in words else ["--run", str(run_dir)],
            "check": ["--offline"],
        }.get(words[0], [])
        if words[0] == "check":
            assert absent(load_config(config, overrides)) == []
            if tuple(words) in CHECKED:
                return
        with pytest.raises(SystemExit) as ended:
            main([*[word for word in words if word != "--watch"], *extra])
        assert ended.value.code == 0
        CHECKED.add(tuple(words))
    else:
        assert f"understudy {words[0]}" in RUN_BY, f"{words[0]} is not looked into"


def absent(config: CampaignConfig) -> list[str]:
    """What the configuration names on this machine and is not there: `check --offline` passes over it."""
    served = [teacher for teacher in config.teachers.values() if not backend_of(teacher).has_model_files]
    here = [place for place in places(config) if not place.on_hub and place.section not in served]
    return [
        f"{place.key}: {place.name}"
        for place in here
        if not place.name.startswith(READERS_OWN)
        and not is_pattern(place.name)
        and not Path(place.name).expanduser().exists()
    ]


def script(words: list[str]) -> Path:
    """The file that `python …` runs, from the repository's root."""
    if words[0] != "-m":
        return ROOT / words[0]
    path = ROOT / words[1].replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def of_python(words: list[str]) -> None:
    source = script(words)
    named = words[1] if words[0] == "-m" else words[0]
    assert any(named.startswith(known) for known in SCRIPTS), f"{named}: neither run nor in SCRIPTS"
    if "<name>" in str(source):
        assert list(ROOT.glob(str(source.relative_to(ROOT)).replace("<name>", "*")))
    elif not reads_arguments(source):  # those with arguments are looked into together
        assert len(words) == 1 + (words[0] == "-m"), f"{source} reads no arguments"
        compile(source.read_text("utf-8"), str(source), "exec")


def with_arguments(found: list[Command]) -> list[list[str]]:
    """Of these commands, what stands behind `python`, where that is a script that reads arguments."""
    scripts = [command.words[1:] for command in found if command.words[0] == "python" and "<name>" not in command.text]
    return [words for words in scripts if reads_arguments(script(words))]


def reads_arguments(source: Path) -> bool:
    """Whether a script has a command line: `parsed` is that of the scripts which make examples."""
    return bool(re.search(r"argparse|\bparsed\(__doc__", source.read_text("utf-8")))


def test_scripts_take_the_arguments_that_pages_give_them() -> None:
    scripts = with_arguments(COMMANDS)
    wrong = ["-m", "benchmarks.pipeline", "stages", "--updatez", "30"]
    assert len(scripts) > 5
    assert refused([*scripts, wrong]) == {" ".join(wrong): "exit status 2"}


def of_pytest(words: list[str]) -> None:
    assert all(ROOT.joinpath(word).exists() for word in words)


def of_make(words: list[str]) -> None:
    assert f"make {words[0]}" in RUN_BY
    done = subprocess.run(["make", "--dry-run", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def of_ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    known = [name.split()[1:] for name in RUN_BY if name.startswith("ray ")]
    name = next((" ".join(one) for one in known if words[: len(one)] == one), None)
    assert name, f"ray {words[0]}: neither looked into nor in NOT_HERE"
    command = cli
    for part in name.split():
        command = command.commands[part]
    command.make_context(name, words[len(name.split()) :])


def test_commands_are_found_in_every_form() -> None:
    page = """
```sh
understudy check a.yaml   # a comment
# only a comment
ray start --head \\
  --num-cpus=2
```
and `A=1 B=2 python -m benchmarks.head --x`, not `python`, `A=1` or `make_models.py`.

    python benchmarks/sizes.py

```
plain text
$ make demo
```
"""
    assert [Command("p", text).words for text in commands_of(page)] == [
        ["understudy", "check", "a.yaml"],
        ["ray", "start", "--head", "--num-cpus=2"],
        ["make", "demo"],
        ["python", "benchmarks/sizes.py"],
        ["python", "-m", "benchmarks.head", "--x"],
    ]
    assert len(COMMANDS) > 40


def test_each_command_that_is_only_parsed_is_run_by_a_test_that_there_is() -> None:
    tests = {command: test for command, test in RUN_BY.items() if test}
    for command, test in tests.items():
        last = command.split()[-1]
        text = (ROOT / test).read_text("utf-8") + (ROOT / "tests/walk.py").read_text("utf-8")
        text += (ROOT / "tests/local_cluster.py").read_text("utf-8")
        assert re.search(rf"\b{last}\b", text), f"{test} does not run {command}"
    for reason in SCRIPTS.values():
        assert all((ROOT / path).exists() for path in re.findall(r"tests/[\w/]+\.py", reason))


@pytest.mark.parametrize(
    "text",
    [
        "understudy runn configs/quickstart.yaml",
        "understudy run configs/absent.yaml",
        "understudy run configs/quickstart.yaml pipeline.updatez=3",
        "understudy run configs/quickstart.yaml student.model=/absent/model",
        "understudy submit configs/quickstart.yaml --address URL teachers.default.model=examples/addition/absent",
        "understudy run configs/quickstart.yaml prompts.path=absent.jsonl",
        "understudy run configs/quickstart.yaml evaluation.prompts.path=examples/absent.jsonl",
        "understudy check mine.yaml prompts.path=absent.jsonl",
        "understudy run configs/quickstart.yaml student.model=examples/addition",
        "understudy submit configs/quickstart.yaml --address URL prompts.prompt_field=absent",
        "understudy status RUN --wach",
        "understudy report RUN --json",
        "understudy plan configs/quickstart.yaml --gpuz 8",
        "python benchmarks/absent.py",
        "make demonstration",
        "ray start --heat",
        "ray stop",
        "pytest tests/absent.py",
        "A=1 python -m benchmarks.absent",
        "curl http://127.0.0.1:8265",
    ],
)
def test_a_command_that_this_version_has_not_is_found_out(
    text: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((Exception, SystemExit)):
        test_the_command_is_one_that_this_version_has(Command("p", text), run_dir, tmp_path, monkeypatch)
