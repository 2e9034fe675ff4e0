"""A small server that speaks enough of the Hub's protocol for the real `huggingface_hub` client, in memory.

Repositories of models and datasets: create, preupload, commit, list, resolve; revisions, branches, private repositories
and gated ones, with the Hub's own error codes. Every upload is a regular (not LFS) one, so no other service is met.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit


class Repo:
    """Commits of one repository: revision name to commit, commit to files."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.gated = False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit({}, "main", "initial commit")

    def commit(self, changes: dict[str, bytes | None], branch: str, message: str) -> str:
        files = dict(self.commits.get(self.refs.get(branch, self.refs.get("main", "")), {}))
        for path, content in changes.items():
            if content is None:
                files.pop(path, None)
            else:
                files[path] = content
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message}".encode()).hexdigest()
        self.commits[oid], self.refs[branch] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer:
    """Run with `start()`; `url` is the endpoint. `requests` records (method, path) pairs."""

    token = "hf_local_test_token"
    user = "tester"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}  # "models/user/name" or "datasets/user/name"
        self.requests: list[tuple[str, str]] = []
        self.down = False
        server = self

        class Handler(_Handler):
            hub = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def add_folder(self, repo_id: str, folder: str | Path, kind: str = "models") -> str:
        """Put a folder's files into a repository and return the commit."""
        repo = self.repos.setdefault(f"{kind}/{repo_id}", Repo())
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
        return repo.commit(dict(files), "main", "Upload folder")

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        repo = self.repos[f"{kind}/{repo_id}"]
        commit = repo.resolve(revision)
        assert commit is not None
        return repo.commits[commit]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    # ------------------------------------------------------------ answering

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {"X-Error-Code": code, "X-Error-Message": message})

    # ------------------------------------------------------------ requests

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _enter(self) -> list[str] | None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.down:
            self._send(503)
            return None
        return [part for part in path.split("/") if part]

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repo(self, kind: str, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(f"{kind}/{repo_id}")
        if repo is None or (repo.private and not self._authorised()):
            self._error(401 if repo is None and not self._authorised() else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

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
        revision = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree") else "main"
        commit = repo.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", "Invalid rev id")
        elif rest[:1] == ["tree"]:
            self._json(self._tree(repo.commits[commit], "/".join(rest[2:])))
        elif rest[:1] == ["refs"]:
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.refs.items()]
            self._json({"branches": branches, "converts": [], "tags": []})
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
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

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
            self._error(404, "EntryNotFound", "Entry not found")
        else:
            content = repo.commits[commit][path]
            etag = hashlib.sha1(content).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            ranged = self.headers.get("Range", "")
            if ranged.startswith("bytes="):
                first, _, last = ranged.removeprefix("bytes=").partition("-")
                start, stop = int(first or 0), int(last) + 1 if last else len(content)
                headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
                self._send(206, content[start:stop], headers)
            else:
                self._send(200, content, headers)

    def do_POST(self) -> None:
        parts = self._enter()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if parts is None:
            return
        if parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif len(parts) > 4 and parts[4] == "paths-info":
            self._paths_info(parts, body)
        elif not self._authorised():
            self._error(401, "Unauthorized", "Invalid username or password.")
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[4:5] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif parts[4:5] == ["commit"]:
            self._commit(parts, body)
        elif parts[4:5] == ["branch"]:
            repo = self._repo(parts[1], "/".join(parts[2:4]))
            if repo is not None:
                repo.refs.setdefault(parts[5], repo.refs["main"])
                self._json({})
        else:
            self._error(404, "EntryNotFound", f"POST {parts}")

    def _paths_info(self, parts: list[str], body: bytes) -> None:
        repo = self._repo(parts[1], "/".join(parts[2:4]))
        if repo is None:
            return
        commit = repo.resolve(parts[5])
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            wanted = [
                unquote(pair.split("=", 1)[1].replace("+", " "))
                for pair in body.decode().split("&")
                if pair.startswith("paths=")
            ]
        found = []
        for path in [wanted] if isinstance(wanted, str) else wanted:
            if path in repo.commits[str(commit)]:
                found.append(self._entry(path, repo.commits[str(commit)][path]))
            elif any(name.startswith(f"{path.rstrip('/')}/") for name in repo.commits[str(commit)]):
                found.append({"type": "directory", "path": path, "oid": "0" * 40})
        self._json(found)

    def _create(self, wanted: dict[str, Any]) -> None:
        kind = f"{wanted.get('type') or 'model'}s"
        repo_id = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if f"{kind}/{repo_id}" in self.hub.repos:
            self._json({**url, "error": "You already created this model repo"}, 409)
            return
        self.hub.repos[f"{kind}/{repo_id}"] = Repo(bool(wanted.get("private")) or wanted.get("visibility") == "private")
        self._json(url)

    def _commit(self, parts: list[str], body: bytes) -> None:
        repo = self._repo(parts[1], "/".join(parts[2:4]))
        if repo is None:
            return
        changes: dict[str, bytes | None] = {}
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                message = item["value"]["summary"]
            elif item["key"] == "file":
                changes[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "deletedFile":
                changes[item["value"]["path"]] = None
        branch, pr = parts[5], "create_pr=1" in self.path
        branch = f"refs/pr/{len(repo.refs)}" if pr else branch
        oid = repo.commit(changes, branch, message)
        url = f"{self.hub.url}/{'/'.join(parts[2:4])}"
        answer = {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "success": True}
        self._json(answer | ({"pullRequestUrl": f"{url}/discussions/1"} if pr else {}))
