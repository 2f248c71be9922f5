"""Alerts reach a program and a server, and neither can hold a campaign up."""

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from cluster.config import AlertsConfig, CampaignConfig
from cluster.config_file import load_config
from cluster.records.event_table import EVENTS
from cluster.records.writer import read_jsonl
from cluster.tracking import outbox
from cluster.tracking.alerts import Alerts, alert_of, calls, check_alerts
from tests.light_campaign import configuration, finish, make_folder, start
from tests.processes import below, command_of
from tests.unit.cluster.test_config import written
from tests.waiting import until

DIED = {"kind": "actor_died", "actor": "rollout-0", "cause": "killed", "time": 1.5, "wall_seconds": 2.0}
DIED_TEXT = "here: rollout-0 died; its work is done again (killed)"


class Server:
    """A local server that answers the statuses it is given, the last one for ever."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.statuses = [200]
        mine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = mine.statuses.pop(0) if len(mine.statuses) > 1 else mine.statuses[0]
                mine.got.append({"status": status, "type": self.headers["Content-Type"], **body})
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PAUSES_SECONDS", (0.01, 0.02))


def config(folder: Path, **alerts: Any) -> CampaignConfig:
    loaded = load_config(written(folder), [f"output_dir={folder}"])
    loaded.alerts = AlertsConfig(**alerts)
    return loaded


def program(folder: Path, body: str) -> str:
    """A command that runs this Python with the alert in `alert`."""
    file = folder / "program.py"
    file.write_text(f"import json, sys, time\nalert = json.load(sys.stdin)\n{body}\n")
    return f"{sys.executable} {file}"


def test_a_server_gets_what_is_documented_and_what_it_could_not_take_is_sent_again(
    tmp_path: Path, server: Server
) -> None:
    server.statuses = [503, 429, 200]
    events: list[str] = []
    alerts = Alerts(config(tmp_path, webhook=server.url), lambda kind, **_: events.append(kind))
    alerts.event(DIED)
    until(lambda: len(server.got) == 3, "three tries")
    alerts.event({"kind": "checkpoint", "step": 3, "path": "x"})  # does not call
    alerts.event({"kind": "finished", "step": 4, "cause": ""})
    alerts.close()
    assert [(one["kind"], one["status"]) for one in server.got] == [
        *(("actor_died", status) for status in (503, 429, 200)),
        ("finished", 200),
    ]
    first = {key: value for key, value in server.got[2].items() if key not in ("status", "type")}
    assert first == {**DIED, "campaign": "here", "run_dir": str(tmp_path / "here"), "text": DIED_TEXT}
    assert server.got[2]["type"] == "application/json"
    assert events == ["alerts_failed", "alerts_returned"]


@pytest.mark.parametrize("status", [400, 404, 302])
def test_what_a_server_refuses_for_good_is_dropped_and_told(tmp_path: Path, server: Server, status: int) -> None:
    server.statuses = [status, 200]
    events: list[tuple[str, str]] = []
    alerts = Alerts(config(tmp_path, webhook=server.url), lambda kind, **f: events.append((kind, f["cause"])))
    alerts.event(DIED)
    alerts.event(DIED)
    alerts.close()
    assert [one["status"] for one in server.got] == [status, 200]
    assert events == [("alert_refused", f"status {status}")]


def test_a_server_that_is_away_costs_nothing_and_its_url_is_in_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "KEPT_RECORDS", 4)
    events: list[str] = []
    told = lambda kind, **fields: events.append(f"{kind} {fields}")  # noqa: E731
    alerts = Alerts(config(tmp_path, webhook="http://127.0.0.1:9/secret", timeout_seconds=0.2), told)
    for _ in range(10):
        alerts.event(DIED)
    alerts.close()
    assert events[0].startswith("alerts_failed") and "'missing': 10" in events[-1]
    assert "secret" not in "".join(events)


def test_a_program_gets_the_alert_and_one_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    out = tmp_path / "got.json"
    ours = config(tmp_path, command=program(tmp_path, f"open({str(out)!r}, 'w').write(json.dumps(alert))"))
    alerts = Alerts(ours, lambda *_, **__: None)
    alerts.event(DIED)
    alerts.close()
    assert json.loads(out.read_text()) == alert_of("here", tmp_path / "here", DIED)

    marks, events = tmp_path / "marks", []
    hangs = f"sh -c 'printf x >> {marks}; sleep 600'"
    alerts = Alerts(config(tmp_path, command=hangs, timeout_seconds=0.3), lambda kind, **f: events.append((kind, f)))
    alerts.event(DIED)  # returns at once, or this test would not end
    until(lambda: marks.exists() and len(marks.read_text()) > 1, "a second try")
    alerts.close()
    assert events[0][0] == "alerts_failed" and "sh has not ended after 0.3 s" in events[0][1]["cause"]
    assert events[-1][0] == "alerts_behind"
    until(lambda: not [one for one in below() if "600" in command_of(one)], "the end of what hangs")


def test_what_calls_is_guards_faults_ends_and_what_is_bad() -> None:
    called = {kind for kind in EVENTS if calls(kind)}
    assert {"guard_warned", "guard_stopped", "actor_died", "finished", "failed", "stopped", "disk_full"} <= called
    assert not called & {"checkpoint", "started", "actor_started", "alerts_failed", "tracker_failed", "scaled"}


def test_a_program_that_is_not_there_and_a_url_that_is_none_are_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"alerts\.command: found 'no-such-program'"):
        check_alerts(AlertsConfig(command="no-such-program --team a"))
    assert check_alerts(AlertsConfig(command=f"{sys.executable} x.py", webhook="http://h/x")) == "command, webhook"
    with pytest.raises(UserError, match=r"alerts\.webhook: found something else, expected http"):
        load_config(written(tmp_path), ["alerts.webhook=ftp://key"])


def test_a_campaign_calls_when_a_guard_acts_and_when_it_ends(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    command = program(tmp_path, f"open({str(tmp_path / 'calls')!r}, 'a').write(alert['text'] + '\\n')")
    guards = {"always": {"metric": "reverse_kl", "above": -1.0}}
    file = configuration(folder, "called", pipeline={"updates": 2}, evaluation={"prompts": None},
                         alerts={"command": command}, guards=guards)  # fmt: skip
    finish(start(file), file)
    lines = (tmp_path / "calls").read_text().splitlines()
    assert len(lines) == 2 and "called: guard always, update 1" in lines[0]
    assert lines[-1] == "called: finished after update 2"
    assert not [row for row in read_jsonl(folder / "runs/called/events.jsonl") if row["kind"].startswith("alert")]
