"""A loopback server that speaks the file API of the Hugging Face hub and a simple package index."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FileServer:
    """What is served; tests change it while it runs."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    wheels: dict[str, bytes] = field(default_factory=dict)
    broken: bool = False  # 500 for every hub request
    cut_after: int | None = None  # close the connection after so many bytes of a body
    bytes_per_s: float | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def seen(self, method: str, part: str) -> int:
        """How many requests of this method had `part` in their path."""
        return sum(m == method and part in path for m, path, _ in self.requests)


@contextmanager
def serve() -> Iterator[FileServer]:
    """Run a server on a free port of the loopback interface."""
    state = FileServer()

    class Handler(_Handler):
        server_state = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FileServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        state, path = self.server_state, unquote(urlsplit(self.path).path)
        state.requests.append((self.command, self.path, self.headers.get("Range")))
        if match := re.fullmatch(r"/simple/([^/]+)/", path):
            return self._index(match[1])
        if match := re.fullmatch(r"/wheels/([^/]+)", path):
            return self._body(state.wheels.get(match[1]))
        if state.broken:
            return self._error(500, "")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self._model_info(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", path):
            return self._tree(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        if match := re.fullmatch(r"/cdn/([0-9a-f]+)", path):
            bodies = (b for files in state.repos.values() for b in files.values())
            return self._body(next((b for b in bodies if _sha(b) == match[1]), None))
        return self._error(404, "RepoNotFound")

    # ---- hub

    def _files(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        files = self.server_state.repos.get(repo)
        if files is None:
            self._error(401, "RepoNotFound")  # what the hub says without a token
        elif revision not in (None, "main", COMMIT):
            self._error(404, "RevisionNotFound")
            return None
        return files

    def _model_info(self, repo: str, revision: str | None) -> None:
        files = self._files(repo, revision)
        if files is not None:
            siblings = [_entry(name, body) for name, body in files.items()]
            self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

    def _tree(self, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        if files is not None:
            self._json(
                [
                    {"type": "file", "path": n, "oid": _sha(b), **_entry(n, b)}
                    for n, b in files.items()
                ]
            )

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        if repo in self.server_state.gated:
            self._error(403, "GatedRepo")
        elif name not in files:
            self._error(404, "EntryNotFound")
        else:  # as for files in large storage: the metadata, and a redirect to another place
            body = files[name]
            self.send_response(302)
            self.send_header("Location", f"{self.server_state.url}/cdn/{_sha(body)}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{_sha(body)}"')
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("Content-Length", "0")
            self.end_headers()

    # ---- package index

    def _index(self, package: str) -> None:
        prefix = package.replace("-", "_") + "-"
        names = [name for name in self.server_state.wheels if name.startswith(prefix)]
        links = "".join(f'<a href="/wheels/{name}">{name}</a>' for name in names)
        self._send(f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html")

    # ---- answers

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self, body: bytes | None) -> None:
        if body is None:
            return self._error(404, "")
        first = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            first = int(match[1])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", COMMIT)  # hub >= 2 follows redirects to its own host
        self.send_header("ETag", f'"{_sha(body)}"')
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        if self.command == "GET":
            self._stream(body[first:])
        return None

    def _stream(self, body: bytes) -> None:
        cut, rate = self.server_state.cut_after, self.server_state.bytes_per_s
        step = max(1, int(rate * 0.05)) if rate else 1 << 16
        if cut is not None:
            body, self.close_connection = body[:cut], True
        try:
            for i in range(0, len(body), step):
                self.wfile.write(body[i : i + step])
                if rate:
                    time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


def _entry(name: str, body: bytes) -> dict[str, Any]:
    lfs = {"sha256": _sha(body), "oid": _sha(body), "size": len(body), "pointerSize": 130}
    return {"rfilename": name, "size": len(body), "blobId": _sha(body), "lfs": lfs}


def _sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
