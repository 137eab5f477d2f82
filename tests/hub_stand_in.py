"""A hub on this machine: the part of the Hugging Face hub's HTTP API that huggingface_hub 2.4 calls to publish files.

whoami, validate-yaml, model info, create repo, preupload, LFS batch with upload and verify, commit. Repositories are
dictionaries; a commit that is not wholly well-formed changes none. ``broken`` answers a call otherwise.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "stand1In" * 4
OWNER = "me"
Answer = tuple[int, bytes]


@dataclass
class StandIn:
    """The hub's state.

    Attributes:
        url: where it listens.
        repositories: files by path, by repository.
        private: whether a repository is, by repository.
        commits: ``(repository, message, paths)`` of each commit.
        stored: LFS content by SHA-256.
        calls: ``METHOD path`` of each request.
        broken: gives the answer to a call in place of the hub's, or None.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    broken: Callable[[str], Answer | None] = lambda _call: None

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Answer:
        """The reply to one request."""
        call = f"{method} {path}"
        self.calls.append(call)
        instead = self.broken(call)
        if instead is not None:
            return instead
        if not path.startswith("/lfs/upload/") and token != TOKEN:
            return 401, b'{"error": "Invalid credentials"}'
        for pattern, reply in ROUTES:
            found = re.fullmatch(pattern, call)
            if found:
                return reply(self, body, *found.groups())
        return 404, json.dumps({"error": f"no such call: {call}"}).encode()


def _json(status: int, value: object) -> Answer:
    return status, json.dumps(value).encode()


def _whoami(_hub: StandIn, _body: bytes) -> Answer:
    return _json(200, {"name": OWNER, "type": "user", "auth": {"accessToken": {"role": "write"}}})


def _validate(_hub: StandIn, _body: bytes) -> Answer:
    return _json(200, {"errors": [], "warnings": []})


def _info(hub: StandIn, _body: bytes, name: str) -> Answer:
    if name not in hub.repositories:
        return 404, b'{"error": "Repository not found"}'
    siblings = [{"rfilename": path} for path in hub.repositories[name]]
    return _json(200, {"id": name, "sha": "0" * 40, "private": hub.private[name], "siblings": siblings})


def _create(hub: StandIn, body: bytes) -> Answer:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if asked["organization"] != OWNER:
        return 403, b'{"error": "You do not have the rights to create a model there"}'
    hub.repositories[name] = {".gitattributes": b""}
    hub.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
    return _json(200, {"url": f"{hub.url}/{name}"})


def _preupload(_hub: StandIn, body: bytes, _name: str) -> Answer:
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
            "shouldIgnore": False,
            "oid": None,
        }
        for file in json.loads(body)["files"]
    ]
    return _json(200, {"files": files})


def _batch(hub: StandIn, body: bytes, _name: str) -> Answer:
    objects = [
        {**each, "actions": {"upload": {"href": f"{hub.url}/lfs/upload/{each['oid']}"}}}
        for each in json.loads(body)["objects"]
    ]
    return _json(200, {"transfer": "basic", "objects": objects})


def _upload(hub: StandIn, body: bytes, oid: str) -> Answer:
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, b'{"error": "other content than announced"}'
    hub.stored[oid] = body
    return 200, b""


def _commit(hub: StandIn, body: bytes, name: str) -> Answer:
    lines = [json.loads(line) for line in body.splitlines()]
    header, files = lines[0]["value"], lines[1:]
    added: dict[str, bytes] = {}
    for line in files:
        value = line["value"]
        if line["key"] == "lfsFile":
            if value["oid"] not in hub.stored:
                return 400, b'{"error": "content was never uploaded"}'
            added[value["path"]] = hub.stored[value["oid"]]
        else:
            added[value["path"]] = base64.b64decode(value["content"])
    hub.repositories[name] |= added
    hub.commits.append((name, header["summary"], sorted(added)))
    return _json(200, {"commitUrl": f"{hub.url}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, Callable[..., Answer]], ...] = (
    (r"GET /api/whoami-v2", _whoami),
    (r"POST /api/validate-yaml", _validate),
    (rf"GET /api/models/{NAME}(?:\?.*)?", _info),
    (r"POST /api/repos/create", _create),
    (rf"POST /api/models/{NAME}/preupload/main", _preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _batch),
    (r"PUT /lfs/upload/([0-9a-f]{64})", _upload),
    (rf"POST /api/models/{NAME}/commit/main", _commit),
)


@contextmanager
def serving() -> Iterator[StandIn]:
    """A hub that listens while the block lasts."""
    hub = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self._body()
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, reply = hub.answer(self.command, self.path, body, token)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            if status >= 400:
                message = json.loads(reply).get("error", "") if reply.startswith(b"{") else ""
                code = "RepoNotFound" if message == "Repository not found" else ""
                if code:
                    self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = do_PUT = _any

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
