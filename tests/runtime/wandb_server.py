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
from urllib.parse import quote, unquote

API_KEY = "0123456789" * 4
OWNER = {"id": "P", "name": "project", "entity": {"id": "E", "name": "me"}}


@dataclass
class Told:
    """A run as the server knows it.

    Attributes:
        history: its rows, each placed at the line number that the client gave.
        starts: times that a client has begun or resumed it.
        sweep: that it is a trial of.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0
    sweep: str | None = None


@dataclass
class Version:
    """A version of an artifact as the server knows it.

    Attributes:
        name: of the artifact.
        kind: its type.
        digest: of its manifest.
        metadata: as the client gave it.
        manifest: what it holds, as uploaded.
        files: content of its files that were uploaded, by their names in it.
        made_by: id of the run that logged it; None where it was only used.
        used_by: ids of the runs that it was an input of.
        state: ``COMMITTED`` once it is whole.
    """

    name: str
    kind: str
    digest: str
    metadata: dict[str, Any]
    made_by: str | None
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    used_by: list[str] = field(default_factory=list)
    state: str = "PENDING"


@dataclass
class Sweep:
    """A sweep as the server knows it.

    Attributes:
        config: YAML, as the client gave it.
        trials: settings of the runs that an agent is to start, by run id, one after the other.
        states: what agents told of their runs at each heartbeat.
    """

    config: str
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    states: list[dict[str, bool]] = field(default_factory=list)


@dataclass
class Server:
    """Address and runs of a server that answers.

    Attributes:
        url: to be given as WANDB_BASE_URL.
        runs: by their id.
        versions: of artifacts, in the order in which they were made.
        sweeps: by their name.
    """

    url: str = ""
    runs: dict[str, Told] = field(default_factory=dict)
    versions: list[Version] = field(default_factory=list)
    sweeps: dict[str, Sweep] = field(default_factory=dict)

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
            run.sweep = variables.get("sweep") or run.sweep
            return {"upsertBucket": {"bucket": bucket(variables["name"], run), "inserted": run.starts == 1}}
        if name in QUERIES:
            return QUERIES[name](self, variables.get("input") or variables)
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


def create_artifact(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """A version, the known one where name and digest are the same."""
    name, digest = given["artifactCollectionName"], given["digest"]
    known = [each for each in server.versions if (each.name, each.digest) == (name, digest)]
    if not known:
        metadata = json.loads(given.get("metadata") or "{}")
        server.versions.append(Version(name, given["artifactTypeName"], digest, metadata, given.get("runName")))
    version = (known or server.versions)[-1]
    number = server.versions.index(version)
    sequence = {"id": f"S{name}", "latestArtifact": None}
    return {"createArtifact": {"artifact": {"id": f"A{number}", "state": version.state, "artifactSequence": sequence}}}


def create_manifest(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """Where a version's manifest goes; its file is uploaded to the address with the version's number."""
    number = given["artifactID"].removeprefix("A")
    file = {"id": f"F{number}", "name": given["name"], "displayName": given["name"]}
    uploaded = {"uploadUrl": f"{server.url}/manifest/{number}", "uploadHeaders": []}
    manifest = {"id": f"M{number}", "file": {**file, **uploaded}}
    return {name: {"artifactManifest": manifest} for name in ("createArtifactManifest", "updateArtifactManifest")}


def create_files(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """Where the files of a version go."""
    edges = [
        {
            "node": {
                "id": f"X{index}",
                "name": spec["name"],
                "displayName": spec["name"],
                "uploadUrl": f"{server.url}/artifact/{spec['artifactID'][1:]}/{quote(spec['name'])}",
                "uploadHeaders": [],
                "storagePath": f"wandb_artifacts/{index}",
                "uploadMultipartUrls": None,
                "artifact": {"id": spec["artifactID"]},
            }
        }
        for index, spec in enumerate(given["artifactFiles"])
    ]
    return {"createArtifactFiles": {"files": {"edges": edges}}}


def commit_artifact(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """A version is whole."""
    server.versions[int(given["artifactID"][1:])].state = "COMMITTED"
    return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}


def use_artifact(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """A version is an input of a run."""
    server.versions[int(given["artifactID"][1:])].used_by.append(given["runName"])
    return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}


def artifact_by_id(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """A version as the API shows it."""
    number = int(given["id"][1:])
    version = server.versions[number]
    project = {"id": "P", "internalId": "1", "name": "project", "entity": {"name": "me"}}
    collection = {"name": version.name, "project": project}
    fragment = {
        "__typename": "Artifact",
        "id": f"A{number}",
        "artifactSequence": {"__typename": "ArtifactSequence", **collection},
        "versionIndex": [each for each in server.versions if each.name == version.name].index(version),
        "artifactType": {"name": version.kind},
        "description": None,
        "metadata": json.dumps(version.metadata),
        "ttlDurationSeconds": -2,
        "ttlIsInherited": True,
        "tags": [],
        "historyStep": None,
        "state": version.state,
        "size": 0,
        "digest": version.digest,
        "commitHash": None,
        "fileCount": 1,
        "createdAt": "2026-01-01T00:00:00Z",
        "updatedAt": None,
        "aliases": [],
    }
    return {"artifact": fragment}


def upsert_sweep(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """A new sweep."""
    name = f"sweep{len(server.sweeps) + 1}"
    server.sweeps[name] = Sweep(given["config"])
    return {"upsertSweep": {"sweep": {"name": name, "project": OWNER}, "configValidationWarnings": []}}


def sweep_with_runs(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """A sweep as the API shows it."""
    sweep = server.sweeps[given["sweep"]]
    shown = {"id": given["sweep"], "name": given["sweep"], "state": "RUNNING", "config": sweep.config}
    return {"project": {"sweep": {**shown, "runs": {"edges": []}}}}


def create_agent(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """An agent of a sweep, known by the sweep's name."""
    return {"createAgent": {"agent": {"id": given["sweep"]}}}


def heartbeat(server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """What an agent is to do: the next trial once its last one has ended, and to exit after the last of all."""
    sweep, running = server.sweeps[given["id"]], json.loads(given["runState"])
    sweep.states.append(running)
    commands: list[dict[str, Any]] = []
    if not running and sweep.trials:
        run_id = next(iter(sweep.trials))
        settings = {name: {"value": value} for name, value in sweep.trials.pop(run_id).items()}
        commands = [{"id": run_id, "type": "run", "run_id": run_id, "program": "qlora-trainer", "args": settings}]
    elif not running:
        commands = [{"id": "end", "type": "exit"}]
    return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}


QUERIES = {
    "UpsertSweep": upsert_sweep,
    "SweepWithRuns": sweep_with_runs,
    "CreateAgent": create_agent,
    "Heartbeat": heartbeat,
    "ArtifactByID": artifact_by_id,
    "CreateArtifact": create_artifact,
    "CreateArtifactManifest": create_manifest,
    "UpdateArtifactManifest": create_manifest,
    "CreateArtifactFiles": create_files,
    "CommitArtifact": commit_artifact,
    "UseArtifact": use_artifact,
}


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
        content = self.body()
        manifest = re.fullmatch(r"/manifest/(\d+)", self.path)
        if manifest:
            self.server.told.versions[int(manifest[1])].manifest = json.loads(content)
        file = re.fullmatch(r"/artifact/(\d+)/(.+)", self.path)
        if file:
            self.server.told.versions[int(file[1])].files[unquote(file[2])] = content
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
