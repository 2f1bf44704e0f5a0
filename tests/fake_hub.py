"""A stand-in for the Hub's HTTP interface, in memory: as much of it as creating, uploading and downloading take.

`huggingface_hub` reads its settings when it is imported, so it talks to this one only in a process of its own:

    with FakeHub() as hub:
        subprocess.run(..., env=os.environ | hub.environment(home))
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_canaryCANARYcanaryCANARYcanary"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    commits: list[str] = field(default_factory=list[str])

    @property
    def head(self) -> str:
        return self.commits[-1] if self.commits else "0" * 40


@dataclass
class FakeHub:
    """Its repositories by name, and every request that it got."""

    repositories: dict[str, Repository] = field(default_factory=dict[str, Repository])
    requests: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    unknown: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    large: dict[str, bytes] = field(default_factory=dict[str, bytes])
    refuse: bool = False
    """Answer every request as to somebody without the right to."""

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """What a process needs to talk to this Hub and to no other."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.refuse:
            return self._answer(403, {"error": "Forbidden: this token has no right to write"})
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return method(self, body, *match.groups())
        self.hub.unknown.append((self.command, path))
        self._answer(404, {"error": f"unknown: {path}"})

    do_POST = do_PUT = do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", headers.pop("kind", "application/json"))
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def whoami(self, body: bytes) -> None:
        self._answer(200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "id": name}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo"} | answer)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(bool(private))
        self._answer(200, answer)

    def check_card(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, name: str) -> None:
        if (repository := self.hub.repositories.get(name)) is None:
            return self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = [{"rfilename": file} for file in repository.files]
        self._answer(200, {"id": name, "sha": repository.head, "private": repository.private, "siblings": files})

    def tree(self, body: bytes, name: str) -> None:
        files = self.hub.repositories[name].files.items()
        digests = {path: hashlib.sha1(content).hexdigest() for path, content in files}
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": digests[path]} for path, content in files
        ]
        self._answer(200, entries)

    def preupload(self, body: bytes, name: str) -> None:
        files = [
            {"path": path, "uploadMode": "lfs" if path.endswith("safetensors") else "regular", "shouldIgnore": False}
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        self._answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def put(self, body: bytes, digest: str) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.large[digest] = body
        self._answer(200)

    def commit(self, body: bytes, name: str) -> None:
        repository = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            match line["key"]:
                case "file":
                    repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                case "lfsFile":
                    repository.files[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
                case _:
                    pass
        repository.commits.append(hashlib.sha1(body).hexdigest())
        url = f"{self.hub.url}/{name}/commit/{repository.head}"
        self._answer(200, {"commitUrl": url, "commitOid": repository.head, "success": True})

    def file(self, body: bytes, name: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or path not in repository.files:
            return self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        content = repository.files[path]
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._answer(200, content, kind="application/octet-stream", ETag=tag, X_Repo_Commit=repository.head)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: dict[str, Callable[..., None]] = {
    r"/api/whoami-v2": _Request.whoami,
    r"/api/repos/create": _Request.create,
    r"/api/validate-yaml": _Request.check_card,
    rf"/api/models/{NAME}(?:/revision/.*)?": _Request.info,
    rf"/api/models/{NAME}/tree/.*": _Request.tree,
    rf"/api/models/{NAME}/preupload/.*": _Request.preupload,
    rf"/api/models/{NAME}/commit/.*": _Request.commit,
    rf"/{NAME}\.git/info/lfs/objects/batch": _Request.batch,
    r"/lfs/([0-9a-f]+)": _Request.put,
    rf"/{NAME}/resolve/[^/]+/(.+)": _Request.file,
}


def _handler(hub: FakeHub) -> type[_Request]:
    return type("Request", (_Request,), {"hub": hub})
