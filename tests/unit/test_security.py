"""What may run code, what may be written where, and what must not be told; docs/security.md says what is trusted."""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from actors.data.models import load_model
from actors.data.tokenizer import load_tokenizer
from actors.errors import UserError
from cluster.config_file import load_config
from tests.light_campaign import configuration, finish, make_folder, start
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for floor in ("actors", "learner", "cluster") for path in (ROOT / floor).rglob("*.py"))
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {
    "torch.load",
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "os.system",
    "os.popen",
}


def runs_foreign_code(tree: ast.AST) -> list[str]:
    """Imports and calls by which a file that is read could run code, `trust_remote_code=True`, and shells."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            found += [name for name in names if name.partition(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            found += [ast.unparse(node.func)] if ast.unparse(node.func) in CALLS else []
            for keyword in node.keywords:
                if (
                    keyword.arg in ("trust_remote_code", "shell", "allow_pickle")
                    and ast.unparse(keyword.value) == "True"
                ):
                    found.append(f"{keyword.arg}=True")
    return found


def test_no_file_that_is_read_can_run_code() -> None:
    assert len(SOURCES) > 40
    found = {path.name: found for path in SOURCES if (found := runs_foreign_code(ast.parse(path.read_text())))}
    # Answers between actors of one campaign, which Ray would pickle too: each by itself, so that one alone can fail.
    assert found == {"shared_calls.py": ["pickle"], "ray_shared_calls.py": ["pickle"]}


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from cloudpickle import loads", "torch.load(f)", "eval(text)", "f(trust_remote_code=True)",
     "np.load(f)", "run(x, shell=True)", "import torch, joblib"],
)  # fmt: skip
def test_what_would_run_code_is_seen(line: str) -> None:
    assert runs_foreign_code(ast.parse(line))


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "training_args.bin"])
def test_a_pickle_in_a_model_directory_is_never_opened(tmp_path: Path, name: str) -> None:
    model, mark = make_tiny_model(tmp_path / "m", hidden=32, layers=1), tmp_path / "ran"
    torch.save({"a": Evil(mark)}, tmp_path / "pickle")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "pickle")  # torch's own guard, which must not be what we rely on
    torch.load(tmp_path / "pickle", weights_only=False)
    assert mark.exists()
    mark.unlink()
    if name != "training_args.bin":  # which is what trainers leave beside good weights
        (model / "model.safetensors").unlink()
    (tmp_path / "pickle").rename(model / name)
    if name == "training_args.bin":
        load_model(str(model), "float32", "cpu", False, "student.model")
    else:
        with pytest.raises(UserError, match="safetensors"):
            load_model(str(model), "float32", "cpu", False, "student.model")
    assert not mark.exists()


def test_code_that_comes_with_a_model_is_not_run_unless_it_is_asked_for(tmp_path: Path) -> None:
    model, mark = make_tiny_model(tmp_path / "m", hidden=32, layers=1), tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Thing: pass\n")
    for file, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((model / file).read_text())
        content |= {"auto_map": {kind: "evil.Thing", "AutoModelForCausalLM": "evil.Thing"}, "model_type": "evil"}
        content.pop("tokenizer_class", None)
        (model / file).write_text(json.dumps(content))
    for load in (
        lambda: load_model(str(model), "float32", "cpu", False, "student.model"),
        lambda: load_tokenizer(str(model), False, "student.model"),
    ):
        with pytest.raises(UserError):
            load()
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ".hidden", "a b", "a\nb", "$HOME"])
def test_a_name_cannot_lead_out_of_the_output_directory(tmp_path: Path, name: str) -> None:
    config = configuration(make_folder(tmp_path), "here")
    with pytest.raises(UserError, match="name"):
        load_config(config, [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket/x", "http://:hunter2@host"])
def test_a_password_in_a_url_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    config = configuration(make_folder(tmp_path), "here")
    with pytest.raises(UserError, match=r"mlflow_uri: found a URL with a password") as refused:
        load_config(config, [f"tracking.mlflow_uri='{url}'"])
    assert "hunter2" not in str(refused.value)
    load_config(config, ["tracking.mlflow_uri='http://host:5000/a@b:c'"])


def test_what_prompts_and_the_environment_say_ends_up_nowhere_it_should_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hunter2-5ec2e7"
    for variable in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(variable, secret)
    folder = make_folder(tmp_path)
    evil = "../../../outside/{seed}/<script>alert(1)</script>"
    for name in ("train", "heldout"):
        lines = [json.dumps({"prompt": f"{evil[:20]}{i}", "answer": evil, "domain": "../up"}) for i in range(11)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    config = configuration(folder, "here", pipeline={"updates": 2})
    finish(start(config), config)
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    run_dir = folder / "runs" / "here"
    assert {path for path in made if not path.is_relative_to(run_dir)} == {config, config.with_suffix(".log")}
    assert len(made) > 10
    for path in made:
        assert secret.encode() not in path.read_bytes(), path
    assert os.environ["HF_TOKEN"] == secret
    report = (run_dir / "report.html").read_text()
    assert "alert(1)" in report and "<script>alert(1)" not in report
