"""Models and data sets of a Hugging Face hub: names, commits, headers of weight files, downloads whose progress shows.

A name is `owner/name`, or `owner/name@revision`. A campaign resolves each once (cluster/pins.py), so that every process and
every resume loads the same commit. The campaign process reads the small files, and of safetensors the headers; an actor
downloads the weights to the hub's cache, which is best on a file system that all nodes share (HF_HOME).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from actors.errors import UserError
from actors.heartbeat import beat, does

COMMIT = re.compile(r"[0-9a-f]{40}")
Kind = Literal["model", "dataset"]
HEADER_GUESS = 100_000
"""Bytes of a safetensors file that are asked for first; most headers are shorter."""
LARGEST_HEADER = 100 << 20
"""As safetensors itself limits it."""
CONNECTIONS = 8
REQUEST_SECONDS = 30.0
PROGRESS_SECONDS = 1.0
"""Between two looks at what has been downloaded."""


def split(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> (`owner/name`, revision); None where the name has none."""
    repo, at, revision = name.partition("@")
    return repo, revision if at else None


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set: nothing but the caches is read."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def commit_of(repo: str, revision: str | None, key: str, kind: Kind = "model") -> str:
    """The commit that a branch, tag or commit of a repository is now; main where `revision` is None.

    Offline (HF_HUB_OFFLINE) it is what the cache has under that name. key: the configuration key of the name.
    UserError: see `hub_errors`.
    """
    from huggingface_hub import HfApi, constants

    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    with hub_errors(key, repo, revision):
        if constants.HF_HUB_OFFLINE:
            return (_folder(repo, kind) / "refs" / (revision or "main")).read_text("utf-8").strip()
        found = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=REQUEST_SECONDS)
    if not found.sha:
        raise UserError(key, f"the hub name {repo}, for which {constants.ENDPOINT} tells no commit", "a hub that does")
    # As the client does it for a branch. What is then downloaded is downloaded by its commit, and offline the branch is needed.
    with suppress(OSError):
        ref = _folder(repo, kind) / "refs" / (revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(found.sha, "utf-8")
    return found.sha


def snapshot(name: str, patterns: Sequence[str], key: str) -> Path:
    """The files of a repository that match one of the patterns, in the cache; downloaded unless they are there.

    While it downloads, each look that finds more bytes counts as a step of this process (actors/heartbeat.py), also where
    another process, perhaps on another node, downloads into the same cache. UserError: see `hub_errors`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    repo, revision = split(name)
    disable_progress_bars()
    with hub_errors(key, repo, revision), _progress(_folder(repo, "model") / "blobs", f"downloads {repo}"):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


def headers(name: str, files: Sequence[str], key: str) -> list[tuple[bytes, int]]:
    """(the bytes before the tensors, the size of the whole file) of each safetensors file, by range requests.

    UserError: see `hub_errors`; or the hub does not answer ranges, or what it sends is no safetensors file.
    """
    repo, revision = split(name)
    with hub_errors(key, repo, revision), ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(lambda file: _header(repo, revision, file, key), files))


def file_names(name: str, key: str) -> list[str]:
    """The names of all files of a repository. UserError: see `hub_errors`."""
    from huggingface_hub import HfApi

    repo, revision = split(name)
    with hub_errors(key, repo, revision):
        return HfApi().list_repo_files(repo, revision=revision)


def _header(repo: str, revision: str | None, file: str, key: str) -> tuple[bytes, int]:
    start, size = _range(repo, revision, file, HEADER_GUESS, key)
    length = 8 + int.from_bytes(start[:8], "little")
    if length > min(size, LARGEST_HEADER):
        raise UserError(
            key, f"{file} of {repo}, whose header would have {length} of {size} bytes", "a safetensors file"
        )
    if length > len(start):
        start, size = _range(repo, revision, file, length, key)
    return start[:length], size


def _range(repo: str, revision: str | None, file: str, length: int, key: str) -> tuple[bytes, int]:
    """(the first `length` bytes of a file, or all of a shorter one; its size)."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    asked = {**build_hf_headers(), "Range": f"bytes=0-{length - 1}", "Accept-Encoding": "identity"}
    # Streamed: a server that ignores the range would send gigabytes.
    with get_session().stream(
        "GET", hf_hub_url(repo, file, revision=revision), headers=asked, timeout=REQUEST_SECONDS, follow_redirects=True
    ) as answer:
        if answer.status_code >= 400:
            answer.read()
        hf_raise_for_status(answer)
        total = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status_code != 206 or total is None:
            raise UserError(key, f"{constants.ENDPOINT}, which answers no part of {file}", "a hub with range requests")
        return answer.read(), int(total[1])


@contextmanager
def hub_errors(key: str, repo: str, revision: str | None, *, others: bool = True) -> Iterator[None]:
    """Turns what the hub's client raises within the block into a UserError: what is wrong, and the way out.

    others: also errors that say neither that the name is unknown, nor that access is missing.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        name, at = f"the hub name {repo}", f" at {revision}" if revision else ""
        where, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
        of_revision = re.sub(r"(model|path)$|tokenizer$", lambda m: "revision" if m[1] else "tokenizer_revision", key)
        token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.RevisionNotFoundError):
            raise UserError(of_revision, revision, f"a branch, tag or commit of {repo} on {where}") from error
        if isinstance(error, errors.GatedRepoError):
            found = f"{name}, which is gated ({token})"
            raise UserError(
                key, found, f"a token with access: accept the terms at {where}/{repo}, and set HF_TOKEN"
            ) from error
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            found = f"{name}, which {where} does not know, or which is private ({token})"
            raise UserError(key, found, "a local directory, or a name that this token can read") from error
        if not others:
            raise
        if constants.HF_HUB_OFFLINE:
            found = f"{name}{at}, which is not, or not wholly, in {cache} (HF_HUB_OFFLINE is set)"
            raise UserError(key, found, "a cached name, or HF_HUB_OFFLINE unset to download it") from error
        reason = " ".join(str(error).split())[:160]
        found = f"{name}{at} ({type(error).__name__}: {reason})"
        expected = f"a local directory, a known name, or a hub that answers at {where} (HF_HUB_OFFLINE=1 takes the cache alone)"
        raise UserError(key, found, expected) from error


def _folder(repo: str, kind: Kind) -> Path:
    """The repository's folder in the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"{kind}s--{repo.replace('/', '--')}")


@contextmanager
def _progress(folder: Path, what: str) -> Iterator[None]:
    """Within the block: looks at the folder's size again and again, and says what has come."""
    done = threading.Event()

    def look() -> None:
        before = seen = _on_disk(folder)
        while not done.wait(PROGRESS_SECONDS):
            now = _on_disk(folder)
            if now > seen:
                seen = now
                beat()
                does(f"{what} ({(now - before) / 1e9:.2f} GB so far)")

    does(what)
    looking: Any = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()
        does("")


def _on_disk(folder: Path) -> int:
    """Bytes on the disk: a file that is being assembled may have its final length from the start."""
    total = 0
    with suppress(OSError):  # there is no folder yet
        for entry in os.scandir(folder):
            with suppress(OSError):  # it has just been renamed
                total += entry.stat().st_blocks * 512
    return total
