"""Mutated configurations and prompt files: each is read, or refused in one line, and nothing is written.

    FUZZ_EXAMPLES=20000 pytest tests/unit/test_fuzz.py

tries 20,000 examples instead of the profile's 50 (`make test`) or 300 (`make test-all`).
"""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from actors.config import PromptsConfig
from actors.data.prompts import load_prompts
from actors.data.tokenizer import load_tokenizer
from actors.errors import UserError
from cluster.config_file import as_dictionary, load_config
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", settings.default.max_examples))
fuzzed = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
QUICKSTART = as_dictionary(load_config(ROOT / "configs" / "quickstart.yaml"))
NASTY = st.sampled_from(
    [
        *(
            "",
            "null",
            "~",
            "../../up",
            "/",
            "/etc/passwd",
            "${seed}",
            "${oc.env:HOME}",
            "${",
            "${a.b}",
            "!!python/object:os.x",
        ),
        *(
            "é\u2028\x85",
            "\x00",
            "a" * 5000,
            "1e400",
            "-0",
            "0x10",
            "1_000",
            "yes",
            "2026-01-01",
            "<script>",
            "%s",
            "{0}",
        ),
    ]
)
VALUES = st.one_of(
    NASTY,
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every node."""
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


PLACES = [path for path in places(QUICKSTART) if path]


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """The quickstart with every key written out, some nodes replaced, renamed, removed or moved, and perhaps broken text."""
    content = copy.deepcopy(QUICKSTART)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(PLACES))
        node: Any = content
        for key in above:
            node = node[key] if isinstance(node, dict) and key in node else {}
        if not isinstance(node, dict) or last not in node:
            continue
        match draw(st.sampled_from(["replace", "rename", "remove", "move"])):
            case "replace":
                node[last] = draw(VALUES)
            case "rename":
                node[draw(st.one_of(NASTY, st.text(max_size=8), st.integers()))] = node.pop(last)
            case "remove":
                del node[last]
            case "move":
                content[str(last)] = node.pop(last)
    text = yaml.safe_dump(content, allow_unicode=True)
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.one_of(NASTY, st.text(max_size=6))) + text[at + draw(st.integers(0, 8)) :]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def in_one_line(error: UserError) -> None:
    text = str(error)
    assert text and len(text.splitlines()) == 1 and "found" in text and "expected" in text, text


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)


@fuzzed
@given(text=configurations())
@example(text=BOMB)
@example(text="a: &a\n  b: *a\n")
@example(text="name: ${name}")
@example(text="? {x: 1}\n: 2")
@example(text="\ufeffname: run")
def test_a_configuration_is_read_or_refused_in_one_line(folder: Path, text: str) -> None:
    file = folder / "config.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(file)
    except UserError as error:
        in_one_line(error)
    else:
        assert config.run_dir.parent == Path(config.output_dir) and config.run_dir.name == config.name
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@fuzzed
@given(override=st.one_of(NASTY, st.text(max_size=30), st.tuples(st.sampled_from(PLACES), VALUES)))
def test_an_override_is_taken_or_refused_in_one_line(override: Any) -> None:
    text = override if isinstance(override, str) else f"{'.'.join(map(str, override[0]))}={override[1]}"
    try:
        load_config(ROOT / "configs" / "quickstart.yaml", [text])
    except UserError as error:
        in_one_line(error)


RECORDS = st.one_of(
    st.fixed_dictionaries(
        {"prompt": st.one_of(st.text(max_size=20), VALUES)},
        optional={"answer": VALUES, "domain": VALUES, "more": VALUES},
    ).map(lambda record: json.dumps(record).encode()),
    st.fixed_dictionaries(
        {"prompt": st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), VALUES), max_size=3)}
    ).map(lambda record: json.dumps(record).encode()),
    st.binary(max_size=40),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tmp_path_factory.mktemp("model") / "m"
    make_tiny_model(model, hidden=32, layers=1, context=64)
    return load_tokenizer(str(model), False, "student.model")


@fuzzed
@given(lines=st.lists(RECORDS, min_size=1, max_size=4), suffix=st.sampled_from([".jsonl", ".parquet", ".json", ""]))
@example(lines=[b'{"prompt": "' + b"9" * 5000 + b'"}'], suffix=".jsonl")
@example(lines=[b"[" * 100_000], suffix=".jsonl")
@example(lines=[b'{"prompt": ' + b"1" * 5000 + b"}"], suffix=".jsonl")
def test_a_prompt_file_is_read_or_refused_in_one_line(
    folder: Path, tokenizer: Any, lines: list[bytes], suffix: str
) -> None:
    file = folder / f"prompts{suffix}"
    file.write_bytes(b"\n".join(lines))
    source = PromptsConfig(path=str(file), domain_field="domain", chat=False)
    try:
        found = load_prompts(source, tokenizer, 32, "prompts")
    except UserError as error:
        in_one_line(error)
    else:
        assert len(found) >= 1
    finally:
        file.unlink()
