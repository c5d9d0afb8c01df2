"""A stand-in for the Hugging Face Hub on 127.0.0.1, for the real client: downloads and pushes.

It keeps repositories in memory as commits of whole trees, gives large files by a redirect as the
Hub does, takes commits as the Hub does (preupload, LFS batch, PUT, NDJSON), and fails on request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin")


@dataclass
class Repo:
    """One repository: its refs point at commits, and a commit is a mapping of paths to contents."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files, message="initial", ref="main"):
        """Make a commit of a whole tree; return its hash."""
        parts = [f"{path}:{hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        text = "\n".join([*parts, message, str(len(self.commits))])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    @property
    def files(self):
        """The tree of the main branch."""
        return self.commits[self.refs["main"]] if "main" in self.refs else {}


@dataclass
class Failure:
    """What goes wrong, for requests whose `METHOD /path` has the pattern."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, then the connection breaks
    times: int = 10**9
    body: str = ""


class Hub:
    """The server; a context manager.

    `repos` and `tokens` (token -> name, role) say what there is; `requests` what was asked.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, dict[str, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.cdn = f"http://localhost:{self._server.server_port}"  # another host, as the Hub's is
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, repo, folder, **settings):
        """Make a repository of a folder's files; return it."""
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        self.repos[repo] = Repo(**settings)
        self.repos[repo].commit(files)
        return self.repos[repo]

    def fail(self, pattern, status=0, **more):
        """Let requests fail from now on."""
        self.failures.append(Failure(pattern, status, **more))

    def count(self, pattern):
        """How many requests had the pattern."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        pass

    def _any(self):
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        said = f"{self.command} {self.route}"
        if "Range" in self.headers:
            said += f" [{self.headers['Range']}]"
        with self.hub.lock:
            self.hub.requests.append(said)
            self.cut_after, failure = None, None
            for each in self.hub.failures:
                if each.times and re.search(each.pattern, said):
                    each.times -= 1
                    failure = each
                    break
        if failure and failure.status:
            return self._send(failure.status, failure.body.encode(), failure.headers)
        self.cut_after = failure.cut_after if failure else None
        for pattern, handler in _ROUTES:
            if match := re.fullmatch(pattern, said.split(" [")[0]):
                return handler(self, *match.groups())
        return self._send(404, b"")

    do_GET = do_HEAD = do_POST = do_PUT = _any  # noqa: N815

    def _send(self, status, body=b"", headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut_after is not None:
            self.wfile.write(body[: self.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code="", message=""):
        headers = {"X-Error-Code": code} if code else {}
        if message:
            headers["X-Error-Message"] = message
        self._send(status, json.dumps({"error": message}).encode(), headers)

    @property
    def user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.tokens.get(token)

    def _repo(self, name, revision="main", *, content=False):
        """(repository, commit), or None once an error was sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.user):
            # The Hub does not tell strangers what is there.
            self._error(404 if self.user else 401, "RepoNotFound", "Repository not found")
        elif content and repo.gated and not (self.user or {}).get("granted"):
            why = f"Access to model {name} is restricted."
            self._error(403 if self.user else 401, "GatedRepo", why)
        elif (commit := repo.refs.get(revision, revision)) not in repo.commits and repo.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo, commit
        return None

    def info(self, name, revision="main"):
        if found := self._repo(name, revision):
            repo, commit = found
            siblings = [{"rfilename": path} for path in repo.commits.get(commit, {})]
            about = {"id": name, "modelId": name, "sha": commit, "tags": [], "siblings": siblings}
            self._json(about | {"private": repo.private, "gated": repo.gated})

    def tree(self, name, revision):
        if found := self._repo(name, revision):
            self._json([_entry(path, data) for path, data in found[0].commits[found[1]].items()])

    def resolve(self, name, revision, path):
        if not (found := self._repo(name, revision, content=True)):
            return
        repo, commit = found
        data = repo.commits[commit].get(path)
        if data is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": commit}
        if path.endswith(LARGE):
            sha = hashlib.sha256(data).hexdigest()
            self.hub.blobs[sha] = data
            headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
            headers["Location"] = f"{self.hub.cdn}/cdn/{sha}"
            self._send(302, b"", headers)
        else:
            self._give(data, headers | {"ETag": f'"{_git_hash(data)}"'})

    def cdn(self, sha):
        if "Authorization" in self.headers:
            self._error(400, "", "a token was given to a stranger")
            return
        self._give(self.hub.blobs[sha], {"ETag": f'"{sha}"'})

    def _give(self, data, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not wanted:
            self._send(200, data, headers)
            return
        start = int(wanted[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206, data[start:], headers)

    def whoami(self):
        if not self.user:
            self._error(401, "", "Invalid credentials in Authorization header")
            return
        token = {"displayName": "test", "role": self.user["role"]}
        self._json(
            {"type": "user", "name": self.user["name"], "auth": {"accessToken": token}, "orgs": []}
        )

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or (self.user or {}).get("name")
        name = f"{owner}/{wanted['name']}"
        if not self._may_write(name):
            return
        if name in self.hub.repos:
            self._json(
                {"error": "You already created this model repo", "url": self._page(name)}, 409
            )
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[name] = Repo(private=private)
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs"})
        self._json({"url": self._page(name)})

    def _page(self, name):
        return f"{self.hub.url}/{name}"

    def _may_write(self, name):
        if not self.user:
            self._error(401, "", "Invalid credentials in Authorization header")
        elif self.user["name"] != name.split("/")[0] or self.user["role"] != "write":
            owner = name.split("/")[0]
            why = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            self._error(403, "", why)
        else:
            return True
        return False

    def validate(self):
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            self._json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
            return
        self._json({"errors": [], "warnings": []})

    def preupload(self, name, revision):
        if not self._may_write(name):
            return
        known = self.hub.repos[name].files
        self._json(
            {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": _oid(each["path"], known.get(each["path"])),
                    }
                    for each in json.loads(self.body)["files"]
                ]
            }
        )

    def batch(self, name):
        answer = []
        for each in json.loads(self.body)["objects"]:
            known = each["oid"] in self.hub.blobs
            href = {"href": f"{self.hub.url}/lfs/{each['oid']}"}
            answer.append({**each, **({} if known else {"actions": {"upload": href}})})
        self._json({"transfer": "basic", "objects": answer})

    def put(self, sha):
        if hashlib.sha256(self.body).hexdigest() != sha:
            self._error(400, "", "wrong content")
            return
        self.hub.blobs[sha] = self.body
        self._send(200)

    def commit(self, name, revision):
        if not self._may_write(name):
            return
        repo, message = self.hub.repos[name], ""
        files = dict(repo.files)
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, message, revision)
        url = f"{self._page(name)}/commit/{sha}"
        self._json({"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)/?", _Handler.tree),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(\w+)", _Handler.put),
    (r"(?:GET|HEAD) /cdn/(\w+)", _Handler.cdn),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def _git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(path, data):
    if data is None:
        return None
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else _git_hash(data)


def _entry(path, data):
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
    if path.endswith(LARGE):
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
    return entry
