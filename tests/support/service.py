"""A service of the tests: its YAML, and its API on a real server and a real bucket, without Ray."""

import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import uvicorn
import yaml

from service.api import create_app
from service.config import LoadedService
from service.keys import create_key
from utils.storage.s3 import S3Store

CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}]}
TINY = {"device": "cpu", "dtype": "fp32", "gradient_checkpointing": False, "max_failures": 3}


def write_service(
    directory: Path,
    storage: str,
    model: str = "s3://anneal/no/model",
    base: dict[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """Write a service YAML with one base model, `tiny`, and return its path.

    Args:
        directory: Directory for the YAMLs.
        storage: The service's storage path.
        model: The base model's weights.
        base: More keys of the base model's YAML.
        keys: More keys of the service YAML.
    """
    training = {
        "model_id": model,
        "train_path": "unused.jsonl",
        "lora_config": {"r": 4},
        **TINY,
        **(base or {}),
    }
    (directory / "base.yaml").write_text(yaml.safe_dump(training))
    path = directory / "service.yaml"
    path.write_text(
        yaml.safe_dump({"storage_path": storage, "models": {"tiny": {"config": "base.yaml"}}, **keys})
    )
    return path


class Api:
    """A client of the API with one key."""

    def __init__(self, url: str, key: str):
        self.url, self.key = url, key
        self._session = threading.local()

    def request(self, method: str, path: str, **options: Any) -> Any:
        """Send a request and return the response."""
        headers = {"Authorization": f"Bearer {self.key}"} | options.pop("headers", {})
        session = self._session.__dict__.setdefault("session", requests.Session())
        return session.request(method, f"{self.url}{path}", headers=headers, timeout=60, **options)

    def get(self, path: str, status: int = 200, **options: Any) -> Any:
        """Return the JSON of an answer, which must have this status."""
        return self._json("GET", path, status, options)

    def post(self, path: str, body: Any = None, status: int = 200, **options: Any) -> Any:
        """Post JSON; see `get`."""
        return self._json("POST", path, status, options | ({"json": body} if body is not None else {}))

    def delete(self, path: str, status: int = 200) -> Any:
        """Send a DELETE request; see `get`."""
        return self._json("DELETE", path, status, {})

    def upload(self, content: bytes, purpose: str = "fine-tune", status: int = 200) -> Any:
        """Upload a file; see `get`."""
        options = {"data": {"purpose": purpose}, "files": {"file": ("rows.jsonl", content)}}
        return self._json("POST", "/v1/files", status, options)

    def create_job(self, file_id: str, headers: dict[str, str] | None = None, **keys: Any) -> Any:
        """Create a job; see `get`."""
        body = {"model": "tiny", "training_file": file_id, **keys}
        return self.post("/v1/fine_tuning/jobs", body, headers=headers or {})

    def _json(self, method: str, path: str, status: int, options: dict[str, Any]) -> Any:
        answer = self.request(method, path, **options)
        assert answer.status_code == status, answer.text
        if status >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.json()


def rows(*chats: Any) -> bytes:
    """Return rows as JSONL."""
    return "".join(json.dumps(chat) + "\n" for chat in chats or (CHAT,)).encode()


@contextmanager
def running_api(
    service: LoadedService, projects: Sequence[str] = ("red",), handles: Mapping[str, Any] | None = None
) -> Iterator[list[Api]]:
    """Serve the API within the block; yield a client of each project.

    Args:
        service: The service YAML.
        projects: Names of the projects.
        handles: Base model -> handle of its engine; None: no engines.
    """
    store = S3Store(service.config.storage_path)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # a request before the server runs waits
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            create_app(service, handles or {}), log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield [Api(url, create_key(store, project)) for project in projects]
        finally:
            server.should_exit = True
            thread.join()
