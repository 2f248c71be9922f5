"""The ciphers: the verifier, what a model covers, and the figures and tables that the pages show of them."""

import json
import os
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.data.models import load_model
from actors.data.tokenizer import load_tokenizer
from benchmarks import ciphers, ciphers_page
from cluster.commands.compare import METHODS
from cluster.config_file import load_config
from examples.ciphers.ciphers import CIPHERS, LETTERS, TABLES, draw_tables, right, written
from examples.ciphers.coverage import PROMPTS, coverage
from tests import clean_process

ROOT = Path(__file__).resolve().parents[2]
STUDENT = ROOT / "examples" / "ciphers" / "student"


def test_any_cipher_is_right_and_a_mixture_is_not() -> None:
    assert [sorted(table.values()) == sorted(LETTERS) for table in TABLES.values()] == [True] * len(CIPHERS)
    assert draw_tables(0) == TABLES != draw_tables(1)
    word = "abcdefgh"
    answers = {name: written(word, name) for name in CIPHERS}
    assert len(set(answers.values())) == 8
    assert [right(answer, word) for answer in answers.values()] == [1.0] * 8
    for name, other in pairwise(CIPHERS):
        half = answers[name][:5] + answers[other][5:]
        assert right(half, word) == float(half == answers[name])
        assert right(other + answers[name][1:], word) == 0.0
    for wrong in ("", "A", answers["A"][:-1], answers["A"] + "a", answers["A"][1:], "Z" + answers["A"][1:]):
        assert right(wrong, word) == 0.0


@torch.no_grad()
def test_coverage_is_that_of_one_answer_at_a_time() -> None:
    model, tokenizer = load_model(str(STUDENT), "float32", "cpu", False, "a"), load_tokenizer(str(STUDENT), False, "a")
    words = [json.loads(line)["prompt"] for line in PROMPTS.read_text("utf-8").splitlines()[:2]]
    name_WC, rest_WC = torch.zeros(2, 8), torch.zeros(2, 8)
    for i, word in enumerate(words):
        chat = [{"role": "user", "content": word}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for j, name in enumerate(CIPHERS):
            answer = tokenizer(written(word, name), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for k, token in enumerate(answer):
                logits = model(torch.tensor([prompt + answer[:k]])).logits[0, -1]
                (rest_WC if k else name_WC)[i, j] += float(logits.log_softmax(-1)[token])
    found = coverage(str(STUDENT), 2)
    share_C = name_WC.exp().mean(0) / name_WC.exp().mean(0).sum()
    assert found.right == pytest.approx(float((name_WC + rest_WC).exp().sum(1).mean()), rel=1e-4)
    assert found.ciphers == pytest.approx(float((-(share_C * share_C.log()).sum()).exp()), rel=1e-4)
    assert found.best == pytest.approx(float(rest_WC[:, share_C.argmax()].exp().mean()), rel=1e-4)
    assert found.mean == pytest.approx(float(rest_WC.exp().mean()), rel=1e-4)
    assert found.forward_kl == pytest.approx(float((name_WC + rest_WC).mul(-1).sub(torch.tensor(8.0).log()).mean()))


def measure(arguments: list[str]) -> None:
    """Does what `python -m benchmarks.ciphers ARGUMENTS` does, with two of the estimators and of the trust regions."""
    os.chdir(ROOT)
    for kinds in (ciphers.ESTIMATORS, ciphers.TRUST_REGIONS):
        for name in list(kinds)[2:]:
            del kinds[name]
    ciphers.main(arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two updates leave."""
    folder = tmp_path_factory.mktemp("ciphers")
    sizes = ["pipeline.updates=2", "pipeline.prompts_per_update=8", "evaluation.prompts.limit=4"]
    sizes += ["evaluation.every_updates=1", "checkpoint.every_updates=2", f"output_dir={folder / 'runs'}"]
    arguments = ["--seeds", "3", "--output", str(folder / "ciphers.json")]
    arguments += [word for size in sizes for word in ("--set", size)]
    process = clean_process.start(measure, arguments, log=folder / "log")
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
    return json.loads((folder / "ciphers.json").read_text())


def test_every_part_is_measured(measured: Any) -> None:
    assert list(measured["methods"]) == list(METHODS)
    assert list(measured["estimators"]) == list(ciphers.ESTIMATORS)[:2]
    assert list(measured["trust_regions"]) == list(ciphers.TRUST_REGIONS)[:2]
    for group in ("methods", "estimators", "trust_regions"):
        for courses in measured[group].values():
            assert [one["seed"] for one in courses] == [3]
            assert all([row["step"] for row in one["rows"]] == [0, 1, 2] for one in courses)
    covered = measured["methods"]["opd"][0]["coverage"]
    assert covered.keys() == ciphers_page.COVERED.keys() and covered != measured["models"]["student"]


def test_every_estimator_and_every_trust_region_is_another_campaign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for kinds in (ciphers.ESTIMATORS, ciphers.TRUST_REGIONS):
        objectives = [load_config(ciphers.CONFIG, changes).learner.objective for changes in kinds.values()]
        assert all(one != other for one, other in combinations(objectives, 2))
    assert {load_config(ciphers.CONFIG, changes).learner.objective.estimator for changes in ciphers.ESTIMATORS.values()} == {
        "trajectory", "to_go", "to_go_expected", "discounted", "immediate", "full",
    }  # fmt: skip


def test_figures_and_tables_are_made_of_what_was_measured(measured: Any) -> None:
    assert len(ciphers_page.tables(measured)) == 5
    for drawn, curves in ((ciphers_page.talk(measured), len(METHODS)), (ciphers_page.theory(measured), 4)):
        assert drawn.startswith("<svg") and "nan" not in drawn and drawn.count("<polyline") == curves
    assert ciphers_page.coverage_table(measured).count("\n") == 1 + 2 + len(METHODS)


def test_the_pages_show_what_was_measured() -> None:
    found = json.loads((ROOT / ciphers.OUTPUT).read_text("utf-8"))
    pages = [(ROOT / "docs" / name).read_text("utf-8") for name in ("compare.md", "objective.md")]
    assert [sum(table in page for page in pages) for table in ciphers_page.tables(found)] == [1] * len(
        ciphers_page.tables(found)
    )
    figures = {"ciphers.svg": ciphers_page.talk}
    if found.keys() & ciphers_page.CURVES.keys():
        figures["ciphers-estimators.svg"] = ciphers_page.theory
    for name, drawn in figures.items():
        assert (ROOT / "docs" / name).read_text("utf-8") == drawn(found)
        assert sum(f"]({name})" in page for page in pages) == 1
