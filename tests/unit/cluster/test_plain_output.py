"""What commands print and write: no control sequences, no secrets, any encoding of the terminal."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.errors import CampaignError, UserError
from actors.plain_text import concealed, printable
from cluster import cli
from cluster.config_file import as_dictionary, differences, load_config, write_config
from cluster.console.screen import Progress, status_line, status_screen, trajectory_text
from cluster.records.writer import RunRecords
from tests.light_campaign import configuration, make_folder

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\x08\r\u202eabc"


def printed(what: Any) -> str:
    console = Console(width=200, force_terminal=True, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def harmless(text: str) -> bool:
    return not any(c in text for c in EVIL.replace("abc", "").replace("[2J", "").replace("title", "").replace("0;", "")
                   if not c.isprintable())  # fmt: skip


def test_every_control_character_but_line_ends_and_tabs_becomes_visible() -> None:
    for code in [*range(32), *range(127, 160), 0x202E, 0x2028, 0x2066]:
        assert printable(chr(code)).isprintable() == (chr(code) not in "\t\n"), hex(code)
    assert printable("日本\n\t🙂\u200d🙂") == "日本\n\t🙂\u200d🙂"
    assert printable("\x1b[2J") == r"\x1b[2J"


def test_responses_prompts_and_references_reach_the_terminal_without_escapes() -> None:
    row = {"step": 1, "id": "0/0/0", "prompt": EVIL, "tokens": [EVIL, "日"], "student_logprobs": [-1.0, -1.0],
           "teacher_logprobs": [-3.0, None], "finish_reason": "stop", "reference": EVIL, "reward": 1.0}  # fmt: skip
    text = printed(trajectory_text(row))
    assert harmless(text) and r"\x1b[2J" in text and "日" in text


def test_events_errors_and_states_reach_the_terminal_without_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert harmless(str(UserError(EVIL, EVIL, EVIL, [EVIL])))

    def fail(_options: Any) -> int:
        raise CampaignError(f"actor said {EVIL}")

    monkeypatch.setitem(cli.COMMANDS, "check", fail)
    with pytest.raises(SystemExit):
        cli.main(["check", "x.yaml"])
    assert harmless(told := capsys.readouterr().err) and r"actor said \x1b]0;title" in told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("light"))


def test_a_terminal_that_knows_only_ascii_gets_every_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = folder / "日本.jsonl"
    prompts.write_text('{"prompt": "日本語 \\u001b[2J", "answer": "é"}\n' * 4, "utf-8")
    file = configuration(folder, "ascii", prompts={"path": str(prompts)})
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--offline", str(file)])
    out.flush()
    text = out.buffer.getvalue()  # type: ignore[attr-defined]
    assert ended.value.code == 0 and b"prompts: ok" in text and b"\x1b" not in text and rb"\u65e5\u672c" in text
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--offline", str(folder / "日本.yaml")])
    assert ended.value.code == 2


SECRET = "s3cr3t-of-mine"
YAML = """
name: here
student: {model: student}
teachers: {default: {model: "${oc.env:MY_TOKEN}", backend: http, urls: ["http://${oc.env:MY_HOST}/v1"]}}
prompts: {path: train.jsonl}
tracking: {wandb_project: "${teachers.default.model}"}
pipeline: {updates: "${oc.env:MY_UPDATES}"}
"""


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"MY_TOKEN": SECRET, "MY_HOST": "host-of-mine", "MY_UPDATES": "7"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "c.yaml").write_text(YAML)
    return tmp_path / "c.yaml"


def test_a_value_from_the_environment_is_written_as_its_reference(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, written = load_config(config_file), config_file.with_name("config.yaml")
    assert config.teachers["default"].model == config.tracking.wandb_project == SECRET
    write_config(config, written)
    for text in (written.read_text(), json.dumps(as_dictionary(config))):
        assert SECRET not in text and "host-of-mine" not in text and "${oc.env:MY_TOKEN}" in text
    again = load_config(written)
    assert again == config and again.pipeline.updates == 7 and differences(config, again) == []
    monkeypatch.delenv("MY_TOKEN")
    assert load_config(written, environment=False).teachers["default"].model == "$MY_TOKEN"
    with pytest.raises(UserError, match="'MY_TOKEN' not found"):
        load_config(written)


def test_a_secret_is_in_no_message_event_or_difference(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file)
    assert concealed(f"a {SECRET} b") == "a ${oc.env:MY_TOKEN} b"
    assert SECRET not in str(UserError("teachers.default.model", SECRET, f"not {SECRET}", [SECRET]))
    RunRecords(tmp_path / "run").event("failed", f"401 for {SECRET}", step=1)
    assert SECRET not in (events := (tmp_path / "run" / "events.jsonl").read_text()) and "oc.env:MY_TOKEN" in events
    other = load_config(config_file, ["teachers.default.model=else"])
    assert differences(config, other)[0] == ("teachers.default.model", "${oc.env:MY_TOKEN}", "else")


def test_a_key_that_is_given_twice_is_refused(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", str(config_file), "seed=1", "pipeline.updates=3", "seed=2"])
    assert ended.value.code == 2 and "seed is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("guards={1: {metric: entropy}}", "guards.1: found 1 as a name, expected a text, for example 'name1'"),
        ("pipeline.updates=" + "9" * 400, "pipeline.updates: found a number of 400 digits, expected at most 2^63 - 1"),
        ("seed=" + "9" * 30, "seed: found a number of 30 digits, expected at most 2^63 - 1"),
        ("pipeline.prompts_per_update=" + "9" * 12, "expected at most 10,000,000 trajectories an update"),
    ],
)
def test_values_that_no_campaign_can_have_are_refused_by_their_key(config_file: Path, override: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file, [override])
    assert told in str(caught.value)


def test_a_status_is_printed_without_escapes(folder: Path) -> None:
    run_dir = folder / "runs" / "shown"
    run_dir.mkdir(parents=True)
    write_config(load_config(configuration(folder, "shown")), run_dir / "config.yaml")
    progress = Progress(run_dir, Console(width=200, force_terminal=False))
    progress.note(EVIL)
    status = progress._status() | {"cause": EVIL, "host": EVIL, "roles": {EVIL: EVIL}, "state": "lost"}
    assert harmless(printed(status_screen(status))) and status_line(status)


def test_a_reader_that_ends_first_is_no_error_of_a_command_that_prints_with_rich() -> None:
    code = (
        "import sys; from argparse import Namespace; from cluster import cli; "
        "from cluster.console.screen import print_table; "
        "cli.COMMANDS['status'] = lambda _: print_table([['a']]); "
        "sys.exit(cli._status_of(Namespace(command='status')))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        found = subprocess.run([sys.executable, "-c", code], stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (0, "")
