"""Mutated configurations, prompt files and run directories: each is read, or refused in one line; nothing is written elsewhere.

    FUZZ_EXAMPLES=20000 pytest tests/unit/test_fuzz.py

tries 20,000 configurations instead of the 250 of `make test` or the 5,000 of `make test-all`, and others in proportion.
"""

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from pyarrow import parquet

import cluster.cli
from actors.config import PromptsConfig
from actors.data.tokenizer import load_tokenizer
from actors.errors import UserError
from actors.prompts.prompt_set import load_prompts
from cluster.config_file import as_dictionary, load_config
from tests.light_campaign import configuration, finish, make_folder, start
from tests.mutations import TEXTS, broken_bytes, broken_text, changed, damage, paths, value

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 5000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 250))
WATCHING: list[bool] = []
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)
SPECIAL = (
    BOMB,
    "a: &a\n  b: *a\n",
    "name: ${name}",
    "? {x: 1}\n: 2",
    "\ufeffname: run",
    "",
    "3",
    "[" * 5000,
    "a: &a [*a]",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def written(folder: Path) -> Iterator[list[str]]:
    """The files outside the folder that this process has opened for writing, renamed or made, while WATCHING."""
    found: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if not WATCHING or event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.link", "os.symlink"):
            return
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else os.O_WRONLY
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        inside = path.startswith(str(folder)) or path.startswith("/dev/") or "__pycache__" in path or not path
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not inside:
            found.append(f"{event} {path}")

    sys.addaudithook(hook)
    yield found


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within the block, what this process writes is noted: see `written`."""
    WATCHING.append(True)
    try:
        yield
    finally:
        WATCHING.clear()


def command(*arguments: str) -> tuple[int, str, str]:
    """(status, output, errors) of a command in this process. Any other exception than SystemExit is the test's failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), watched():
        try:
            cluster.cli.main(list(arguments))
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("no exit status")


def assert_answered(arguments: tuple[str, ...], about: object, allowed: tuple[int, ...] = (0, 2)) -> int:
    """The command ends with one of these statuses, and an error is one line that says what was found and expected."""
    try:
        status, _, err = command(*arguments)
    except BaseException as error:
        raise AssertionError(f"{about!r}: {type(error).__name__}") from error
    told = [line for line in err.splitlines() if line.startswith("understudy: ")]
    assert status in allowed, (about, status, err)
    assert len(told) == (status != 0), (about, err)
    if status == 2:
        assert ": found " in told[0] and ", expected " in told[0], (about, err)
    return status


def test_a_configuration_is_read_or_refused_in_one_line(folder: Path, written: list[str]) -> None:
    file = configuration(folder, "base")
    small = yaml.safe_load(file.read_text())
    places = list(paths(as_dictionary(load_config(file))))
    draw, statuses = random.Random(1), []
    for number in range(EXAMPLES):
        overrides = []
        if number < len(SPECIAL):
            text = SPECIAL[number]
        else:
            content = small
            for _ in range(draw.randint(0, 2)):
                content = changed(draw, content, places)
            text = json.dumps(content, indent=1, default=str)  # which is YAML, too
            with contextlib.suppress(UnicodeEncodeError, yaml.YAMLError):
                text = yaml.dump(content, allow_unicode=True, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
            if draw.random() < 0.4:
                text = broken_text(draw, text)
            while draw.random() < 0.3:
                key = ".".join(map(str, draw.choice(places)))
                given = value(draw)
                form = draw.choice([str, json.dumps])(given)
                overrides.append(
                    draw.choice([f"{key}={form}", f"{key}.{draw.choice(TEXTS)}={form}", f"+{key}={form}", key])
                )
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        overrides = [override for override in overrides if not override.startswith("-")]
        about = (number, text[:3000], overrides)
        statuses.append(assert_answered(("check", "--offline", str(file), *overrides), about))
    assert 0 < statuses.count(0) < len(statuses)
    assert not written


def test_a_prompt_file_is_read_or_refused_in_one_line(folder: Path, written: list[str]) -> None:
    tokenizer = load_tokenizer(str(folder / "student"), False, "student.model")
    draw, read, count = random.Random(2), 0, EXAMPLES * 8
    for number in range(count):
        kind = draw.choice(["jsonl", "jsonl", "jsonl.gz", "parquet", "json"])
        file = folder / f"prompts.{kind}"
        content = prompt_file(draw, kind)
        if draw.random() < 0.5:
            content = broken_bytes(draw, content)
        file.write_bytes(content)
        source = PromptsConfig(
            path=str(file),
            domain_field=draw.choice([None, "domain"]),
            reference_field=draw.choice([None, "answer"]),
            chat=draw.random() < 0.6,
        )
        template = draw.choice([None, "{prompt} is {answer}", "{prompt"])
        try:
            with watched():
                found = load_prompts(source, tokenizer, 32, "prompts", template)
            assert len(found) >= 1 and len(found.tokens) == found.offsets[-1]
            read += 1
        except UserError as error:
            text = str(error)
            assert len(text.splitlines()) == 1 and "found" in text and "expected" in text, (number, text)
        except BaseException as error:
            raise AssertionError(f"{number}, {kind}: {content[:600]!r}") from error
        file.unlink()
    assert 0 < read < count
    assert not written


def prompt_file(draw: random.Random, kind: str) -> bytes:
    """A few records, some of which hold what they should not."""
    rows: list[Any] = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "domain": "a"} for i in range(draw.randint(1, 4))]
    if draw.random() < 0.3:
        chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
        rows = [{**row, "prompt": chat} for row in rows]
    if draw.random() < 0.7:
        at = draw.randrange(len(rows))
        rows[at] = changed(draw, rows[at], list(paths(rows[at])))
    if kind == "parquet":
        buffer = io.BytesIO()
        try:
            parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        except (pyarrow.ArrowException, UnicodeError, TypeError, OverflowError):  # not what a writer would write
            return b"PAR1" + draw.randbytes(50) + b"PAR1"
        return buffer.getvalue()
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass") for row in rows]
    lines += [b"[" * 5000] if draw.random() < 0.02 else []
    text = draw.choice([b"\n", b"\r\n", b"\n\n"]).join(lines)
    return gzip.compress(text) if kind.endswith("gz") else text


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A run directory, of a campaign that runs in a process of its own."""
    file = configuration(folder, "calm", pipeline={"updates": 4}, checkpoint={"every_updates": 2, "keep_last": 2})
    finish(start(file), file)
    return folder / "runs" / "calm"


def test_a_damaged_run_directory_is_shown_or_refused_in_one_line(
    folder: Path, finished: Path, written: list[str]
) -> None:
    draw, kept = random.Random(3), folder / "kept"
    shutil.copytree(finished, kept)
    for number in range(EXAMPLES // 20):
        shutil.rmtree(finished)
        shutil.copytree(kept, finished)
        done = [damage(draw, finished) for _ in range(draw.randint(1, 3)) if any(finished.iterdir())]
        for arguments in (("status", "--json"), ("status",), ("tail",), ("report",)):
            assert_answered((*arguments, str(finished)), (number, done, arguments))
    shutil.rmtree(finished)
    shutil.copytree(kept, finished)
    assert not written
