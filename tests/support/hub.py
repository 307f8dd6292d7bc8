"""A local server with the endpoints of the Hugging Face Hub that its clients request: datasets and models, read and pushed.

Large files are sent with Git LFS. Clients must set HF_HUB_DISABLE_XET, since Xet needs a server of its own.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

COMMIT = "a" * 40
TOKEN = "hf_" + "t" * 34
"""The token with which the server accepts pushes."""
_LFS_SUFFIXES = (".safetensors", ".gguf")


@dataclass
class Repository:
    """The files of a repository."""

    files: dict[str, bytes]
    is_private: bool = False
    commits: list[str] = field(default_factory=list)
    """Messages of the commits."""
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Id of each earlier commit -> its files."""
    sizes: dict[str, int] = field(default_factory=dict)
    """File -> the size that is stated of it, where it is not that of its content."""

    @property
    def sha(self) -> str:
        """The id of the latest commit."""
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest() if self.commits else COMMIT

    def commit(self, files: Mapping[str, bytes], message: str) -> None:
        """Add a commit that writes these files."""
        self.history[self.sha] = dict(self.files)
        self.files |= files
        self.commits.append(message)

    def at(self, revision: str | None) -> tuple[str, dict[str, bytes]]:
        """Return the id and the files of a commit; of the latest one for a branch."""
        return (revision, self.history[revision]) if revision in self.history else (self.sha, self.files)


@dataclass
class Hub:
    """The state of the server."""

    endpoint: str
    """The value of HF_ENDPOINT."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By `models/ORG/NAME` or `datasets/ORG/NAME`."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by the SHA-256 of their content."""
    broken: str | None = None
    """A part of the paths of requests that the server answers with an error."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request."""

    def variables(self, cache: Any) -> dict[str, str]:
        """Return the environment of a client with the token.

        Args:
            cache: Directory of its cache.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def handle_request(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.hub.broken and self.hub.broken in path:
            self.reply(b'{"error": "broken"}', status=400)
            return
        for pattern, handler in self.routes.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                handler(self, body, *found.groups())
                return
        self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, content: Any, status: int = 200) -> None:
        self.reply(json.dumps(content).encode(), status, Content_Type="application/json")

    def missing(self, code: str) -> None:
        self.reply(b"", 404, X_Error_Code=code)

    def is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, key: str) -> Repository | None:
        """Return a repository that the client may read; otherwise answer the request."""
        found = self.hub.repositories.get(key)
        if found is None or (found.is_private and not self.is_authorized()):
            self.missing("RepoNotFound")
            return None
        return found

    def pushed(self, name: str) -> Repository | None:
        """Return a model repository that the client may write; otherwise answer the request."""
        if not self.is_authorized():
            self.reply_json({"error": "Invalid username or password."}, 401)
            return None
        return self.repository(f"models/{name}")

    # --- Reading ---

    def info(self, _body: bytes, key: str, revision: str | None) -> None:
        if found := self.repository(key):
            sha, files = found.at(revision)
            siblings = [{"rfilename": file} for file in files]
            name = key.partition("/")[2]
            self.reply_json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": sha,
                    "siblings": siblings,
                    "private": found.is_private,
                }
            )

    def tree(self, _body: bytes, key: str, revision: str) -> None:
        if found := self.repository(key):
            self.reply_json(
                [
                    {"type": "file", "path": file, "size": len(content), "oid": etag(content)}
                    for file, content in found.at(revision)[1].items()
                ]
            )

    def resolve(self, _body: bytes, kind: str | None, name: str, revision: str, file: str) -> None:
        found = self.repository(f"{kind or 'models/'}{name}")
        if found is None:
            return
        sha, files = found.at(revision)
        if file not in files:
            self.missing("EntryNotFound")
            return
        content = files[file]
        headers = {"ETag": f'"{etag(content)}"', "X_Repo_Commit": sha}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked:
            begin, size = int(asked[1]), len(content)
            content = content[begin : int(asked[2]) + 1]
            headers["Content_Range"] = f"bytes {begin}-{begin + len(content) - 1}/{size}"
        if self.command == "HEAD" and file in found.sizes:
            headers["X_Linked_Size"] = str(found.sizes[file])
        self.reply(content, 206 if asked else 200, **headers)

    # --- Pushing ---

    def whoami(self, _body: bytes) -> None:
        if self.is_authorized():
            self.reply_json({"type": "user", "name": "ann", "auth": {"accessToken": {"role": "write"}}})
        else:
            self.reply_json({"error": "Invalid username or password."}, 401)

    def create(self, body: bytes) -> None:
        if not self.is_authorized():
            self.reply_json({"error": "Invalid username or password."}, 401)
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
        if f"models/{name}" in self.hub.repositories:
            self.reply_json(
                {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}, 409
            )
            return
        is_private = asked.get("visibility") == "private"
        self.hub.repositories[f"models/{name}"] = Repository({}, is_private)
        self.reply_json({"url": f"{self.hub.endpoint}/{name}"})

    def validate_card(self, body: bytes) -> None:
        """Answer as the Hub does to a base model that is not the id of a repository."""
        base = re.search(r"^base_model: (.*)$", json.loads(body)["content"], re.MULTILINE)
        if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1]):
            message = (
                f'"base_model" with value "{base[1]}" is not valid. Use a model id from https://hf.co/models.'
            )
            self.reply_json({"errors": [{"message": message}], "warnings": []}, 400)
        else:
            self.reply_json({"errors": [], "warnings": []})

    def upload_modes(self, body: bytes, name: str, _revision: str) -> None:
        if found := self.pushed(name):
            files = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular"
                answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                content = found.files.get(file["path"])
                if content is not None:
                    answer["oid"] = hashlib.sha256(content).hexdigest() if mode == "lfs" else git_id(content)
                files.append(answer)
            self.reply_json({"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        if self.pushed(name) is None:
            return
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}
            objects.append(answer)
        self.reply_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.reply(b"")

    def commit(self, body: bytes, name: str, _revision: str) -> None:
        found = self.pushed(name)
        if found is None:
            return
        header, *operations = map(json.loads, body.splitlines())
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        found.commit(files, header["value"]["summary"])
        self.reply_json(
            {
                "success": True,
                "commitOid": found.sha,
                "commitUrl": f"{self.hub.endpoint}/{name}/commit/{found.sha}",
            }
        )

    routes = {
        r"GET /api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/([^/]+))?": info,
        r"GET /api/((?:models|datasets)/[^/]+/[^/]+)/tree/([^/]+).*": tree,
        r"(?:GET|HEAD) /(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)": resolve,
        r"GET /api/whoami-v2": whoami,
        r"POST /api/repos/create": create,
        r"POST /api/validate-yaml": validate_card,
        r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": upload_modes,
        r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": lfs_batch,
        r"PUT /lfs/([0-9a-f]+)": lfs_upload,
        r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": commit,
    }

    def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keep requests off standard error."""


def etag(content: bytes) -> str:
    """Return the ETag of a file."""
    return hashlib.sha1(content).hexdigest()


def git_id(content: bytes) -> str:
    """Return the id that Git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run an empty Hub for the duration of the block."""

    class Handler(_Handler):
        pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Handler.hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serve_hub(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve a dataset for the duration of the block and yield the value of HF_ENDPOINT."""
    with running_hub() as hub:
        hub.repositories[f"datasets/{name}"] = Repository(dict(files))
        yield hub.endpoint
