"""A small server that speaks enough of the Hub's protocol for the real `huggingface_hub` client, in memory.

Repositories of models and datasets: create, preupload, LFS, commit, list, resolve; branches, tags, pull requests,
parent commits; private, gated, disabled and moved repositories; tokens that are refused or may only read; with the
Hub's own error codes. `HubServer.fail` makes it answer the next requests otherwise, or not at all.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    """Commits of one repository: revision name to commit, commit to files."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.gated = self.disabled = False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.messages: list[str] = []
        self.titles: dict[str, str] = {}
        self.commit({}, "main", "initial commit")

    def commit(self, changes: dict[str, bytes | None], branch: str, message: str) -> str:
        files = dict(self.commits.get(self.refs.get(branch, self.refs.get("main", "")), {}))
        for path, content in changes.items():
            if content is None:
                files.pop(path, None)
            else:
                files[path] = content
        listing = {path: git_oid(content) for path, content in sorted(files.items())}
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message} {listing}".encode()).hexdigest()
        self.commits[oid], self.refs[branch], self.titles[oid] = files, oid, message
        self.messages.append(message)
        return oid

    def rewrite(self, branch: str = "main") -> None:
        """As a force push: one commit with the same files, and no other any more."""
        files = self.commits[self.refs[branch]]
        self.commits.clear()
        self.refs.clear()
        self.commit(dict(files), branch, "rewritten")

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """How the next `times` requests whose method and path contain these are answered.

    Attributes:
        status: an answer with this code. `"drop"`: the connection is closed without one; `"lost"`: the request is
            carried out, then the connection is closed; `"cut"`: half of the body, then it is closed; `"hang"`: none.
    """

    method: str
    path: str
    status: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class HubServer:
    """Run with `start()`; `url` is the endpoint.

    Attributes:
        requests: (method, path) pairs, in order. sent: the digests of LFS objects that arrived, in order.
        moved: former names of repositories. read_only: owners that the token may not write to.
        lfs_from: bytes from which a file goes through LFS, as every safetensors file does.
    """

    token = "hf_local_test_token"
    user = "tester"

    def __init__(self) -> None:
        self.url = ""
        self.reset()
        server = self

        class Handler(_Handler):
            hub = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def reset(self) -> None:
        """Empty, and well."""
        self.repos: dict[str, Repo] = {}  # "models/user/name" or "datasets/user/name"
        self.requests: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.moved: dict[str, str] = {}
        self.read_only: set[str] = set()
        self.lfs_from, self.part_size = 10_000_000, 0
        self.faults: list[Fault] = []
        self.down = False
        self.waited_out = 0  # requests without an answer that the client did not give up
        self.over = threading.Event()  # ends what hangs

    def start(self) -> None:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def fail(self, method: str, path: str, status: int | str, times: int = 1, **details: Any) -> None:
        """See `Fault`."""
        self.faults.append(Fault(method, path, status, times, **details))

    def add_folder(self, repo_id: str, folder: str | Path, kind: str = "models") -> str:
        """Put a folder's files into a repository and return the commit."""
        repo = self.repos.setdefault(f"{kind}/{repo_id}", Repo())
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
        return repo.commit(dict(files), "main", "Upload folder")

    def move(self, old: str, new: str, kind: str = "models") -> None:
        """Rename a repository; its former name leads there."""
        self.repos[f"{kind}/{new}"] = self.repos.pop(f"{kind}/{old}")
        self.moved[old] = new

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        repo = self.repos[f"{kind}/{repo_id}"]
        commit = repo.resolve(revision)
        assert commit is not None
        return repo.commits[commit]

    def is_lfs(self, path: str, size: int) -> bool:
        return path.endswith(".safetensors") or size >= self.lfs_from


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a header and its body would else be 40 ms apart
    fault: Fault | None = None

    def log_message(self, *args: Any) -> None:
        pass

    # ------------------------------------------------------------ answering

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.fault is not None and self.fault.status == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.status == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, body, headers | ({"X-Repo-Commit": commit} if commit else {}))

    # ------------------------------------------------------------ requests

    def handle_one_request(self) -> None:
        self.fault = None
        super().handle_one_request()

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _enter(self) -> list[str] | None:
        """The parts of the path; None where the request is answered already, or never will be."""
        raw = urlsplit(self.path).path
        path = unquote(raw)
        self.hub.requests.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = next(
            (f for f in self.hub.faults if f.times > 0 and f.method in ("", self.command) and f.path in path), None
        )
        if self.fault is not None:
            self.fault.times -= 1
        if self.hub.down:
            self._send(503)
        elif self.fault is not None and isinstance(self.fault.status, int):
            self._send(self.fault.status, self.fault.body, self.fault.headers)
        elif self.fault is not None and self.fault.status in ("drop", "hang"):
            if self.fault.status == "hang" and not self.hub.over.wait(20) and self._still_there():
                self.hub.waited_out += 1
            self.close_connection = True
        elif self.headers.get("Authorization") is not None and not self._authorised():
            self._error(401, "", "Invalid credentials in Authorization header")
        else:
            parts = [unquote(part) for part in raw.split("/") if part]
            old = next((name for name in self.hub.moved if f"/{name}/" in f"{path}/"), None)
            if old is None:
                return parts
            query = urlsplit(self.path).query
            self._send(307, headers={"Location": raw.replace(old, self.hub.moved[old]) + (query and f"?{query}")})
        return None

    def _still_there(self) -> bool:
        """Whether the client has not closed the connection."""
        with contextlib.suppress(BlockingIOError):
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        return True

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repo(self, kind: str, repo_id: str, to_write: bool = False) -> Repo | None:
        repo = self.hub.repos.get(f"{kind}/{repo_id}")
        if repo is None or (repo.private and not self._authorised()):
            self._error(404 if self._authorised() else 401, "RepoNotFound", "Repository not found")
        elif repo.disabled:
            self._error(403, "", "Access to this resource is disabled.")
        elif to_write and repo_id.split("/")[0] in self.hub.read_only:
            self._error(403, "", "Forbidden: you must have write access")
        else:
            return repo
        return None

    def _get(self) -> None:
        parts = self._enter()
        if parts is None:
            return
        if parts[:1] == ["api"]:
            if parts[1] == "whoami-v2":
                known = self._authorised()
                self._json({"name": self.hub.user, "type": "user", "orgs": []} if known else {}, 200 if known else 401)
                return
            self._api(parts[1], "/".join(parts[2:4]), parts[4:])
            return
        kind = "models"
        if parts[0] == "datasets":
            kind, parts = "datasets", parts[1:]
        if len(parts) >= 5 and parts[2] in ("resolve", "raw"):
            self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            return
        self._error(404, "EntryNotFound", "Not found")

    def _api(self, kind: str, repo_id: str, rest: list[str]) -> None:
        repo = self._repo(kind, repo_id)
        if repo is None:
            return
        revision = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree", "commits") else "main"
        commit = repo.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", "Invalid rev id")
        elif rest[:1] == ["tree"]:
            self._json(self._tree(repo.commits[commit], "/".join(rest[2:])))
        elif rest[:1] == ["commits"]:
            date = "2026-01-01T00:00:00.000Z"
            self._json([{"id": commit, "title": repo.titles[commit], "message": "", "date": date, "authors": []}])
        elif rest[:1] == ["refs"]:
            named = {name: oid for name, oid in repo.refs.items() if not name.startswith("refs/")}
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in named.items()]
            tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
            pulls = [{"name": n, "ref": n, "targetCommit": c} for n, c in repo.refs.items() if n.startswith("refs/pr/")]
            asked = {"pullRequests": pulls} if "include_prs" in self.path else {}
            self._json({"branches": branches, "converts": [], "tags": tags, **asked})
        else:
            files = [{"rfilename": path} for path in repo.commits[commit]]
            self._json(
                {"id": repo_id, "modelId": repo_id, "sha": commit, "private": repo.private, "siblings": files,
                 "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
            )  # fmt: skip

    def _tree(self, files: dict[str, bytes], under: str) -> list[dict[str, Any]]:
        """Files below a folder, and the folders among them; only those right below it unless the client says so."""
        deep = "recursive=true" in urlsplit(self.path).query.lower()
        start = f"{under}/" if under else ""
        inside = {path: content for path, content in files.items() if path.startswith(start)}
        folders = {str(above) for path in inside for above in PurePosixPath(path).parents if str(above) != "."}
        found = [self._entry(path, content) for path, content in inside.items()]
        found += [
            {"type": "directory", "path": folder, "size": 0, "oid": hashlib.sha1(folder.encode()).hexdigest()}
            for folder in sorted(folders) if folder.startswith(start)
        ]  # fmt: skip
        return [entry for entry in found if deep or "/" not in entry["path"].removeprefix(start)]

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}

    def _file(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(kind, repo_id)
        if repo is None:
            return
        if repo.gated and not self._authorised():
            self._error(403, "GatedRepo", "Access to this model is restricted")
            return
        commit = repo.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", "Invalid rev id")
        elif path not in repo.commits[commit]:
            self._error(404, "EntryNotFound", "Entry not found", commit)
        else:
            content = repo.commits[commit][path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{git_oid(content)}"', "Accept-Ranges": "bytes"}
            ranged = self.headers.get("Range", "")
            if ranged.startswith("bytes="):
                first, _, last = ranged.removeprefix("bytes=").partition("-")
                start, stop = int(first or 0), int(last) + 1 if last else len(content)
                headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
                self._send(206, content[start:stop], headers)
            else:
                self._send(200, content, headers)

    def do_PUT(self) -> None:
        parts = self._enter()
        if parts is None:
            return
        oid, number = parts[1], int(parts[2]) if len(parts) > 2 else 0
        self.hub.sent.append(oid)
        if number:
            self.hub.objects[f"{oid}/{number}"] = self.body
        else:
            self.hub.objects[oid] = self.body
        self._send(200, headers={"ETag": f'"{len(self.body)}"'})

    def do_POST(self) -> None:
        parts = self._enter()
        if parts is None:
            return
        if parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif len(parts) > 4 and parts[4] == "paths-info":
            self._paths_info(parts, self.body)
        elif parts[0] == "lfs":  # a signed address, which needs no token
            self._lfs_complete(parts[1])
        elif not self._authorised():
            self._error(401, "Unauthorized", "Invalid username or password.")
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(self.body))
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._lfs_batch(json.loads(self.body)["objects"])
        elif parts[4:5] == ["preupload"]:
            self._preupload(parts)
        elif parts[4:5] == ["commit"]:
            self._commit(parts)
        elif parts[4:5] in (["branch"], ["tag"]):
            self._name(parts)
        else:
            self._error(404, "EntryNotFound", f"POST {parts}")

    def _name(self, parts: list[str]) -> None:
        repo = self._repo(parts[1], "/".join(parts[2:4]), to_write=True)
        if repo is None:
            return
        if parts[4] == "tag":
            repo.tags[json.loads(self.body)["tag"]] = str(repo.resolve(parts[5]))
        elif parts[5].startswith("refs/"):
            self._error(400, "", "Invalid reference name")
            return
        else:
            repo.refs.setdefault(parts[5], repo.refs["main"])
        self._json({})

    def _preupload(self, parts: list[str]) -> None:
        repo = self._repo(parts[1], "/".join(parts[2:4]))
        if repo is None:
            return
        there = repo.commits.get(repo.resolve(parts[5]) or "", {})
        answers = []
        for wanted in json.loads(self.body)["files"]:
            lfs, content = self.hub.is_lfs(wanted["path"], wanted["size"]), there.get(wanted["path"])
            answer = {"path": wanted["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if content is not None:
                answer["oid"] = hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
            answers.append(answer)
        self._json({"files": answers})

    # ------------------------------------------------------------ large files

    def _lfs_batch(self, wanted: list[dict[str, Any]]) -> None:
        answers = []
        for item in wanted:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                href, header = f"{self.hub.url}/lfs/{item['oid']}", {}
                if self.hub.part_size:
                    parts = -(-item["size"] // self.hub.part_size)
                    header = {str(n): f"{href}/{n}" for n in range(1, parts + 1)}
                    header["chunk_size"] = str(self.hub.part_size)
                answer["actions"] = {"upload": {"href": href, "header": header}}
            answers.append(answer)
        self._send(200, json.dumps({"transfer": "basic", "objects": answers}).encode())

    def _lfs_complete(self, oid: str) -> None:
        parts = sorted(part["partNumber"] for part in json.loads(self.body)["parts"])
        self.hub.objects[oid] = b"".join(self.hub.objects[f"{oid}/{number}"] for number in parts)
        self._json({})

    # ------------------------------------------------------------ contents

    def _paths_info(self, parts: list[str], body: bytes) -> None:
        repo = self._repo(parts[1], "/".join(parts[2:4]))
        if repo is None:
            return
        commit = repo.resolve(parts[5])
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            wanted = [value for key, value in parse_qsl(body.decode()) if key == "paths"]
        found = []
        for path in [wanted] if isinstance(wanted, str) else wanted:
            if path in repo.commits[str(commit)]:
                found.append(self._entry(path, repo.commits[str(commit)][path]))
            elif any(name.startswith(f"{path.rstrip('/')}/") for name in repo.commits[str(commit)]):
                found.append({"type": "directory", "path": path, "oid": "0" * 40})
        self._json(found)

    def _create(self, wanted: dict[str, Any]) -> None:
        kind, owner = f"{wanted.get('type') or 'model'}s", wanted.get("organization") or self.hub.user
        repo_id = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if owner in self.hub.read_only:
            self._error(403, "", "You don't have the rights to create a model under this namespace")
        elif f"{kind}/{repo_id}" in self.hub.repos:
            self._json({**url, "error": "You already created this model repo"}, 409)
        else:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repos[f"{kind}/{repo_id}"] = Repo(private)
            self._json(url)

    def _commit(self, parts: list[str]) -> None:
        branch, pr = parts[5], "create_pr=1" in self.path
        repo = self._repo(parts[1], "/".join(parts[2:4]), to_write=not pr)
        if repo is None:
            return
        changes: dict[str, bytes | None] = {}
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message, parent = value["summary"], value.get("parentCommit")
                if parent is not None and not pr and parent != repo.refs[branch]:
                    self._error(412, "", "A commit has happened since. Please refresh and try again.")
                    return
            elif item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changes[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                changes[value["path"]] = None
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        oid = repo.commit(changes, f"refs/pr/{number}" if pr else branch, message)
        url = f"{self.hub.url}/{quote('/'.join(parts[2:4]))}"
        answer = {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "success": True}
        self._json(answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if pr else {}))
