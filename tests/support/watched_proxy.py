"""A TCP proxy in front of an HTTP server that counts requests and can make the answers slow."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class WatchedProxy:
    """Listens at `endpoint`; `seen` holds one "METHOD /path" for each request that went through."""

    def __init__(self, upstream: tuple[str, int], bytes_per_second: float):
        self.seen: list[str] = []
        self._upstream = upstream
        self._bytes_per_second = bytes_per_second
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def bodies_sent(self, bucket: str) -> list[str]:
        """The GET requests for objects: not for listings."""
        return [line for line in self.seen if line.startswith(f"GET /{bucket}/") and "list-type" not in line]

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server:
            answers = threading.Thread(target=self._pump, args=(server, client, self._wait), daemon=True)
            answers.start()
            self._pump(client, server, self._note)
            answers.join()

    def _note(self, block: bytes) -> None:
        self.seen += [found.decode() for found in re.findall(rb"(?:GET|HEAD|PUT|POST) /\S*", block)]

    def _wait(self, block: bytes) -> None:
        time.sleep(len(block) / self._bytes_per_second)

    def _pump(self, source: socket.socket, sink: socket.socket, before: Callable[[bytes], None]) -> None:
        with suppress(OSError):  # either side may go at any time
            while block := source.recv(65536):
                before(block)
                sink.sendall(block)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def watched_proxy(endpoint: str, bytes_per_second: float = 1e9) -> Iterator[WatchedProxy]:
    """Put a proxy in front of the server at `endpoint` (http://host:port)."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    proxy = WatchedProxy((host, int(port)), bytes_per_second)
    try:
        yield proxy
    finally:
        proxy.close()
