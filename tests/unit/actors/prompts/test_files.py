"""Prompt files as people have them: what is read as its writer meant it, and what is refused with its row."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.config import PromptsConfig
from actors.errors import UserError
from actors.prompts.prompt_set import PromptSet, load_prompts
from tests.tiny_models import CHAT_TEMPLATE, make_tiny_tokenizer

# Prints what it is given, and refuses nothing by itself, as lenient templates do.
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}<system>{{ tool.function.name }} {{ tool | tojson }}<eos>{% endfor %}"
    "{% for m in messages %}<{{ 'user' if m.role == 'tool' else m.role }}>{{ m.content }}"
    "{% if m.name is defined %}[{{ m.name }}]{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
CONVERSATION = [
    {"role": "system", "content": ""},
    {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "name": "add", "tool_call_id": "1"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}}
RENDERED = (
    '<system><eos><user>1+1=<eos><assistant>add({"a": 1, "b": null})<eos><user>2[add]<eos><assistant>'  # one tool
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = make_tiny_tokenizer()
    found.chat_template = TOOL_TEMPLATE
    return found


def load(path: Path, tokenizer: Any, template: str | None = None, **options: Any) -> PromptSet:
    return load_prompts(PromptsConfig(path=str(path), **options), tokenizer, 1000, "prompts", template)


def jsonl(tmp_path: Path, *records: Any, name: str = "p.jsonl") -> Path:
    (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / name


def parquet(tmp_path: Path, *records: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(list(records)), tmp_path / "p.parquet")
    return tmp_path / "p.parquet"


def in_parquet(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arrow has one type for a column: texts only. Every message gets the fields of all others, null."""
    return [{**m, "content": "1+1="} if isinstance(m["content"], list) else m for m in messages]


def refusal(path: Path, tokenizer: Any, template: str | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, tokenizer, template, **options)
    return str(caught.value)


def test_fields_that_are_null_in_parquet_are_absent_as_they_are_in_json_lines(tmp_path: Path, tokenizer: Any) -> None:
    records = [
        {"prompt": in_parquet(CONVERSATION), "answer": "2"},
        {"prompt": [{"role": "user", "content": "q"}], "answer": None},
    ]
    ours, theirs = load(jsonl(tmp_path, *records), tokenizer), load(parquet(tmp_path, *records), tokenizer)
    assert ours.texts == theirs.texts == [RENDERED, "<user>q<eos><assistant>"]
    assert ours.references == theirs.references == ["2", None]


def test_nulls_deep_in_calls_and_tools_of_parquet_are_absent(tmp_path: Path, tokenizer: Any) -> None:
    def record(argument: str) -> dict[str, Any]:
        call = {"function": {"name": "add", "arguments": {argument: 1}}}
        tool = {"function": {"name": "add", "parameters": {argument: {"type": "number"}}}}
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]},
                    {"role": "tool", "content": "1"}]  # fmt: skip
        return {"prompt": messages, "tools": [tool]}

    records = [record("a"), record("b")]
    ours = load(jsonl(tmp_path, *records), tokenizer, reference_field=None)
    theirs = load(parquet(tmp_path, *records), tokenizer, reference_field=None)
    assert ours.texts == theirs.texts and "null" not in "".join(theirs.texts) and 'add({"a": 1})' in ours.texts[0]


def test_text_parts_and_turns_that_only_call_tools_are_read(tmp_path: Path, tokenizer: Any) -> None:
    assert load(jsonl(tmp_path, {"prompt": CONVERSATION, "answer": ""}), tokenizer).texts == [RENDERED]


def test_tools_reach_the_template_as_a_list_as_json_text_and_from_parquet(tmp_path: Path, tokenizer: Any) -> None:
    wanted = f"<system>add {json.dumps(TOOL)}<eos><user>q<eos><assistant>"
    for write in (jsonl, parquet):
        for tools in ([TOOL], json.dumps([TOOL])):
            path = write(tmp_path, {"prompt": "q", "tools": tools}, {"prompt": "q", "tools": None})
            assert load(path, tokenizer, reference_field=None).texts == [wanted, "<user>q<eos><assistant>"]


@pytest.mark.parametrize("what", ["tools", "tool_calls"])
def test_tools_that_the_template_leaves_out_are_refused(tmp_path: Path, what: str) -> None:
    record = {"prompt": in_parquet(CONVERSATION)} if what == "tool_calls" else {"prompt": "q", "tools": [TOOL]}
    told = refusal(jsonl(tmp_path, record), make_tiny_tokenizer(), reference_field=None)
    assert "line 1: found the tool 'add', which the chat template leaves out" in told


def test_messages_in_a_map_and_in_a_categorical_column_are_read(tmp_path: Path, tokenizer: Any) -> None:
    message = pa.map_(pa.string(), pa.string())
    prompts = pa.array([[[("role", "user"), ("content", "q")]]], pa.list_(message))
    answers = pa.array(["7"]).dictionary_encode()
    pq.write_table(pa.table({"prompt": prompts, "answer": answers}), tmp_path / "p.parquet")
    read = load(tmp_path / "p.parquet", tokenizer)
    assert (read.texts, read.references) == (["<user>q<eos><assistant>"], ["7"])


def test_data_sets_of_save_to_disk_are_read_with_and_without_splits(tmp_path: Path, tokenizer: Any) -> None:
    records = [
        {"prompt": in_parquet(CONVERSATION), "answer": 2},
        {"prompt": [{"role": "user", "content": "q"}], "answer": 3},
    ]
    one = datasets.Dataset.from_list(records)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "several")
    wanted = [RENDERED, "<user>q<eos><assistant>"]
    assert load(tmp_path / "one", tokenizer).texts == load(tmp_path / "several", tokenizer).texts == wanted
    assert load(tmp_path / "several", tokenizer, split="test").references == ["3"]
    told = refusal(tmp_path / "several", tokenizer, split="tset")
    assert told == "prompts.split: found tset, expected a split that was saved: train, test (did you mean 'test'?)"
    assert refusal(tmp_path / "one", tokenizer, split="test").startswith("prompts.split: found test, expected train")
    assert "prompts.prompt_field: found q" in refusal(tmp_path / "one", tokenizer, prompt_field="q")


def test_numbers_of_arrow_are_references_and_nan_is_none(tmp_path: Path, tokenizer: Any) -> None:
    for kind in (np.int8, np.int64, np.uint64, np.float32):
        answers = pa.array(np.array([7, 3], kind))
        pq.write_table(pa.table({"prompt": ["a", "b"], "answer": answers}), tmp_path / "p.parquet")
        assert [float(r) for r in load(tmp_path / "p.parquet", tokenizer).references if r] == [7, 3]
    pq.write_table(pa.table({"prompt": ["a"], "answer": [float("nan")]}), tmp_path / "p.parquet")
    assert load(tmp_path / "p.parquet", tokenizer).references == [None]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answer": NaN}\n{"prompt": "a", "answer": 12}\n')
    assert load(tmp_path / "p.jsonl", tokenizer).references == [None, "12"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answer": -Infinity}\n')
    assert "line 1: found answer = -inf, expected a string, a number" in refusal(tmp_path / "p.jsonl", tokenizer)


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl"])
def test_gzip_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path: Path, tokenizer: Any, name: str) -> None:
    text = '\ufeff{"prompt": "a", "answer": 1}\r\n\r\n   \r\n{"prompt": "b", "answer": 2}'
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert load(tmp_path / name, tokenizer).references == ["1", "2"]
    (tmp_path / name).write_bytes(gzip.compress(text.encode())[:-9])
    assert "gzip data that is broken" in refusal(tmp_path / name, tokenizer)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answer": "1", "prompt": "b"}\n')
    assert "line 1: found '" in (told := refusal(tmp_path / "p.jsonl", tokenizer)) and "'prompt' stands twice" in told
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["1"])], ["prompt", "prompt", "answer"])
    pq.write_table(table, tmp_path / "p.parquet")
    assert "p.parquet" in refusal(tmp_path / "p.parquet", tokenizer)


IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
USER = {"role": "user", "content": "q"}
REFUSED = {
    "message 1 has no role that is a text; it has from, value": [{"from": "human", "value": "q"}],
    "message 2 has no content": [USER, {"role": "assistant", "content": None}, USER],
    "message 1 has a part of the type image_url": [{"role": "user", "content": IMAGE}],
    "message 1 has a part of the type str": [{"role": "user", "content": ["q"]}],
    "message 1 has a content that is not a text": [{"role": "user", "content": {"text": "q"}}],
    "message 1 has tool_calls that are not a list of the assistant's": [{**USER, "tool_calls": [CALL]}],
    "message 1 has a tool call without a name": [{"role": "assistant", "tool_calls": [{"id": "1"}]}, USER],
    "message 1 has arguments of f that are no JSON": [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, USER
    ],
    "message 1 has arguments of f that are no JSON: it is nested too deeply": [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 50_000}}]}, USER
    ],
    "the last message is the assistant's": [USER, {"role": "assistant", "content": "a"}],
    "the last message is empty": [{"role": "user", "content": ""}],
    "a text that holds a list of messages as JSON": json.dumps([USER]),
}  # fmt: skip


@pytest.mark.parametrize("told", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_row_its_field_and_its_reason(
    tmp_path: Path, tokenizer: Any, told: str
) -> None:
    path = jsonl(tmp_path, {"prompt": "1", "answer": ""}, {"prompt": REFUSED[told], "answer": ""})
    assert refusal(path, tokenizer).startswith(f"{path}, line 2: found prompt = ")
    assert told in refusal(path, tokenizer)


@pytest.mark.parametrize("tools", ["[", "[" * 50_000, {"name": "f"}, [{"type": "function"}], 3])
def test_tools_that_are_none_are_refused(tmp_path: Path, tokenizer: Any, tools: Any) -> None:
    path = jsonl(tmp_path, {"prompt": "q", "answer": "", "tools": tools})
    assert "line 1: found tools = " in refusal(path, tokenizer)


def test_a_text_that_only_looks_like_json_is_a_prompt(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["[1, 2", "[1, 2]", "[]", '[{"a": 1}]']
    read = load(jsonl(tmp_path, *({"prompt": text, "answer": ""} for text in texts)), tokenizer)
    assert read.texts == [f"<user>{text}<eos><assistant>" for text in texts]


def test_an_answer_that_has_begun_is_continued_when_asked(tmp_path: Path) -> None:
    tokenizer, begun = make_tiny_tokenizer(), [USER, {"role": "assistant", "content": "It is "}]
    asked = {"reference_field": None, "chat_template_arguments": {"continue_final_message": True}}
    assert tokenizer.chat_template == CHAT_TEMPLATE
    path = jsonl(tmp_path, {"prompt": begun})
    # Templates strip and transformers with them: what matters is that nothing stands behind the text.
    assert load(path, tokenizer, **asked).texts[0].rstrip() == "<user>q<eos><assistant>It is"
    told = refusal(jsonl(tmp_path, {"prompt": [USER]}), tokenizer, **asked)
    assert "continue_final_message is true, and the last message is not a text of the assistant's" in told


def test_a_null_is_never_written_into_what_a_privileged_teacher_reads(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": "q", "answer": None, "steps": None}
    for path in (jsonl(tmp_path, record), parquet(tmp_path, record, {**record, "steps": "s"})):
        told = refusal(path, tokenizer, "{prompt} {steps}")
        assert "1: found steps = null, expected a string or a number, since prompt_template names it" in told


def test_a_template_replaces_the_last_message_of_the_user(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, {"prompt": CONVERSATION, "answer": 2})
    assert "<user>1+1= ({2})<eos>" in load(path, tokenizer, "{prompt} ({{answer}})").texts[0]


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"prompt": name, "answer": "1"}).encode() + b"\n"
        if name.endswith(".zst"):
            with pa.CompressedOutputStream(str(path / name), "zstd") as file:
                file.write(line)
        elif name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([json.loads(line)]), path / name)
        else:
            (path / name).write_bytes(line)
    return path


def test_a_directory_is_read_whole_or_refused_with_what_is_in_it(tmp_path: Path, tokenizer: Any) -> None:
    told = refusal(folder(tmp_path / "a", "1.jsonl", "2.jsonl", "p.parquet", "t.csv", ".h.csv"), tokenizer)
    assert "a with 1 .csv, 2 .jsonl, 1 .parquet files, expected data files of one format" in told
    assert told.endswith(f"{tmp_path}/a/**/*.jsonl or {tmp_path}/a/**/*.parquet")
    some = refusal(folder(tmp_path / "b", *(f"{n}.jsonl" for n in range(5)), "train/x.jsonl"), tokenizer)
    assert "5 of whose 6 data files are in no split (0.jsonl, 1.jsonl, 2.jsonl, …)" in some and "b/**/*.jsonl" in some
    whole = load(folder(tmp_path / "c", "1.jsonl", "2.json", "README.md", ".h.csv"), tokenizer)
    assert len(whole) == 2
    (folder(tmp_path / "d", "a.jsonl", "t.csv") / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n# Sums\n"
    )
    assert load(tmp_path / "d", tokenizer).texts == ["<user>a.jsonl<eos><assistant>"]


def test_a_directory_of_zstandard_lines_is_read_as_its_files_are(tmp_path: Path, tokenizer: Any) -> None:
    path = folder(tmp_path / "z", "train-2.jsonl.zst", "train-1.jsonl", "test.jsonl.zst")
    wanted = [f"<user>train-{name}<eos><assistant>" for name in ("1.jsonl", "2.jsonl.zst")]
    assert load(path, tokenizer).texts == wanted
    assert load(path, tokenizer, split="test").texts == ["<user>test.jsonl.zst<eos><assistant>"]
    assert refusal(path, tokenizer, split="tset").startswith("prompts.split: found tset, expected a split of")


def test_an_unknown_split_is_said_of_the_key_of_the_split(tmp_path: Path, tokenizer: Any) -> None:
    told = refusal(folder(tmp_path / "s", "test.jsonl"), tokenizer)
    assert told == f"prompts.split: found train, expected a split of {tmp_path}/s: test"
    file = jsonl(tmp_path, {"prompt": "q", "answer": "1"})
    assert refusal(file, tokenizer, split="test") == (
        f"prompts.split: found test, expected nothing: {file} is a single file, which has no splits"
    )


def test_what_is_neither_file_nor_directory_is_not_suggested_in_its_place(tmp_path: Path, tokenizer: Any) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    told = refusal(tmp_path / "p.jsonl", tokenizer)
    assert "neither a regular file nor a directory" in told and "did you mean" not in told
