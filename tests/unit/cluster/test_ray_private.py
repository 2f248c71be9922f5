"""A private cluster: what it needs is asked for before it starts, a slow start is tried again, nothing of it is left."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from actors.errors import CampaignError, UserError
from cluster.fleet import ray_private
from cluster.fleet.ray_cluster import probe
from cluster.fleet.ray_private import Watchdog, check_shared_memory, session_folder, start
from tests.processes import ended
from tests.waiting import PATIENCE_SECONDS, until

CHILD = "import subprocess, sys, time; subprocess.Popen(['sleep', '600'], process_group=0); time.sleep(600)"


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """A server that answers one connection with these bytes. None: it accepts nothing, as a process that is stopped."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(answer or b"")

    if answer is not None:
        threading.Thread(target=serve, daemon=True).start()
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.close()


def test_an_address_is_probed_and_only_a_server_of_http_2_passes() -> None:
    with listening(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as address:
        probe(address)
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address, pytest.raises(ConnectionError, match="is not Ray"):
        probe(address)
    with listening(b"") as address, pytest.raises(ConnectionError, match="is not Ray"):
        probe(address)
    with pytest.raises(ConnectionError, match="refused"):
        probe(address)  # nobody listens there any more
    with pytest.raises(ValueError, match="no host:port: nowhere"):
        probe("nowhere")


def test_a_server_that_does_not_answer_is_given_up() -> None:
    with listening(None) as address, pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        probe(address, 0.2)


def test_a_start_that_takes_too_long_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ray_private, "shut_down", lambda: None)
    calls = []

    def slow() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise Exception("The current node timed out during startup.\nThis could happen because")

    start(slow)
    assert len(calls) == 3
    assert (
        capfd.readouterr().err.count("Ray did not start on this machine (The current node timed out during startup.)")
        == 2
    )
    calls.clear()
    with pytest.raises(
        CampaignError, match=r"^Ray did not start on this machine in 2 tries \(The current node timed out[^\n]*$"
    ):
        start(slow, tries=2)


@pytest.mark.parametrize(
    ("error", "key"), [(ValueError("no such option"), "ray:"), (OSError(28, "No space left"), "TMPDIR")]
)
def test_what_another_try_cannot_mend_is_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception, key: str
) -> None:
    monkeypatch.setattr(ray_private, "shut_down", lambda: None)
    calls = []

    def refuse() -> None:
        calls.append(1)
        raise error

    with pytest.raises(UserError, match=key):
        start(refuse)
    assert len(calls) == 1


def with_tmpdir(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(path))


def test_a_long_directory_for_temporary_files_is_replaced_by_a_short_private_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 80)
    long.mkdir()
    with_tmpdir(monkeypatch, long)
    folder = session_folder()
    assert folder is not None and len(str(folder / "ray")) <= ray_private.LONGEST_DIRECTORY
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()


def test_a_short_one_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    with_tmpdir(monkeypatch, Path("/tmp"))
    assert session_folder() is None


def test_a_directory_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with_tmpdir(monkeypatch, Path("/tmp"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    with pytest.raises(UserError, match=r"TMPDIR: found /tmp/ray with 5 MiB of room, expected at least 64 MiB"):
        session_folder()


def test_a_directory_that_cannot_be_written_to_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/here")
    with pytest.raises(UserError, match=r"RAY_TMPDIR: found .*/proc/here.*, expected a directory for temporary files"):
        session_folder()


@pytest.mark.parametrize(("free", "on_disk"), [(64, True), (0, True), (2000, False)])
def test_shared_memory_that_is_too_small_puts_the_store_on_a_disk_and_says_so(
    monkeypatch: pytest.MonkeyPatch, free: int, on_disk: bool
) -> None:
    monkeypatch.setenv(ray_private.SLOW_STORE, "")  # and what is set below is gone after the test
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free << 20))
    said: list[str] = []
    monkeypatch.setattr(ray_private, "say", said.append)
    check_shared_memory(None)
    assert bool(os.environ[ray_private.SLOW_STORE]) == on_disk
    assert (f"/dev/shm has {free} MiB of room" in "".join(said)) == on_disk


def test_a_store_that_does_not_fit_into_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ray_private.SLOW_STORE, raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    check_shared_memory(64)
    with pytest.raises(UserError, match=r"ray.object_store_mebibytes: found 100, and /dev/shm with 64 MiB of room"):
        check_shared_memory(100)
    monkeypatch.setenv(ray_private.SLOW_STORE, "1")
    check_shared_memory(100)


def family(leader: int) -> list[psutil.Process]:
    return [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]


def test_nothing_is_left_of_a_session_when_its_campaign_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "us-folder"
    folder.mkdir()
    program = f"""
import subprocess, sys, time
from cluster.fleet.ray_private import Watchdog
dog = Watchdog()
child = subprocess.Popen([sys.executable, '-c', {CHILD!r}], start_new_session=True)
dog.watch('session', child.pid); dog.watch('folder', {str(folder)!r})
print(child.pid, flush=True)
time.sleep(600)
"""
    campaign = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert campaign.stdout is not None
    leader = int(campaign.stdout.readline())
    until(lambda: len(family(leader)) == 2, "a child", lambda: campaign.poll() is None)
    left = family(leader)
    campaign.kill()
    campaign.wait()
    until(lambda: all(map(ended, left)), f"the end of {left}")
    until(lambda: not folder.exists(), "the end of the folder")


def test_a_closed_watchdog_leaves_nothing_either() -> None:
    dog, child = Watchdog(), subprocess.Popen(["sleep", "600"], start_new_session=True)
    dog.watch("session", child.pid)
    dog.close()
    assert child.wait(PATIENCE_SECONDS) == -9
    assert os.getsid(0) != child.pid


def test_a_private_cluster_starts_no_service_that_it_does_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    for name in (*ray_private.UNUSED_SERVICES, "start_raylet"):
        monkeypatch.setattr(ray_private.node.Node, name, lambda *_, name=name, **__: started.append(name))

    def init(**_: object) -> None:  # in the order of Ray
        node: Any = object.__new__(ray_private.node.Node)
        node.start_monitor()
        node.start_api_server(include_dashboard=False, raise_on_failure=False)
        node.start_log_monitor()
        node.start_raylet("", "", 0)

    monkeypatch.setattr(ray_private.ray, "init", init)
    ray_private._start({}, SimpleNamespace(watch=lambda *_: None))
    assert started == ["start_raylet"]
    ray_private.node.Node.start_monitor(None)
    assert started == ["start_raylet", "start_monitor"], "a cluster that others start has them"
