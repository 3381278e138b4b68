"""A server on this machine that speaks the part of the Hugging Face hub's API that its client uses:
repositories with revisions, ranges, gates, and a line that can be cut.
"""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/?]+))?")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>[^?]+)")


class Hub:
    """Repositories by name: commits in their order, each with its files."""

    def __init__(self):
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str, str | None]] = []
        """(method, path, range) of each request"""
        self.cut_after: int | None = None
        """bytes of the next file that is sent, after which the line is cut; once"""
        handler = type("Answer", (Answer,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, repository: str, folder: Path) -> str:
        """Put the files of `folder` on top of a repository, and return the new commit's hash."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
        digest = hashlib.sha1(repr(sorted((k, sha256(v)) for k, v in files.items())).encode())
        self.commits.setdefault(repository, {})[digest.hexdigest()] = files
        return digest.hexdigest()

    def find(self, repository: str, revision: str | None) -> str | None:
        """Return the commit of a revision: its hash, or `main` for the newest."""
        known = list(self.commits[repository])
        if revision in (None, "main"):
            return known[-1]
        return revision if revision in known else None

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.hub.asked.append((self.command, self.path, self.headers.get("Range")))
        found = INFO.match(self.path) or FILE.match(self.path)
        if found is None or found["repo"] not in self.hub.commits:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if found["repo"] in self.hub.gated and found.re is FILE:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        commit = self.hub.find(found["repo"], found["revision"])
        if commit is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = self.hub.commits[found["repo"]][commit]
        if found.re is INFO:
            siblings = [{"rfilename": name} for name in files]
            info = {"id": found["repo"], "sha": commit, "siblings": siblings, "private": False}
            return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        if found["name"] not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", commit)
        return self.file(files[found["name"]], commit)

    def file(self, content: bytes, commit: str):
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{sha256(content)}"',
            "Accept-Ranges": "bytes",
        }
        begun = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if begun is None:
            return self.send(200, content, headers)
        start, whole = int(begun[1]), len(content)
        headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        return self.send(206, content[start:], headers)

    def refuse(self, status: int, code: str, message: str, commit: str | None = None):
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.send(status, b"", headers | ({"X-Repo-Commit": commit} if commit else {}))

    def send(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            if self.hub.cut_after is not None and len(content) > self.hub.cut_after:
                content, self.hub.cut_after = content[: self.hub.cut_after], None
                self.close_connection = True
            self.wfile.write(content)

    def log_message(self, *_):
        pass
