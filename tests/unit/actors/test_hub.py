"""Models by hub names: what is downloaded where, which commit, and one line for each fault. The client is the real one."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from actors import heartbeat
from actors.config import PromptsConfig
from actors.data import hub as hubs
from actors.data.models import check_fit, find_model, load_config, load_model, with_headers
from actors.data.tokenizer import load_tokenizer
from actors.data.weight_files import stored_tensors
from actors.errors import UserError
from actors.prompts.files import read_records
from tests import fake_hub
from tests.fake_hub import FakeHub
from tests.tiny_models import make_tiny_model
from tests.waiting import until

NAME, KEY = "owner/student", "student.model"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two safetensors files of about a megabyte together, each with its tensors far larger than its header."""
    folder = make_tiny_model(tmp_path_factory.mktemp("hub") / "student", hidden=256, layers=1, tie=False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(one.nbytes for one in tensors.values())},
        "weight_map": {name: file for file, mine in parts.items() for name in mine},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # Mistral's repositories hold the weights a second time.
    save_file(tensors, folder / "consolidated.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def hub(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub.hub_of({NAME: files}) as hub:
        fake_hub.use(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def weights_sent(hub: FakeHub) -> int:
    return sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))


def test_the_campaign_process_reads_headers_and_no_tensors(hub: FakeHub, files: Path) -> None:
    size = sum((files / f"model-{n}.safetensors").stat().st_size for n in (1, 2))
    hub.ignores_ranges = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hubs, "HEADER_GUESS", 4096)
        check_fit(NAME, False, KEY)
        assert 0 < weights_sent(hub) < 0.05 * size
        with with_headers(NAME, KEY) as folder:
            assert {name: one[1:] for name, one in stored_tensors(folder, KEY).items()} == {
                name: one[1:] for name, one in stored_tensors(files, KEY).items()
            }
            # Holes: the folder takes the room of the headers.
            assert sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors")) < 0.2 * size
    load_tokenizer(NAME, False, KEY)
    load_config(NAME, False, KEY)
    assert not list((Path(fake_hub.constants.HF_HUB_CACHE)).rglob("*.safetensors"))
    load_model(NAME, "float32", "cpu", False, KEY)  # what an actor does
    assert hub.sent["consolidated.safetensors"] == 0
    sent = weights_sent(hub)
    assert size < sent < 1.1 * size
    check_fit(NAME, False, KEY)  # from the cache, now that it is there
    assert weights_sent(hub) == sent


def test_a_header_longer_than_the_first_request_is_read_whole(hub: FakeHub, files: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hubs, "HEADER_GUESS", 16)
        [(header, size)] = hubs.headers(NAME, ["model-1.safetensors"], KEY)
    content = (files / "model-1.safetensors").read_bytes()
    assert content.startswith(header) and size == len(content)
    assert len(header) == 8 + int.from_bytes(content[:8], "little")


def test_faults_in_files_on_a_hub_are_found_by_their_headers(hub: FakeHub, files: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in files.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-10] if file.name == "model-2.safetensors" else content)
    hub.add("owner/broken", broken)
    with pytest.raises(UserError, match="whole safetensors file"):
        check_fit("owner/broken", False, KEY)
    (broken / "model-2.safetensors").write_bytes((broken / "model-1.safetensors").read_bytes())
    hub.add("owner/double", broken)
    with pytest.raises(UserError, match="each tensor in one file"):
        check_fit("owner/double", False, KEY)
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"")
    hub.add("owner/pickled", broken)
    with pytest.raises(UserError, match="pickled files are not read"):
        check_fit("owner/pickled", False, KEY)


def test_a_branch_is_resolved_once_and_a_commit_stays_what_it_is(hub: FakeHub, tmp_path: Path) -> None:
    first = hubs.commit_of(NAME, None, KEY)
    other = make_tiny_model(tmp_path / "other", hidden=32, layers=1)
    second = hub.add(NAME, other)
    tagged = hub.add(NAME, other, branch="v2")
    assert first != second == hubs.commit_of(NAME, "main", KEY) and tagged == hubs.commit_of(NAME, "v2", KEY)
    asked = hub.requests
    assert hubs.commit_of(NAME, first, KEY) == first and hub.requests == asked
    hidden = [load_config(f"{NAME}@{commit}", False, KEY).hidden_size for commit in (first, second)]
    assert hidden == [256, 32]


def test_a_cached_commit_needs_no_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_model(NAME, KEY)
    commit = hubs.commit_of(NAME, None, KEY)
    hub.down = True
    assert find_model(f"{NAME}@{commit}", KEY).name == commit
    monkeypatch.setattr(fake_hub.constants, "HF_HUB_OFFLINE", True)
    assert hubs.commit_of(NAME, None, KEY) == commit
    check_fit(f"{NAME}@{commit}", False, KEY)
    with pytest.raises(UserError, match=r"which is not, or not wholly, in .*cache \(HF_HUB_OFFLINE is set\)"):
        find_model("owner/other", KEY)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hubs.commit_of(NAME, "v3", KEY)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"student\.model: found the hub name owner/none, which http.* does not know, or which is private \(HF_TOKEN is not set\)"),
        ("gated", r"student\.model: found the hub name owner/student, which is gated \(HF_TOKEN is not set\), expected .*accept the terms at http"),
        ("revision", r"student\.revision: found v9, expected a branch, tag or commit of owner/student on http"),
        ("down", r"student\.model: found the hub name owner/student \(HfHubHTTPError: .*503.*expected .*a hub that answers at http"),
        ("away", r"student\.model: found the hub name owner/student \(ConnectError: .*expected .*a hub that answers at http"),
    ],
)  # fmt: skip
def test_each_fault_is_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, fault: str, message: str) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.gated, hub.down = ({NAME} if fault == "gated" else set()), fault == "down"
    if fault == "away":
        monkeypatch.setattr(fake_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    name = "owner/none" if fault == "missing" else NAME
    revision = "v9" if fault == "revision" else None
    with pytest.raises(UserError, match=message) as error:
        hubs.commit_of(name, revision, KEY)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    if fault in ("missing", "gated"):
        with pytest.raises(UserError, match=message):
            find_model(name, KEY)


def test_a_hub_that_ignores_ranges_sends_no_gigabytes(hub: FakeHub) -> None:
    hub.ignores_ranges = True
    with pytest.raises(UserError, match="a hub with range requests"):
        check_fit(NAME, False, KEY)


def test_a_download_beats_while_bytes_come_and_says_what_it_does(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "_phases", [])  # of actors that other tests have built in this process
    monkeypatch.setattr(fake_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    find_model(NAME, KEY, weights=False)
    before = heartbeat.count()
    hub.proceed.clear()
    download = threading.Thread(target=find_model, args=(NAME, KEY))
    download.start()
    until(lambda: heartbeat.count() > before, "a beat", download.is_alive)
    assert heartbeat.doing().startswith("downloads owner/student (0.00 GB so far)")
    hub.proceed.set()
    download.join()
    assert heartbeat.doing() == ""


def test_a_data_set_is_read_at_its_revision(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    commits = []
    for version in (1, 2):
        folder = tmp_path / f"questions-{version}"
        folder.mkdir()
        (folder / "train.jsonl").write_text(json.dumps({"prompt": f"version {version}"}) + "\n")
        commits.append(hub.add("owner/questions", folder, "dataset"))
    for commit, expected in zip([*commits, None], ("version 1", "version 2", "version 2"), strict=True):
        config = PromptsConfig(path="owner/questions", revision=commit)
        _, batches = read_records(config, "prompts", [("prompts.prompt_field", "prompt")], [])
        assert [record["prompt"] for batch in batches for _, record in batch.records()] == [expected]
    with pytest.raises(UserError, match=r"prompts\.revision: found v9, expected a branch, tag or commit"):
        list(read_records(PromptsConfig(path="owner/questions", revision="v9"), "prompts", [], [])[1])
