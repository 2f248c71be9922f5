"""How commands name a run, what they suggest, and what a narrow terminal shows."""

import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from actors.errors import UserError
from cluster import cli
from cluster.console import control, screen
from cluster.console.runs import all_runs, find_run
from cluster.console.status import read_status, write_beginning, write_status
from cluster.preflight import DOING, checks, doing
from cluster.records.run_lock import is_locked, locked
from cluster.records.writer import RunRecords
from tests.fake_run import make_fake_run
from tests.waiting import until


class Runs:
    """A home of its own, with runs of known ages."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]):
        self.home, self._capsys = home, capsys

    def make(self, name: str, age: float, *, running: bool = False, below: str = "home/understudy-runs") -> Path:
        run = make_fake_run(self.home / below / name, updates=20, of=100 if running else None)
        if running:
            RunRecords(run).event("loop_started", step=1)
            write_status(run, {"state": "running"})
        stamp = run.stat().st_mtime - age
        for path in run.iterdir():
            os.utime(path, (stamp, stamp))
        return run

    def call(self, *arguments: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        return int(ended.value.code or 0), *self._capsys.readouterr()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runs:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Runs(tmp_path, capsys)


def test_nothing_named_is_the_only_run_or_the_newest_and_it_is_said(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="RUN: found none, and no run in runs/"):
        find_run(None)
    old = runs.make("old", 500)
    assert find_run(None) == old
    assert capsys.readouterr().err == f"run: {old}\n"
    new = runs.make("new", 5, below="here/runs")
    assert find_run(None).resolve() == new
    assert capsys.readouterr().err == "run: runs/new, the newest of 2\n"
    assert [run.name for run in all_runs()] == ["new", "old"]


def test_a_name_is_looked_for_in_every_place_and_two_of_it_are_refused(runs: Runs) -> None:
    run = runs.make("one", 5)
    assert find_run("one") == run == find_run(str(run))
    runs.make("one", 5, below="here/runs")
    with pytest.raises(UserError, match=r"RUN: found one, which is in runs and in .*understudy-runs, expected a path"):
        find_run("one")
    assert find_run("runs/one") == Path("runs/one"), "a path is what it says"


@pytest.mark.parametrize("named", [["old"], []], ids=["by name", "the newest"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status"], "update 20/20"),
        (["tail", "--rows", "1"], "update 20"),
        (["report"], "report: "),
        (["export", "OUT"], "no checkpoint"),
        (["run", "--resume", "name=x"], "override: found 'name=x'"),
        (["plan", "CONFIG", "--run"], "trajectories/s"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_every_command_finds_its_run_in_the_same_way(runs: Runs, words: list[str], said: str, named: list[str]) -> None:
    run = runs.make("old", 5)
    places = {"OUT": str(runs.home / "out"), "CONFIG": str(run / "config.yaml")}
    words = [places.get(word, word) for word in words]
    if words[-1] == "--run":
        words = [*words, *(named or [str(run)])]
    elif words[0] == "run":
        words = [*words[:2], *named, *words[2:]]
    else:
        words = [words[0], *named, *words[1:]]
    _, out, err = runs.call(*words)
    assert said in out + err
    assert (f"run: {run}\n" in err) == (not named and "--run" not in words)


def test_status_without_a_name_lists_the_runs(runs: Runs) -> None:
    runs.make("old", 3700)
    assert "update 20/20" in runs.call("status")[1], "the only one is shown"
    new = runs.make("new", 5, running=True)
    broken = runs.make("broken", 100) / "config.yaml"
    stamp = broken.stat().st_mtime
    broken.write_text("name: [")
    os.utime(broken, (stamp, stamp))
    status, out, err = runs.call("status")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.strip()]
    assert rows[0] == ["name", "state", "update", "changed", "directory"]
    assert [row[:2] for row in rows if row[0] in ("new", "old", "broken")] == [
        ["new", "running"],
        ["broken", "cannot"],
        ["old", "finished"],
    ]
    assert "1h01m ago" in out and "20/100" in out
    listed = json.loads(runs.call("status", "--json")[1])
    assert [row["name"] for row in listed] == ["new", "broken", "old"] and listed[0]["run_dir"] == str(new)


def test_what_is_steered_without_a_name_is_the_one_that_runs(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[Path, str, dict[str, int]]] = []
    monkeypatch.setattr(control, "send", lambda *asked: sent.append(asked) or "done")
    runs.make("newest", 1)
    assert "no running campaign" in runs.call("scale", "rollout=2")[2]
    live = runs.make("live", 10, running=True)
    assert runs.call("scale", "rollout=2", "teacher.default=3")[0] == 0
    assert runs.call("scale", "live", "rollout=4")[0] == 0
    assert sent == [
        (live, "scale", {"rollout": 2, "teacher.default": 3}),
        (live, "scale", {"rollout": 4}),
    ]
    other = runs.make("other", 10, running=True)
    status, _, err = runs.call("stop")
    assert status == 2 and "2 campaigns that run" in err and str(live) in err and str(other) in err
    assert len(sent) == 2


def test_a_starting_campaign_is_waited_for(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_fake_run(runs.home / "home/understudy-runs/young", updates=1, of=9)
    records = RunRecords(run)
    records.event("started", step=0)
    write_status(run, {"state": "starting"})
    assert read_status(run)["state"] == "starting"
    states: list[str] = []
    monkeypatch.setattr(control, "send", lambda *_: states.append(read_status(run)["state"]) or "done")
    waits = threading.Event()

    def started() -> None:
        until(waits.is_set, "the command to wait")
        write_status(run, {"state": "running"})
        records.event("loop_started", step=0)

    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=lambda _: waits.set()))
    thread = threading.Thread(target=started)
    thread.start()
    status, out, err = runs.call("scale", "young", "rollout=2")
    thread.join()
    assert (status, out, states) == (0, "done\n", ["running"])
    assert "is starting: waiting until it takes commands" in err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["statsu"], "status"),
        (["status", "--wach"], "--watch"),
        (["run", "a.yaml", "--alow-change", "x"], "--allow-change"),
        (["plan", "a.yaml", "--respnse-tokens=8"], "--response-tokens"),
        (["export", "a", "b", "--dtype", "bf16"], "bfloat16"),
    ],
)
def test_what_was_meant_is_said_of_commands_options_and_choices(runs: Runs, words: list[str], meant: str) -> None:
    status, _, err = runs.call(*words)
    assert status == 2 and err.rstrip().endswith(f"; did you mean {meant}?")
    assert "did you mean" not in runs.call("xyzzy")[2]


@pytest.mark.parametrize("width", [80, 60])
def test_narrow_terminals_show_everything(
    runs: Runs, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.make("a-campaign-with-a-name-of-its-own", 5, running=True)
    path = "/shared/a_long_directory/without_a_blank/in_it/checkpoints/step_00000020_of_a_campaign_with_a_long_name"
    doing = "loading_a_model_from_/shared/models/a_name_that_is_longer_than_any_column_of_a_table"
    write_status(run, {"state": "running", "roles": {"rollout": doing, "teacher": "idle", "learner": "idle"}})
    RunRecords(run).event("checkpoint", step=20, path=path)

    def shown(print_it: Callable[[Console], Any]) -> str:
        console = Console(width=width, file=io.StringIO(), record=True)
        print_it(console)
        return console.export_text()

    status = read_status(run)
    text = shown(lambda console: console.print(screen.status_screen(status)))
    assert "20/100" in text and "…" not in text and all(len(line) <= width for line in text.splitlines())
    pieces = text.replace(" ", "").splitlines()
    assert any(path.startswith(piece.removeprefix("checkpoint")) for piece in pieces if "checkpoint/shared" in piece)
    assert path[-8:] in "".join(pieces) and doing[-4:] in "".join(pieces)

    monkeypatch.setenv("COLUMNS", str(width))
    for words in (["status"], ["plan", str(run / "config.yaml"), "--run", str(run), "--gpus", "8"]):
        out = runs.call(*words)[1]
        table = "\n".join(line for line in out.splitlines() if "trajectories/s" not in line and "measured" not in line)
        assert "…" not in table
    for name in (
        ("run", "plan", "status", "export", "compare") if width == 80 else ()
    ):  # argparse wraps no group of options
        help_text = runs.call(name, "--help")[1]
        assert "…" not in help_text and all(len(line) <= width for line in help_text.splitlines())
    capsys.readouterr()
    screen.print_table([["item", "what"], ["x" * 50, "y" * 70]])
    out = capsys.readouterr().out
    assert (out.count("x"), out.count("y")) == (50, 70)
    models = ["examples/calculator/student", "calculator@8"]
    heads = ["set", "quantity", *models, f"{models[1]} - {models[0]}"]
    row = ["greedy", "response_length_mean", "41.7 ± 20.5%", "91.7 ± 18.8%", "+50.0% (+21.5% to +69.3%)"]
    screen.print_table([heads, row], named_by=2)
    out = capsys.readouterr().out
    assert all(len(line) <= width for line in out.splitlines())
    assert all(text in out for text in (*heads[2:], *row)), "no word and no interval is broken"


def test_every_check_says_what_it_does(runs: Runs) -> None:
    from cluster.config_file import load_config

    root = Path(__file__).resolve().parents[3]
    config = load_config(root / "configs" / "quickstart.yaml", ["checkpoint.mirror=/tmp/mirror"])
    names = [name for name, _ in checks(config, offline=True)]
    assert len(names) > 6
    assert [name for name in names if doing(name) == "looking"] == []
    assert set(DOING) >= {name.partition(" ")[0] for name in names}


def test_offline_a_path_that_is_not_here_is_named(runs: Runs) -> None:
    from cluster.config_file import load_config

    root = Path(__file__).resolve().parents[3]
    changes = ["replay=frist", "prompts.path=runs/trian.jsonl", "student.model=owner/name"]
    (runs.home / "runs").mkdir(exist_ok=True)
    found = checks(load_config(root / "configs" / "quickstart.yaml", changes), offline=True)
    skipped = {name for name, check in found if check is None}
    assert {"student", "replay (frist is not on this machine)"} <= skipped


def test_a_campaign_is_starting_from_its_lock_to_its_loop_and_one_without_a_start_has_not_begun(runs: Runs) -> None:
    run = runs.make("old", 5)
    young = runs.home / "home/understudy-runs/young"
    young.mkdir()
    shutil.copy(run / "config.yaml", young)
    assert read_status(young)["state"] == "not begun" and "not begun" in runs.call("status", "young")[1]
    assert [path.name for path in all_runs()] == ["old"]
    hours = time.time() + 7200
    for directory, after in ((young, "not begun"), (run, "finished")):
        with locked(directory):
            assert {path.name for path in all_runs()} >= {"old", directory.name}
            write_beginning(directory)
            assert read_status(directory, now=hours)["state"] == "starting", "however long prompts are read"
            RunRecords(directory).event("resumed", step=0)
            assert read_status(directory, now=hours)["state"] == "starting"
            (directory / "status.json").unlink()
            assert read_status(directory, now=hours)["state"] == "starting"
            lines = (directory / "events.jsonl").read_text().splitlines(keepends=True)
            (directory / "events.jsonl").write_text("".join(lines[:-1]))
            write_beginning(directory)
        assert read_status(directory)["state"] == after, "a start that was refused"


def test_a_lock_is_one_processes_and_looking_at_it_takes_nothing(tmp_path: Path) -> None:
    assert is_locked(tmp_path) is False
    with locked(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
    assert is_locked(tmp_path) is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "base"], "OUT: found base, which is a run, expected understudy export base OUT"),
        (["export", "base", "BASE/model"], "which is inside the run"),
        (["export", "base", "x" * 300], "(File name too long), expected a directory that can be made"),
        (["status", "x" * 300], "expected a run directory"),
        (["scale", "base", "rollout=²"], "expected role=N"),
        (["scale", "base", "rollout=" + "9" * 5000], "expected role=N"),
        (["tail", "base", "--rows", "-3"], "is no number of 1 or more"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be_meant_are_refused_in_one_line(runs: Runs, words: list[str], said: str) -> None:
    run = runs.make("base", 5)
    status, _, err = runs.call(*(word.replace("BASE", str(run)) for word in words))
    assert status == 2 and said in err and "Traceback" not in err
    assert not Path("base").exists()


def test_a_place_where_no_directory_can_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.commands import export as module

    run = make_fake_run(tmp_path / "base")
    state = SimpleNamespace(step=1)
    monkeypatch.setattr(module, "chosen_checkpoint", lambda *_: (run, state))
    with pytest.raises(UserError, match=r"OUT: found /proc/x \(.*\), expected a directory that can be made"):
        module.export(run, Path("/proc/x"))


def test_a_report_has_each_run_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.report import page

    run, drawn = runs.make("base", 5), []
    Path("lnk").symlink_to(run)
    monkeypatch.setattr(page, "write_report", lambda found, output: drawn.extend(found) or output)
    runs.make("other", 5)
    assert runs.call("report", "base", f"{run}/", "other", "lnk")[0] == 0
    assert [path.name for path in drawn] == ["base", "other"]


def test_status_as_json_is_a_list_unless_a_run_is_named(runs: Runs) -> None:
    runs.make("one", 5)
    assert [row["name"] for row in json.loads(runs.call("status", "--json")[1])] == ["one"]
    assert json.loads(runs.call("status", "one", "--json")[1])["name"] == "one"


@pytest.mark.parametrize("width", [60, 44])
def test_a_narrow_status_breaks_no_word(runs: Runs, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.make("base", 5, running=True)
    roles = {"rollout": "generating responses", "teacher": "scoring", "learner": "waiting for trajectories"}
    write_status(run, {"state": "running", "roles": roles})
    monkeypatch.setenv("COLUMNS", str(width))
    words = runs.call("status", "base")[1].split()
    monkeypatch.setenv("COLUMNS", "300")
    wide = set(runs.call("status", "base")[1].split())
    for text in ("base", "running", "20/100", *roles, *" ".join(roles.values()).split(), "actors", "restarts"):
        assert any(word.strip(",:") == text for word in words) and text in wide, text
    assert "acto" not in words


def test_a_misspelt_run_is_named_where_a_model_may_stand(runs: Runs) -> None:
    from cluster.commands.evaluate import Model, naming_a_run

    runs.make("base", 5)
    for name, said in (("bsae", "; or the run 'base'"), ("other", "a model$")):
        with pytest.raises(UserError, match=said), naming_a_run(Model(name, name)):
            raise UserError(name, "nothing", "a model")
