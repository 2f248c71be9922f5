"""Many prompts are read once; later starts map their columns, unless anything that they depend on has changed."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from actors.config import MixedSourceConfig, PromptsConfig
from actors.errors import CampaignError, UserError
from actors.prompts import cache, files, prompt_set, spool, workers
from actors.prompts.columns import Texts
from actors.prompts.fingerprint import prompts_fingerprint
from actors.prompts.prompt_set import PromptSet, load_prompts
from actors.prompts.responses import Ends
from tests.tiny_models import make_tiny_tokenizer

COUNT = 90
RECORDS: list[dict[str, Any]] = [
    {
        "prompt": f"{number}+é=" if number % 7 else [{"role": "user", "content": "1"}],
        "answer": None if number % 5 == 0 else "\ud800" if number == 33 else str(number),
        "of": "ab"[number % 2],
        "said": f"{number};",
        "other": "y",
    }
    for number in range(COUNT)
]


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty prompts are many, a batch has eight, and nobody helps."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for module in (spool, cache, prompt_set, workers):
        monkeypatch.setattr(module, "MANY", 50)
    monkeypatch.setattr(cache, "LEAST_BYTES", 1)
    monkeypatch.setattr(files, "BATCH", 8)
    monkeypatch.setattr(spool, "HELD_BYTES", 2000)
    monkeypatch.setattr(prompt_set, "cores", lambda: 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "p.jsonl", RECORDS)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(path: Path, tokenizer: Any = None, template: str | None = None, **options: Any) -> PromptSet:
    """Also with records; options that are no keys of prompts are those of `load_prompts`."""
    own = {name: options.pop(name) for name in ("ends", "records") if name in options}
    config = PromptsConfig(path=str(path), **{"domain_field": "of", **options})
    return load_prompts(config, tokenizer or make_tiny_tokenizer(), 1000, "prompts", template, **own)


def entries(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "cache" / "prompts")) if (tmp_path / "cache").exists() else []


def same(one: PromptSet, other: PromptSet) -> bool:
    arrays = [
        (own.tokens, own.offsets, own.numbers, own.texts.digests(), *(vars_of(own.responses) if own.responses else ()))
        for own in (one, other)
    ]
    told = [(own.references, own.domains, own.texts, own.records) for own in (one, other)]
    equal = [np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(*arrays, strict=True)]
    return (
        all(equal)
        and all(a == list(b) for a, b in zip(*told, strict=True))
        and one.origins == other.origins
        and prompts_fingerprint(one) == prompts_fingerprint(other)
    )


def vars_of(responses: Any) -> tuple[np.ndarray, ...]:
    return responses.tokens, responses.offsets, responses.trained


def no_reading(*_arguments: Any, **_options: Any) -> Any:
    raise AssertionError("the records are read")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(prompt_set, "read_records", no_reading)


READINGS: dict[str, dict[str, Any]] = {
    "chat": {},
    "plain": {"chat": False, "limit": 60},
    "records": {"records": True},
    "view": {"template": "{prompt} {other}"},
    "sft": {"response_field": "said", "reference_field": None, "ends": Ends([1], 1)},
}


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("form", ["jsonl", "parquet", "directory"])
def test_columns_of_the_disk_are_those_of_the_records(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread: Any
) -> None:
    records = [{**one, "answer": "2" if one["answer"] == "\ud800" else one["answer"]} for one in RECORDS]
    if name == "plain" or form != "jsonl":
        records = [{**one, "prompt": str(one["prompt"])} for one in records]
    path = write(tmp_path / "p.jsonl", records)
    if form == "parquet":
        path = tmp_path / "p.parquet"
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=11)
    if form == "directory":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
        (tmp_path / "rows").mkdir()
        path = path.rename(tmp_path / "rows" / "train.jsonl").parent
    reading = READINGS[name]
    with monkeypatch.context() as patch:
        patch.setattr(prompt_set, "entry_of", lambda *_: None)
        plain = load(path, **reading)
    assert not plain.cached and not entries(tmp_path)
    first = load(path, **reading)
    assert "kept for the next start in" in first.cached and not first.uncached and len(entries(tmp_path)) == 1
    unread()
    second = load(path, **reading)
    assert "mapped from" in second.cached and same(plain, first) and same(plain, second)
    for own in (first, second):
        mapped = own.tokens, own.offsets, own.numbers, own.texts.data, own.texts.offsets, own.references.missing
        assert all(type(one) is np.ndarray and isinstance(one.base, np.memmap) for one in mapped)
        assert all(isinstance(one, Texts) for one in (own.texts, own.references, own.records))
    assert second.where(4) == f"{path}, {'line' if form == 'jsonl' else 'row'} 5"


def test_nothing_is_kept_of_few_prompts_or_of_what_only_reading_tells(tmp_path: Path, file: Path) -> None:
    load(write(tmp_path / "few.jsonl", RECORDS[:49]))
    load(file, limit=49)
    load_prompts(
        PromptsConfig(function="tests.matrix_parts:sums", function_arguments={"count": 60}),
        make_tiny_tokenizer(), 100, "prompts",
    )  # fmt: skip

    class Own(type(make_tiny_tokenizer())):  # type: ignore[misc]
        """Code that came with a model."""

    own = make_tiny_tokenizer()
    own.__class__ = Own
    load(file, own)
    assert entries(tmp_path) == []


def test_another_path_and_filters_have_the_same_columns(tmp_path: Path, file: Path, unread: Any) -> None:
    before = load(file)
    unread()
    moved = load(file.rename(tmp_path / "q.jsonl"), shuffle=False, duplicates="drop", too_long="drop")
    assert np.array_equal(before.tokens, moved.tokens) and moved.where(0) == f"{tmp_path / 'q.jsonl'}, line 1"
    assert len(entries(tmp_path)) == 1


def test_whatever_the_columns_depend_on_is_seen(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(change: Callable[[Any], None]) -> Any:
        tokenizer = make_tiny_tokenizer()
        change(tokenizer)
        return tokenizer

    def template(tokenizer: Any) -> None:
        tokenizer.chat_template = tokenizer.chat_template.replace("<assistant>", "<assistant>:")

    def processor(tokenizer: Any) -> None:
        post = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
        tokenizer.backend_tokenizer.post_processor = post

    def token(tokenizer: Any) -> None:
        tokenizer.add_tokens(["1+"])

    found = [load(file)]
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"12+", b"21+"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    found += [
        load(file),
        *(load(file, of(change)) for change in (template, processor, token)),
        load(file, template="{prompt}{prompt}"),
        load(file, records=True),
        load(file, limit=80),
        load(file, prompt_field="other"),
        load(file, reference_field="other"),
        load(file, domain_field=None),
        load(file, tools_field="none"),
        load(file, chat=False, prompt_field="said"),
        load(file, chat_template_arguments={"x": 1}),
        load(file, response_field="said", reference_field=None, ends=Ends([1], 1)),
        load(file, response_field="said", reference_field=None, ends=Ends([1], 2)),
    ]
    assert len(entries(tmp_path)) == len(found) and all("kept" in one.cached for one in found)
    assert found[0].texts[12] == "<user>12+é=<eos><assistant>" and "21+" in found[1].texts[12]
    assert found[2].texts[1].endswith("<assistant>:") and len(found[4].tokens) < len(found[1].tokens)
    monkeypatch.setattr(cache, "version", lambda name: "another")
    assert "kept" in load(file).cached
    monkeypatch.setattr(cache, "CODE", (*cache.CODE, "../data/hub"))
    assert "kept" in load(file).cached


def test_the_sources_of_a_mixture_are_told_apart(tmp_path: Path, unread: Any) -> None:
    for name, first in (("a", 0), ("b", 60)):
        write(tmp_path / f"{name}.jsonl", RECORDS[first : first + 60])
    write(tmp_path / "a2.jsonl", RECORDS[:10])

    def mixed(**more: Any) -> PromptSet:
        a = MixedSourceConfig(path=str(tmp_path / "a*.jsonl"), domain="x", limit=65)
        b = MixedSourceConfig(path=str(tmp_path / "b.jsonl"), domain_field="of", **more)
        return load_prompts(PromptsConfig(sources={"a": a, "b": b}), make_tiny_tokenizer(), 1000, "prompts")

    first = mixed()
    assert first.counts == {"prompts.sources.a": 65, "prompts.sources.b": 30} and len(first.origins) == 3
    unread()
    second = mixed(weight=2.0)
    assert same(first, second) and second.domains[64:67] == ["x", "a", "b"]


@pytest.mark.parametrize("damage", ["byte", "short", "header", "gone", "value"])
def test_a_damaged_entry_is_told_and_made_again(damage: str, tmp_path: Path, file: Path) -> None:
    before = load(file)
    (name,) = entries(tmp_path)
    entry = tmp_path / "cache" / "prompts" / name
    tokens, header = entry / "tokens", entry / cache.HEADER
    content = bytearray(tokens.read_bytes())
    if damage in ("byte", "short"):
        content[40] ^= damage == "byte"
        tokens.unlink()  # `before` has the old file
        tokens.write_bytes(content if damage == "byte" else content[:-4])
    elif damage == "header":
        header.write_text("{")
    elif damage == "gone":
        (entry / "texts").unlink()
    else:
        header.write_text(header.read_text().replace('"line", 90', '"line", 89'))
    again = load(file)
    assert str(entry) in again.uncached and "so the prompts were read again" in again.uncached
    assert "kept" in again.cached and entries(tmp_path) == [name] and same(before, again)
    last = load(file)
    assert "mapped" in last.cached and not last.uncached and same(before, last)


def test_of_two_that_begin_together_the_first_entry_stays(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, others = prompt_set.read_records, []

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.setattr(prompt_set, "read_records", reads)
        with monkeypatch.context() as patch:
            patch.setattr(cache.os, "getpid", lambda: 1)
            others.append(load(file))
        (kept,) = [name for name in entries(tmp_path) if not name.endswith(cache.PARTIAL)]
        (tmp_path / "cache" / "prompts" / kept / "mark").touch()
        return reads(*arguments)

    monkeypatch.setattr(prompt_set, "read_records", interrupted)
    mine = load(file)
    assert same(mine, others[0]) and len(entries(tmp_path)) == 1
    assert (tmp_path / "cache" / "prompts" / entries(tmp_path)[0] / "mark").exists()


@pytest.mark.parametrize("writes", [0, 1, 30])
def test_a_full_disk_is_told_and_costs_nothing_else(
    writes: int, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(file)
    cache.rmtree(tmp_path / "cache")
    left, append = [writes], spool.Spool._appended

    def full(self: Any, path: Path) -> Any:
        left[0] -= 1
        if left[0] < 0:
            path.open("ab").write(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, path)

    monkeypatch.setattr(spool.Spool, "_appended", full)
    found = load(file)
    assert same(before, found) and not found.cached and entries(tmp_path) == []
    assert (
        found.uncached.startswith("OSError: [Errno 28] No space left") and "reads the prompts again" in found.uncached
    )


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, file: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    found = load(file)
    assert len(found) == COUNT and not found.cached and "NotADirectoryError" in found.uncached


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = prompt_set.read_records

    def touched(*arguments: Any) -> Any:
        with file.open("a") as stream:
            stream.write(json.dumps(RECORDS[0]) + "\n")
        return reads(*arguments)

    monkeypatch.setattr(prompt_set, "read_records", touched)
    found = load(file)
    assert len(found) == COUNT + 1 and "has changed while it was read" in found.uncached and entries(tmp_path) == []


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [*RECORDS, {"prompt": ""}])
    with pytest.raises(UserError, match="line 91"):
        load(file)
    assert entries(tmp_path) == []


BROKEN: dict[str, Any] = {
    "lacks its field": {"promt": "1"},
    "no JSON": "{",
    "refused by the template": {"prompt": "refuse", "answer": "1", "of": "a"},
    "no text": {"prompt": "1", "answer": [1], "of": "a"},
    "not Unicode": {"prompt": "\ud800", "answer": "1", "of": "a"},
}


@pytest.mark.parametrize("first", BROKEN)
def test_the_first_record_at_fault_is_named_and_by_helpers_too(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    wrong = BROKEN[first]
    lines[77:77] = ["", wrong if isinstance(wrong, str) else json.dumps(wrong)]
    lines[81:81] = [one if isinstance(one, str) else json.dumps(one) for one in BROKEN.values()]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(lines))
    tokenizer = make_tiny_tokenizer()
    refuses = "{% if messages[0].content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refuses + str(tokenizer.chat_template)
    with pytest.raises(UserError, match="line 79") as alone:
        load(file, tokenizer)
    if first in ("lacks its field", "no JSON"):  # two processes take their time to start
        monkeypatch.setattr(prompt_set, "cores", lambda: 2)
        with pytest.raises(UserError) as together:
            load(file, tokenizer)
        assert str(together.value) == str(alone.value)


def test_helpers_make_the_same_columns_and_one_that_dies_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.parquet"
    records = [{**one, "prompt": str(one["prompt"]), "answer": "2"} for one in RECORDS]
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=30)
    alone = load(path, records=True)
    cache.rmtree(tmp_path / "cache")
    monkeypatch.setattr(prompt_set, "cores", lambda: 2)
    started = workers.Parts._started
    begun: list[Any] = []

    def counted(self: Any) -> Any:
        begun.append(started(self))
        return begun[-1]

    monkeypatch.setattr(workers.Parts, "_started", counted)
    assert same(alone, load(path, records=True)) and len(begun) == 2
    assert all(worker._process.returncode is not None for worker in begun), "they have ended"

    def killed(self: Any) -> Any:
        counted(self)._process.kill()
        return begun[-1]

    cache.rmtree(tmp_path / "cache")
    monkeypatch.setattr(workers.Parts, "_started", killed)
    with pytest.raises(CampaignError, match=r"a process that reads prompts has ended \(signal 9"):
        load(path, records=True)
    assert entries(tmp_path) == []


def test_many_prompts_are_filtered_as_few_are(file: Path) -> None:
    mapped = load(file)
    rows = np.arange(0, COUNT, 4)
    few = mapped.take(rows)
    assert few.texts == [mapped.texts[row] for row in rows] and few.domains == [mapped.domains[row] for row in rows]
    assert np.array_equal(few.texts.digests(), mapped.texts.digests()[rows])
    assert mapped.judged().tolist() == [row for row in range(COUNT) if RECORDS[row]["answer"] is not None]
    assert replace(mapped, played=True).judged().tolist() == list(range(COUNT))
