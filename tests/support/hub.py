"""A local server for one dataset, with the endpoints of the Hugging Face Hub that its clients request."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

COMMIT = "a" * 40


@contextmanager
def serve_hub(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve a dataset for the duration of the block and yield the value of HF_ENDPOINT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path in (f"/api/datasets/{name}", f"/api/datasets/{name}/revision/{COMMIT}"):
                self.reply(
                    json.dumps(
                        {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                    )
                )
            elif path.startswith(f"/api/datasets/{name}/tree/{COMMIT}"):
                self.reply(
                    json.dumps(
                        [
                            {"type": "file", "path": file, "size": len(files[file]), "oid": etag(file)}
                            for file in files
                        ]
                    )
                )
            elif (file := path.removeprefix(f"/datasets/{name}/resolve/{COMMIT}/")) in files:
                self.reply(files[file], ETag=f'"{etag(file)}"')
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def reply(self, content: str | bytes, **headers: str) -> None:
            body = content if isinstance(content, bytes) else content.encode()
            self.send_response(200)
            for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep requests off standard error."""

    def etag(file: str) -> str:
        return hashlib.sha1(files[file]).hexdigest()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
