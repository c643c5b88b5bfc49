"""A small hub on loopback, for the real `huggingface_hub` client: repositories with commits and branches, read and
written through the endpoints that the client uses without Xet (create, branch, preupload, LFS batch, upload, commit).
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback_writer"
LFS = (".safetensors", ".npz", ".model", ".png", ".bin")  # what the real hub keeps in LFS, among others
Answer = tuple[int, dict[str, str], bytes]


def as_json(status: int, body: object, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(body).encode()


class CutOff(Exception):
    """The server goes away in the middle of a request."""


@dataclass
class Hub:
    """Repositories by id, each with commits and branches; what was asked for is kept.

    Attributes:
        files: repo -> commit -> name -> content.
        heads: repo -> branch -> commit.
        gated, private: ids of repositories.
        large: sha256 -> content that was uploaded, whether a commit names it or not.
        asked: "METHOD path" of every request; committed: the messages of commits.
        faults: part of a path -> what happens to requests for it: a status, or "cut"; each as often as it is listed.
        ignored: names that a .gitignore keeps out.
    """

    files: dict[str, dict[str, dict[str, bytes]]]
    heads: dict[str, dict[str, str]]
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    committed: list[str] = field(default_factory=list)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    url: str = ""

    def head(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return self.files[repo][self.heads[repo][branch]]

    def answer(self, method: str, path: str, body: bytes = b"", authorization: str = "") -> Answer:
        self.asked.append(f"{method} {path}")
        for part, faults in self.faults.items():
            if part in path and faults:
                fault = faults.pop(0)
                if fault == "cut":
                    raise CutOff
                return as_json(int(fault), {"error": "the hub is unwell"})
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if method in ("GET", "HEAD"):
            return self.read(parts)
        if authorization != f"Bearer {TOKEN}" and parts[0] != "lfs":
            return as_json(401, {"error": "Invalid credentials in Authorization header"})
        return self.write(parts, body)

    def read(self, parts: list[str]) -> Answer:
        is_api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        if repo not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        rest = parts[4:] if is_api else parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.heads[repo].get(revision, revision)
        if commit not in self.files[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.files[repo][commit]
        if is_api and rest and rest[0] == "tree":
            return as_json(200, [self.entry(n, files[n]) for n in files])
        if is_api:
            names = [{"rfilename": name} for name in files]
            return as_json(200, {"id": repo, "sha": commit, "private": repo in self.private, "siblings": names})
        data = files.get("/".join(rest[2:]))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, data

    @staticmethod
    def entry(name: str, data: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return entry

    def write(self, parts: list[str], body: bytes) -> Answer:
        if parts == ["api", "validate-yaml"]:
            return as_json(200, {"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if parts[0] == "lfs":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                return as_json(400, {"error": "the content is not what its name says"})
            self.large[parts[1]] = body
            return 200, {}, b""
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        repo, verb, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if repo not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if verb == "branch":
            self.heads[repo][revision] = self.heads[repo]["main"]
            return as_json(200, {})
        if revision not in self.heads[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        return {"preupload": self.preupload, "commit": self.commit}[verb](repo, revision, body)

    def create(self, wish: dict) -> Answer:
        repo = f"{wish['organization']}/{wish['name']}"
        if wish["organization"] == "google":
            return as_json(403, {"error": "You don't have the rights to create a model under the namespace google"})
        self.files[repo] = {"0" * 40: {".gitattributes": b""}}
        self.heads[repo] = {"main": "0" * 40}
        if wish.get("visibility") == "private" or wish.get("private"):
            self.private.add(repo)
        return as_json(200, {"url": f"{self.url}/{repo}"})

    def preupload(self, repo: str, revision: str, body: bytes) -> Answer:
        told = []
        for file in json.loads(body)["files"]:
            name = file["path"]
            mode = "lfs" if name.endswith(LFS) else "regular"
            told.append({"path": name, "uploadMode": mode, "shouldIgnore": name in self.ignored, "oid": None})
        return as_json(200, {"files": told})

    def batch(self, wish: dict) -> Answer:
        objects = []
        for item in wish["objects"]:
            if item["oid"] not in self.large:
                href = f"{self.url}/lfs/{item['oid']}"
                item = {**item, "actions": {"upload": {"href": href, "header": {}}}}
            objects.append(item)
        return as_json(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: str, revision: str, body: bytes) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        old = self.heads[repo][revision]
        if header.get("parentCommit", old) != old:
            return as_json(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(self.files[repo][old])
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    return as_json(400, {"error": f"{value['path']} was never uploaded"})
                files[value["path"]] = self.large[value["oid"]]
        new = hashlib.sha1(old.encode() + body).hexdigest()
        self.files[repo][new] = files
        self.heads[repo][revision] = new
        self.committed.append(header["summary"])
        return as_json(200, {"commitUrl": f"{self.url}/{repo}/commit/{new}", "commitOid": new})


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub = self.server.hub  # type: ignore[attr-defined]
        try:
            status, headers, content = hub.answer(self.command, self.path, body, self.headers.get("Authorization", ""))
        except CutOff:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (the base class calls them by these names)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub behind `hub.url` until the block ends."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub  # type: ignore[attr-defined]
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def settings(hub: Hub, home: Path, *, offline: bool = False, token: str | None = None) -> dict[str, str]:
    """The environment of a process whose client knows this hub alone; the client reads it when it is imported."""
    values = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", "no_proxy": "*",
    }  # fmt: skip
    own = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    return {**own, **values, **({} if token is None else {"HF_TOKEN": token})}
