"""A Hugging Face Hub on this machine: what `huggingface_hub` and `datasets` ask of it, kept in memory.

    with HubServer(token="secret") as hub:
        subprocess.run(command, env={**os.environ, **hub.env})

Models and data sets are repositories whose commits stay; their one branch is `main`. Files go up through Git LFS, not
Xet, and come down whole or in ranges of bytes.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """As Git and Git LFS name it."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """Commits, the last one `main`: id -> path -> file."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=lambda: {"0" * 40: {}})

    def resolve(self, revision: str) -> str:
        """The commit that a revision means, `main` or the commit itself."""
        commit = list(self.commits)[-1] if revision == "main" else revision
        if commit not in self.commits:
            raise HubError(404, f"no revision {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str) -> dict[str, File]:
        return self.commits[self.resolve(revision)]

    def commit(self, files: dict[str, File]) -> str:
        tree = [list(self.commits)[-1], *((path, file.oid) for path, file in sorted(files.items()))]
        commit = hashlib.sha1(json.dumps(tree).encode()).hexdigest()
        self.commits[commit] = files
        return commit


class HubError(Exception):
    """What the server answers instead: a status, a message, the Hub's code for what is missing, more for the body."""

    def __init__(self, status: int, message: str, code: str = "", **body: str):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body


class HubServer:
    """Serves from `with` to its end, or from `start` to `stop`.

    Args:
        token: if given, all requests must carry it.
        user: whose token it is.

    Attributes:
        url: the endpoint, once started.
        repos: ("models" or "datasets", "user/name") -> repository.
        requests: ("GET", path) and so on -> how many there were.
    """

    def __init__(self, token: str | None = None, user: str = "user"):
        self.token, self.user = token, user
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.lock = threading.RLock()
        self._failures: list[tuple[int | None, str]] = []

    def start(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_):
        self.stop()

    @property
    def env(self) -> dict[str, str]:
        """The variables that lead a process here."""
        token = {"HF_TOKEN": self.token} if self.token else {}
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **token}

    def fail_next(self, status: int | None, times: int = 1, path: str = ""):
        """The next requests whose path holds `path` get this status; `None` drops their connections."""
        self._failures += [(status, path)] * times

    def files(self, repo_id: str, kind: str = "datasets") -> dict[str, bytes]:
        """What `main` of a repository holds."""
        return {path: file.content for path, file in self.repos[kind, repo_id].files("main").items()}

    def page(self, kind: str, repo_id: str) -> str:
        return f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"

    def take_failure(self, path: str) -> tuple[int | None, str] | None:
        with self.lock:
            failure = next((failure for failure in self._failures if failure[1] in path), None)
            if failure:
                self._failures.remove(failure)
            return failure


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def answer(self):
        url = urlsplit(self.path)
        self.body, self.query, path = self.read_body(), parse_qs(url.query), unquote(url.path)
        try:
            with self.hub.lock:
                self.hub.requests[self.command, path] += 1
                if failure := self.hub.take_failure(path):
                    if failure[0] is None:
                        self.close_connection = True
                        return
                    raise HubError(failure[0], "as the test wants it")
                self.check_token(path)
                for method, pattern, handle in _ROUTES:
                    if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                        return handle(self, **match.groupdict())
                raise HubError(404, f"{self.command} {path} is not served")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self.send_json({"error": str(error), **error.body}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def check_token(self, path: str):
        # LFS gives out addresses that need no token.
        is_checked = self.hub.token and not path.startswith("/lfs-objects/")
        if is_checked and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise HubError(401, "Invalid username or password.")

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status: int = 200, headers: dict[str, str] | None = None):
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def repo(self, kind: str | None, name: str) -> Repo:
        try:
            return self.hub.repos[(kind or "models").rstrip("/"), name]
        except KeyError:
            raise HubError(404, "Repository not found", "RepoNotFound") from None

    def log_message(self, *_):
        pass

    def whoami(self):
        self.send_json({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"type": "access_token"}})

    def validate_card(self):
        self.send_json({"errors": [], "warnings": []})

    def create(self):
        wanted = json.loads(self.body)
        kind, name = f"{wanted.get('type') or 'model'}s", f"{wanted['organization'] or self.hub.user}/{wanted['name']}"
        url = self.hub.page(kind, name)
        if (kind, name) in self.hub.repos:
            raise HubError(409, "You already created this repository", url=url)
        self.hub.repos[kind, name] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.send_json({"url": url})

    def info(self, kind: str, name: str, revision: str | None = None):
        repo = self.repo(kind, name)
        commit = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        self.send_json({"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, kind: str, name: str, revision: str, folder: str = ""):
        entries = _entries(self.repo(kind, name).files(revision))
        prefix, recursive = f"{folder}/" if folder else "", "true" in map(str.lower, self.query.get("recursive", ()))
        inside = [path for path in entries if path.startswith(prefix)]
        if folder and not inside:
            raise HubError(404, f"no folder {folder}", "EntryNotFound")
        self.send_json([entries[path] for path in inside if recursive or "/" not in path[len(prefix) :]])

    def paths_info(self, kind: str, name: str, revision: str):
        entries = _entries(self.repo(kind, name).files(revision))
        wanted = parse_qs(self.body.decode()).get("paths", ())
        self.send_json([entries[path] for path in wanted if path in entries])

    def preupload(self, kind: str, name: str, revision: str):
        present = self.repo(kind, name).files(revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            is_binary = b"\0" in base64.b64decode(file["sample"]) or file["size"] > 10_000_000
            oid = present[file["path"]].oid if file["path"] in present else None
            mode = "lfs" if is_binary else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": answers})

    def lfs_batch(self, kind: str | None, name: str):
        self.repo(kind, name)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.lfs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-objects/{item['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content is another")
        self.hub.lfs[oid] = self.body
        self.send(b"")

    def commit(self, kind: str, name: str, revision: str):
        repo = self.repo(kind, name)
        files = dict(repo.files(revision))
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
                case "lfsFile":
                    if value["oid"] not in self.hub.lfs:
                        raise HubError(400, f"{value['path']} was not uploaded")
                    files[value["path"]] = File(self.hub.lfs[value["oid"]], is_lfs=True)
                case "deletedFile":
                    del files[value["path"]]
        commit = repo.commit(files)
        self.send_json({"commitOid": commit, "commitUrl": f"{self.hub.page(kind, name)}/commit/{commit}"})

    def resolve(self, kind: str | None, name: str, revision: str, file_path: str):
        repo = self.repo(kind, name)
        commit = repo.resolve(revision)
        if file_path not in repo.commits[commit]:
            raise HubError(404, f"no file {file_path}", "EntryNotFound")
        file = repo.commits[commit][file_path]
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            size, start = len(file.content), int(wanted[1])
            end = min(int(wanted[2] or size - 1), size - 1)
            if start >= size:
                raise HubError(416, f"{file_path} has {size} bytes")
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            return self.send(file.content[start : end + 1], 206, headers)
        self.send(file.content, headers=headers)


def _entries(files: dict[str, File]) -> dict[str, dict]:
    """Path -> what the Hub says of the file or folder."""
    entries = {}
    for path, file in files.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            entries[folder] = {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest()}
        entries[path] = {"type": "file", "path": path, "oid": file.oid[:40], "size": len(file.content)}
        if file.is_lfs:
            entries[path]["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
    return entries


_NAME, _API = r"(?P<name>[^/]+/[^/]+)", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", rf"{_API}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/(?P<kind>datasets/)?{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs-objects/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET", rf"/(?P<kind>datasets/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file_path>.+)", _Handler.resolve),
]
