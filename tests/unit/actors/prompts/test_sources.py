"""Several sources of prompts, patterns, compressed files, streams, and functions of the user's own."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.config import MixedSourceConfig, PromptsConfig
from actors.errors import UserError
from actors.prompts import own_records
from actors.prompts.prompt_set import PromptSet, load_prompts
from tests import fake_hub
from tests.tiny_models import make_tiny_tokenizer


def write(path: Path, *prompts: str, **others: Any) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "2", **others}) + "\n" for prompt in prompts))
    return path


def load(**section: Any) -> PromptSet:
    return load_prompts(PromptsConfig(chat=False, **section), make_tiny_tokenizer(), 20, "prompts")


def source(path: Path | None = None, **others: Any) -> MixedSourceConfig:
    return MixedSourceConfig(path=None if path is None else str(path), **others)


def test_sources_are_numbered_one_after_the_other_with_their_own_fields_domains_and_places(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "1+1=", "2+2=", kind="x")
    (tmp_path / "b.jsonl").write_text('\n{"question": "3+3="}\n{"question": "4+4="}\n')
    found = load(
        sources={
            "sums": source(tmp_path / "a.jsonl", domain_field="kind", limit=1),
            "others": source(tmp_path / "b.jsonl", prompt_field="question", reference_field=None, domain="y"),
        }
    )
    assert found.texts == ["1+1=", "3+3=", "4+4="] and found.domains == ["x", "y", "y"]
    assert found.references == ["2", None, None]
    assert found.counts == {"prompts.sources.sums": 1, "prompts.sources.others": 2}
    assert found.where(2) == f"{tmp_path / 'b.jsonl'}, line 3"
    assert found.rows_of("prompts.sources.others") == range(1, 3)


def test_one_source_is_counted_without_a_name(tmp_path: Path) -> None:
    assert load(path=str(write(tmp_path / "a.jsonl", "1", "2"))).counts == {"": 2}


def test_a_pattern_is_its_files_in_the_order_of_their_names_and_a_fault_names_its_file(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", f"{name}1", f"{name}2")
    pattern = str(tmp_path / "*.jsonl")
    assert load(path=pattern).texts == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert load(path=pattern, limit=3).texts == ["a1", "a2", "b1"]
    write(tmp_path / "b.jsonl", "b1", "b" * 30)
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: found a prompt of 30 tokens"):
        load(path=pattern)
    with pytest.raises(UserError, match=r"^prompts\.path: found .*\*\.txt, expected a pattern that files match"):
        load(path=str(tmp_path / "*.txt"))


def test_lines_compressed_by_zstandard_are_read_and_broken_ones_refused(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", *(f"{i}+{i}=" for i in range(3000)))
    packed = pa.compress(plain.read_bytes(), "zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert load(path=str(tmp_path / "a.jsonl.zst")).texts == load(path=str(plain)).texts
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst"):
        load(path=str(tmp_path / "a.jsonl.zst"))


def test_a_source_without_records_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl: found no records, expected at least one prompt"):
        load(sources={"a": source(write(tmp_path / "a.jsonl", "1")), "b": source(tmp_path / "empty.jsonl")})


@pytest.mark.parametrize("other", ["*.jsonl", "link.jsonl"])
def test_a_file_is_of_one_source(tmp_path: Path, other: str) -> None:
    write(tmp_path / "a.jsonl", "1")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    with pytest.raises(UserError, match=r"^prompts\.sources\.b: found .*, which belongs to prompts\.sources\.a too"):
        load(sources={"a": source(tmp_path / "a.jsonl"), "b": source(tmp_path / other)})


def records(count: int, what: str = "good") -> Any:
    for i in range(count):
        if what == "raises" and i == 2:
            raise ValueError("no third")
        if what == "text" and i == 1:
            yield "1+1="
        if what == "field" and i == 1:
            yield {"question": "1+1="}
        yield {"prompt": f"{i}+{i}=", "answer": 2 * i}


CALLS = itertools.count()


def random_records(count: int) -> Any:
    call = next(CALLS)
    for i in range(count):
        yield {"prompt": f"{i if i < count - 1 else 100 * (call + 1)}=", "answer": 1}


def fewer_each_time() -> Any:
    return records(10 - next(CALLS) % 5)


def endless() -> Any:
    return ({"prompt": f"{i}=", "answer": i} for i in itertools.count())


def no_iterator() -> int:
    return 3


def odd_fields(what: str) -> Any:
    odd: Any = {(1, 2): 3}
    if what == "circular":
        odd = {}
        odd["me"] = odd
    yield {"prompt": "1=", "answer": 1, "odd": 1}
    yield {"prompt": "1=", "answer": 1, "odd": odd}


def ends(how: str) -> Any:
    yield {"prompt": "1=", "answer": 1}
    raise {"interrupt": KeyboardInterrupt, "base": BaseException}[how]("no more")


HERE = "tests.unit.actors.prompts.test_sources"


def own(name: str, limit: int | None = None, **arguments: Any) -> PromptSet:
    return load(function=f"{HERE}:{name}", function_arguments=arguments, limit=limit)


def test_a_function_of_the_users_own_yields_records(monkeypatch: pytest.MonkeyPatch) -> None:
    found = own("records", count=2500)
    assert len(found) == 2500 and found.texts[3] == "3+3=" and found.references[3] == "6"
    assert found.where(3) == f"{HERE}:records, record 4"
    assert own("endless", limit=7).texts[-1] == "6="
    monkeypatch.setattr(own_records, "MOST_RECORDS", 50)
    with pytest.raises(UserError, match=r"^prompts\.limit: found null, and .*:endless yields more than 50 records"):
        own("endless")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("records", {"count": 5, "what": "raises"}, r"failed after 2 records \(ValueError: no third\)"),
        ("records", {"count": 5, "what": "text"}, r"whose record 2 is '1\+1=', a str"),
        ("records", {"count": 5, "what": "field"}, r"^prompts\.prompt_field: found prompt, .*record 2 \(question\)"),
        (
            "records",
            {"size": 5},
            r"^prompts\.function_arguments: found size, expected arguments that .*:records takes: count, ",
        ),
        ("recods", {}, r"did you mean .*:records"),
        ("odd_fields", {"what": "tuple"}, r"whose record 2 has the field 'odd' \(TypeError: keys must be str"),
        ("odd_fields", {"what": "circular"}, r"record 2 has the field 'odd' \(ValueError: Circular reference"),
        ("ends", {"how": "base"}, r"failed after 1 records \(BaseException: no more\)"),
        ("no_iterator", {}, r"which returned a int, expected an iterator of records"),
        ("random_records", {"count": 4}, r"whose record 4 is another in a second call"),
        ("fewer_each_time", {}, r"is another in a second call, expected the same records in every call"),
    ],
)
def test_a_function_that_fails_or_is_not_repeatable_is_one_line(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as told:
        own(name, **arguments)
    assert str(told.value).startswith(("prompts.function", "prompts.prompt_field"))


def test_an_interrupt_within_a_function_of_the_users_own_remains_one() -> None:
    with pytest.raises(KeyboardInterrupt):
        own("ends", how="interrupt")


def test_a_data_set_is_streamed_from_its_commit_as_far_as_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    with fake_hub.hub_of({}) as hub:
        fake_hub.use(monkeypatch, hub.url, tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        commits = []
        for version in ("a", "b"):
            (tmp_path / version).mkdir()
            write(tmp_path / version / "train.jsonl", *(f"{version}{i}" for i in range(500)))
            commits.append(hub.add("owner/questions", tmp_path / version, "dataset"))
        asked = {"path": "owner/questions", "streaming": True, "limit": 3}
        assert load(**asked, revision=commits[0]).texts == ["a0", "a1", "a2"]
        assert load(**asked, revision=commits[1]).texts == ["b0", "b1", "b2"]
        with pytest.raises(UserError, match=r"^prompts\.streaming: found true, expected false: .* is on a disk"):
            load(path=str(tmp_path / "a" / "train.jsonl"), streaming=True, limit=3)
