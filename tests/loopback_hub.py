"""A stand-in for the Hugging Face Hub on this computer, for huggingface_hub's own client."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        files: repository -> path -> bytes. private: repositories that want `token`. token: what a
            request must carry for them, and to write. cut: paths whose next download breaks off
            half way. ranges: the Range headers that came. commits: how many were made.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.token = "hf_right"
        self.cut: set[str] = set()
        self.ranges: list[str] = []
        self.commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, values: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(values).encode(), Content_Type="application/json")

    def _may(self, repository: str, write: bool = False) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if known or not (write or repository in self.server.private):
            return True
        self._answer(401, b"Invalid username or password.", X_Error_Code="RepoNotFound")
        return False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            repository, revision = match[1], match[2] or "main"
            if not self._may(repository):
                return
            if repository not in server.files:
                self._answer(404, X_Error_Code="RepoNotFound")
            elif revision not in ("main", "v1", REVISION):
                self._answer(404, X_Error_Code="RevisionNotFound")
            else:
                siblings = [{"rfilename": name} for name in server.files[repository]]
                self._json({"id": repository, "sha": REVISION, "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            if self._may(match[1]):
                files = server.files[match[1]]
                about = [{"path": name, "size": len(files[name])} for name in files]
                self._json([{"type": "file", "oid": REVISION, **entry} for entry in about])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, name = match[1], match[3]
            if not self._may(repository):
                return
            body = server.files.get(repository, {}).get(name)
            if body is None:
                self._answer(404, X_Error_Code="EntryNotFound")
            else:
                self._file(name, body)
        else:
            self._answer(404)

    def _file(self, name: str, body: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": REVISION}
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return
        start = 0
        if wanted := self.headers.get("Range"):
            self.server.ranges.append(wanted)
            start = int(re.match(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if name in self.server.cut:
            self.server.cut.discard(name)
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self._answer(206 if start else 200, body[start:], **headers)

    def do_POST(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if path == "/api/repos/create":
            values = json.loads(body)
            repository = f"{values['organization']}/{values['name']}"
            if self._may(repository, write=True):
                server.files.setdefault(repository, {})
                if values.get("private") or values.get("visibility") == "private":
                    server.private.add(repository)
                self._json({"url": f"{server.url}/{repository}", "id": repository})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            if self._may(match[1], write=True):
                names = [file["path"] for file in json.loads(body)["files"]]
                kinds = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self._json({"files": [{"path": name, **kinds} for name in names]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            if self._may(match[1], write=True):
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        content = base64.b64decode(value["content"])
                        server.files[match[1]][value["path"]] = content
                server.commits += 1
                url = f"{server.url}/{match[1]}/commit/{REVISION}"
                self._json({"success": True, "commitUrl": url, "commitOid": REVISION})
        else:
            self._json({}, 200 if path.startswith("/api/validate-yaml") else 404)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """The stand-in, answering until the block is left."""
    with LoopbackHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
