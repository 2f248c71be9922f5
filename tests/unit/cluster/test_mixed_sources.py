"""Campaigns on several sources of prompts: exact on resume, changed on request, refused where they contradict each other."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from actors.config import MixedSourceConfig
from actors.errors import UserError
from actors.prompts.columns import Coded, Texts
from actors.prompts.fingerprint import prompts_fingerprint
from actors.prompts.prompt_set import PromptSet
from actors.trajectory import offsets_of
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.inputs import mixture
from cluster.records.writer import read_jsonl
from cluster.state.changes import changes
from tests.light_campaign import (
    assert_ledger_adds_up,
    configuration,
    fingerprint,
    finish,
    make_folder,
    start,
)
from tests.unit.cluster.test_config import GOOD, refusal

SHORT = {"updates": 4, "prompts_per_update": 3, "samples_per_prompt": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def mixed(folder: Path, name: str, **sections: Any) -> Path:
    sources = {
        "sums": {"path": str(folder / "train.jsonl"), "weight": 0.7, "limit": 4, "domain": "sums"},
        "others": {"path": str(folder / "held*.jsonl"), "weight": 0.3},
    }
    held_out = {"sources": {"a": {"path": str(folder / "heldout.jsonl"), "limit": 2, "domain": "sums"}}}
    return configuration(
        folder,
        name,
        prompts={"path": None, "sources": sources},
        pipeline=SHORT,
        evaluation={"prompts": held_out, "every_updates": 2},
        **sections,
    )


def test_a_mixture_is_exact_on_resume_with_other_replicas_and_changes_on_request(folder: Path) -> None:
    whole, killed = mixed(folder, "whole"), mixed(folder, "killed", rollout={"replicas": 1})
    finish(start(whole), whole)
    first = start(killed, 60)
    first.join()
    assert first.exitcode == -9
    finish(start(killed), killed)
    assert fingerprint(folder / "runs" / "whole") == fingerprint(folder / "runs" / "killed")
    assert_ledger_adds_up(folder / "runs" / "whole", updates=4, size=6, max_staleness=0)
    rows = read_jsonl(folder / "runs" / "whole" / "metrics.jsonl")[1:]
    assert 0 < np.mean([row["domain/sums/token_share"] for row in rows]) < 1

    before = load_config(folder / "runs" / "whole" / "config.yaml")
    (folder / "more.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n')
    more = f"prompts.sources.more={{path: {folder / 'more.jsonl'}, weight: 1}}"
    after = load_config(folder / "runs" / "whole" / "config.yaml", [more])
    with pytest.raises(UserError, match=r"--allow-change prompts\.sources\.more\."):
        changes(before, after, [])
    assert {one.key for one in changes(before, after, ["prompts.sources.more"])} >= {"prompts.sources.more.weight"}
    # Other weights change the mathematics; a source that moved does not.
    heavier = load_config(folder / "runs" / "whole" / "config.yaml", ["prompts.sources.sums.weight=2"])
    with pytest.raises(UserError, match=r"--allow-change prompts\.sources\.sums\.weight"):
        changes(before, heavier, [])
    moved = load_config(folder / "runs" / "whole" / "config.yaml", [f"prompts.sources.sums.path={folder / 'm.jsonl'}"])
    assert [one.change for one in changes(before, moved, [])] == ["same contents"]


def test_each_source_has_a_fingerprint_of_its_own() -> None:
    def prompts(*lengths: int) -> PromptSet:
        nothing: list[Any] = [None] * len(lengths)
        tokens = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        offsets = offsets_of(lengths)
        return PromptSet(
            tokens=tokens, offsets=offsets, references=Texts.of(nothing), domains=Coded.of(nothing), texts=Texts.of([])
        )

    both = prompts(3, 2, 4)
    assert prompts_fingerprint(both, range(1, 3)) == prompts_fingerprint(prompts(2, 4))
    assert prompts_fingerprint(both, range(1)) == prompts_fingerprint(prompts(3))
    assert prompts_fingerprint(both) == prompts_fingerprint(both, range(3)) != prompts_fingerprint(prompts(3, 2, 3))


A, B = "path: a.jsonl", "path: b.jsonl"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("path: null", "prompts.path: found nothing, expected a value: a file, a directory, a dataset"),
        (f"path: x.jsonl, sources: {{a: {{{A}}}}}", "prompts.path: found x.jsonl, expected nothing where there are"),
        (f"limit: 3, sources: {{a: {{{A}}}}}", "prompts.limit: found 3, expected nothing where there are"),
        ("sources: {a: {weight: 1}}", "prompts.sources.a.path: found nothing, expected a value"),
        (f"sources: {{a: {{{A}, weight: 0}}}}", "prompts.sources.a.weight: found 0.0, expected a number > 0"),
        (f"sources: {{a: {{{A}, weight: -1}}}}", "prompts.sources.a.weight: found -1.0, expected a number > 0"),
        (f"sources: {{a: {{{A}, weight: .nan}}}}", "prompts.sources.a.weight: found nan, expected a finite number"),
        (f"sources: {{a: {{{A}, weight: 1}}, b: {{{B}}}}}", "prompts.sources.b.weight: found null, expected a weight"),
        (f"sources: {{a: {{{A}}}, b: {{{A}, limit: 3}}}}", "prompts.sources.b: found a.jsonl, which prompts.sources.a is"),
        ("sources: {a: {path: d/a.jsonl}, b: {path: d/./a.jsonl}}", "prompts.sources.b: found d/./a.jsonl, which"),
        (f"sources: {{'a b': {{{A}}}}}", "prompts.sources: found 'a b', expected a name of letters"),
        (f"sources: {{a: {{{A}, domain: x, domain_field: y}}}}", "prompts.sources.a.domain: found x, expected null"),
        ("path: a.jsonl, function: 'm:f'", "prompts.function: found m:f, expected null where there is a path"),
        ("path: a.jsonl, function_arguments: {n: 1}", "prompts.function_arguments: found {'n': 1}, expected a function"),
        ("function: 'm:f', split: test", "prompts.split: found test, expected nothing where a function yields"),
        ("path: a/b, streaming: true", "prompts.limit: found null, expected how many rows to read"),
    ],
)  # fmt: skip
def test_sources_that_contradict_each_other_are_refused_by_their_key(
    tmp_path: Path, section: str, message: str
) -> None:
    text = GOOD.replace("prompts: {path: train.jsonl}", f"prompts: {{{section}}}")
    assert text != GOOD
    assert message in refusal(tmp_path, text)


def test_held_out_sources_have_no_weights(tmp_path: Path) -> None:
    told = refusal(tmp_path, GOOD, "evaluation.prompts={sources: {a: {path: a.jsonl, weight: 1}}}")
    assert "evaluation.prompts.sources.a.weight: found 1.0, expected null" in told


def test_shares_of_large_weights_are_told_as_they_are() -> None:
    config, prompts = (
        CampaignConfig(),
        cast(PromptSet, SimpleNamespace(counts={f"prompts.sources.{n}": 10 for n in "ab"})),
    )
    config.prompts.sources = {name: MixedSourceConfig(path=name, weight=1e308) for name in "ab"}
    assert ["50.0% of all" in line for line in mixture(config, prompts)] == [True, True]
