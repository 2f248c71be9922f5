"""A hub on loopback that answers huggingface_hub's client as the real one does: commits, files, ranges, redirects, errors.

Files of at least LARGE bytes are behind a redirect to another path, with the headers by which the client knows them.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub.constants as constants
import pytest

LARGE = 4096
API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/(.+))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class FakeHub:
    """Repositories by kind and name. `sent` counts the bytes of each file that have left."""

    def __init__(self) -> None:
        self.refs: dict[tuple[str, str], dict[str, str]] = {}
        self.commits: dict[str, Path] = {}
        self.sent: Counter[str] = Counter()
        self.requests = 0
        self.gated: set[str] = set()
        self.down = self.ignores_ranges = False
        self.proceed = threading.Event()
        """While it is not set, files that are sent whole and are large stop after the first half."""
        self.proceed.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name: str, files: Path, kind: str = "model", branch: str = "main") -> str:
        """Puts these files on a branch; returns their commit."""
        commit = hashlib.sha1(f"{name} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = files
        self.refs.setdefault((kind, name), {})[branch] = commit
        return commit

    def answer(self, request: Any) -> None:
        self.requests += 1
        if length := int(request.headers.get("Content-Length") or 0):
            body = request.rfile.read(length)
        else:
            body = b""
        path = unquote(request.path.partition("?")[0])
        if self.down:
            return self._reply(request, 503, b"no capacity")
        if path.startswith("/cdn/"):
            commit, _, file = path.removeprefix("/cdn/").partition("/")
            return self._send(request, self.commits[commit] / file, {})
        if found := API.fullmatch(path):
            kind, name, what, rest = found.groups()
            return self._about(request, kind, name, what, rest, body)
        if found := FILE.fullmatch(path):
            kind = "dataset" if found[1] else "model"
            commit = self._commit(request, kind, found[2], found[3])
            return None if commit is None else self._file(request, commit, found[4])
        self._reply(request, 404, b"")

    def _commit(self, request: Any, kind: str, name: str, revision: str) -> str | None:
        refs = self.refs.get((kind, name))
        if refs is None:
            self._reply(request, 401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
            return None
        if name in self.gated:
            self._reply(request, 403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "accept the terms"})
            return None
        commit = refs.get(revision, revision if revision in self.commits else None)
        if commit is None:
            self._reply(request, 404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"})
        return commit

    def _about(self, request: Any, kind: str, name: str, what: str | None, rest: str | None, body: bytes) -> None:
        revision, _, below = (rest or "main").partition("/")
        commit = self._commit(request, kind, name, revision)
        if commit is None:
            return
        entries = [self._entry(path, self.commits[commit]) for path in sorted(self.commits[commit].iterdir())]
        if what == "tree":
            found: Any = entries if not below else []
        elif what == "paths-info":
            asked = re.findall(r"paths=([^&]*)", unquote(body.decode())) or json.loads(body or b"{}").get("paths", [])
            found = [entry for entry in entries if entry["path"] in asked]
        else:
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            found = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False, "downloads": 0}
        self._reply(request, 200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _entry(self, path: Path, folder: Path) -> dict[str, Any]:
        content = path.read_bytes()
        entry = {"type": "file", "path": str(path.relative_to(folder)), "size": len(content), "oid": hashlib.sha1(content).hexdigest()}  # fmt: skip
        if len(content) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _file(self, request: Any, commit: str, file: str) -> None:
        path = self.commits[commit] / file
        if not path.is_file():
            return self._reply(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        entry = self._entry(path, self.commits[commit])
        if "lfs" not in entry:
            return self._send(request, path, {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'})
        linked = {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        return self._reply(
            request,
            302,
            b"",
            {
                "Location": f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{commit}/{file}",
                "X-Repo-Commit": commit,
                **linked,
            },
        )

    def _send(self, request: Any, path: Path, headers: dict[str, str]) -> None:
        content, status = path.read_bytes(), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked and not self.ignores_ranges:
            first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        self._reply(request, status, content, {"Accept-Ranges": "bytes", **headers}, path.name)

    def _reply(
        self, request: Any, status: int, content: bytes, headers: dict[str, str] | None = None, name: str = ""
    ) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        half = len(content) // 2 if status == 200 and len(content) >= LARGE else 0
        try:
            request.wfile.write(content[:half])
            request.wfile.flush()
            if half:
                self.proceed.wait(60)
            request.wfile.write(content[half:])
            self.sent[name] += len(content)
        except OSError:  # the client has read enough
            self.sent[name] += half

    def close(self) -> None:
        self.proceed.set()
        self.server.shutdown()
        self.server.server_close()


def use(patch: pytest.MonkeyPatch, url: str, cache: Path, *, offline: bool = False) -> None:
    """Makes this process's client ask the hub at `url`, with this cache."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}))
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)


@contextmanager
def hub_of(models: dict[str, Path]) -> Iterator[FakeHub]:
    """A hub with these models."""
    hub = FakeHub()
    try:
        for name, files in models.items():
            hub.add(name, files)
        yield hub
    finally:
        hub.close()
