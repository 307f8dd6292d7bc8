"""A TCP proxy in front of an HTTP server that counts requests and can make the answers slow."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


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
            server = socket.create_connection(self._upstream)
            for target, source, sink in ((self._requests, client, server), (self._answers, server, client)):
                threading.Thread(target=target, args=(source, sink), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        for block in _blocks(client, server):
            self.seen += [found.decode() for found in re.findall(rb"(?:GET|HEAD|PUT|POST) /\S*", block)]
            server.sendall(block)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        for block in _blocks(server, client):
            time.sleep(len(block) / self._bytes_per_second)
            client.sendall(block)


def _blocks(source: socket.socket, sink: socket.socket) -> Iterator[bytes]:
    try:
        while block := source.recv(65536):
            yield block
    except OSError:
        pass
    finally:
        source.close()
        sink.close()


@contextmanager
def watched_proxy(endpoint: str, bytes_per_second: float = 1e9) -> Iterator[WatchedProxy]:
    """Put a proxy in front of the server at `endpoint` (http://host:port)."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    proxy = WatchedProxy((host, int(port)), bytes_per_second)
    try:
        yield proxy
    finally:
        proxy.close()
