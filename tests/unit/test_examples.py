"""Every example and recipe is a configuration that `check` accepts, and what makes the examples still runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config_file import load_config
from cluster.preflight import checks
from examples.carries.make_prompts import LEAST, carries
from examples.two_domains.make_models import running

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted([*ROOT.glob("examples/*/*.yaml"), *ROOT.glob("configs/*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_check_accepts_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for _, check in checks(load_config(path), offline=True):
        if check is not None:
            check()


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("privileged.make_models", ["--steps", "1"]), ("two_domains.make_models", ["--steps", "0.001"])],
)
def test_what_makes_the_models_runs(module: str, arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"examples.{module}", *arguments, "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    assert list(tmp_path.glob("*/model.safetensors"))


def test_the_committed_prompts_are_those_that_the_scripts_make(tmp_path: Path) -> None:
    for module, extra in (("carries.make_prompts", []), ("two_domains.make_models", ["--steps", "0.001"])):
        out = tmp_path / module
        command = [sys.executable, "-m", f"examples.{module}", *extra, "--output", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
        for name in ("train.jsonl", "heldout.jsonl"):
            assert (out / name).read_bytes() == (ROOT / "examples" / module.partition(".")[0] / name).read_bytes()


def test_the_answers_are_right() -> None:
    for path in ROOT.glob("examples/*/*.jsonl"):
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            if row.get("domain") == "running":
                totals = [sum(map(int, row["prompt"][1 : i + 2])) % 10 for i in range(len(row["prompt"]) - 1)]
                assert row["answer"] == "".join(map(str, totals))
            else:
                a, b = map(int, row["prompt"].split("+"))
                assert int(row["answer"]) == a + b
                assert path.parent.name != "carries" or carries(a, b) >= LEAST


def test_carries_by_hand() -> None:
    assert [carries(a, b) for a, b in ((1, 2), (5, 5), (99, 1), (45, 55), (90, 9))] == [0, 1, 2, 2, 0]


def test_a_running_sum_by_hand() -> None:
    class Draw:
        digits = iter([4, 8, 2, 1, 7])

        def randrange(self, _: int) -> int:
            return next(self.digits)

        def random(self) -> float:
            return 0.5

    assert running(Draw()) == ("-48217", "4+0=4,8+4=2,2+2=4,1+4=5,7+5=2;42452")  # type: ignore[arg-type]
