"""A stand-in for W&B's server on this machine: as much of its HTTP API as a run needs, and what it was told."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "0123456789" * 4
OWNER = {"id": "P", "name": "project", "entity": {"id": "E", "name": "me"}}


@dataclass
class Told:
    """A run as the server knows it.

    Attributes:
        history: its rows, each placed at the line number that the client gave.
        starts: times that a client has begun or resumed it.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0


@dataclass
class Server:
    """Address and runs of a server that answers.

    Attributes:
        url: to be given as WANDB_BASE_URL.
        runs: by their id.
    """

    url: str = ""
    runs: dict[str, Told] = field(default_factory=dict)

    def graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answers a query by its name; an empty answer will do for those that are not here."""
        run = self.runs.get(str(variables.get("name")))
        if name == "Viewer":
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "RunResumeStatus":
            return {"model": {**OWNER, "bucket": None if run is None else bucket(variables["name"], run)}}
        if name == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], Told())
            run.starts += variables.get("displayName") is not None
            return {"upsertBucket": {"bucket": bucket(variables["name"], run), "inserted": run.starts == 1}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        return {"project": None} if name == "ArtifactType" else {}

    def stream(self, run_id: str, files: dict[str, Any]) -> None:
        """Takes lines of a run's files."""
        lines = files.get("wandb-history.jsonl")
        if lines:
            rows = [json.loads(line) for line in lines["content"]]
            self.runs[run_id].history[lines["offset"] : lines["offset"] + len(rows)] = rows


def bucket(run_id: str, run: Told) -> dict[str, Any]:
    """A run as the API shows it."""
    return {
        "id": f"B{run_id}",
        "name": run_id,
        "displayName": "run",
        "description": "",
        "sweepName": None,
        # Without what a client itself has put there, it takes the run for a new one.
        "config": json.dumps({"_wandb": {"value": {"t": {}}}}),
        "wandbConfig": json.dumps({"t": {}}),
        "summaryMetrics": json.dumps(run.history[-1] if run.history else {}),
        "tags": [],
        "historyLineCount": len(run.history),
        "eventsLineCount": 1,
        "logLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsTail": json.dumps([json.dumps({"_runtime": 1.0, "_timestamp": 1.0})]),
        "project": OWNER,
    }


class _Handler(BaseHTTPRequestHandler):
    """Takes requests for ``server``."""

    protocol_version = "HTTP/1.1"
    server: "_Http"

    def do_POST(self) -> None:
        content, told = self.body(), self.server.told
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if self.path == "/graphql":
            query = json.loads(content)
            name = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            self.answer({"data": told.graphql(name[1] if name else "", query.get("variables") or {})})
            return
        if stream:
            told.stream(stream[1], json.loads(content).get("files") or {})
        self.answer({"exitcode": None, "limits": {}})

    def do_PUT(self) -> None:
        self.body()
        self.answer({})

    do_GET = do_PUT

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def answer(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None: ...


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, told: Server) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told = told

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed resets its connections."""


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of this machine while the block lasts."""
    told = Server()
    with _Http(told) as http:
        told.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield told
        finally:
            http.shutdown()
            thread.join()
