"""A proxy in front of an S3 server that counts requests and bytes, slows them down and injects faults.

The kernel copies bodies from socket to socket and paces them, so that one Python process keeps up with many fast connections.
The rate limit applies to each connection in each direction. The latency is one round trip: it applies once to each connection,
once to each request, and once more if a client sends `Expect: 100-continue`.
"""

import html
import os
import random
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

_SO_MAX_PACING_RATE = 47  # <asm-generic/socket.h>; Python has no name for it
_PIPE_BYTES = 1024 * 1024
_MAX_HEAD_BYTES = 32 * 1024
_TRAP_SECONDS = 240
_KEY = re.compile(r"<Key>(.*?)</Key>")
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected by a test</Message></Error>'


@dataclass
class Request:
    """A client's request; `sent` counts the bytes of the response body, `deleted` lists the keys that it deletes."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    deleted: tuple[str, ...] = ()

    @property
    def is_download(self) -> bool:
        """Return whether the request downloads an object's content."""
        return (
            self.method == "GET"
            and self.path.count("/") > 1
            and not {"list-type", "uploads"} & set(self.query)
        )


@dataclass
class Fault:
    """A fault in requests of one method whose path ends with `key`.

    It affects a random `share` of these requests, at most `times` of them. `header` limits it to requests with a header whose
    name starts with that text. `times_injected` counts the affected requests. The faults:

    - reject: the proxy responds with `status` and `code`.
    - lose: the server executes the request, and the proxy drops the response.
    - reset, truncate: the proxy resets or closes the connection at byte `at` of the body, by default in its middle.
    - stall: the proxy sends nothing for `seconds` at that byte, or until `released` is set, then closes the connection.
    - flip: the proxy inverts one bit of that byte.
    - swap: the proxy sends `content` as the body.

    The body is the response body of a GET and the request body of a PUT.
    """

    kind: Literal["reject", "lose", "reset", "truncate", "stall", "flip", "swap"]
    method: str = "GET"
    key: str = ""
    header: str = ""
    share: float = 1.0
    times: int | None = None
    at: int | None = None
    seconds: float = 600.0
    status: int = 503
    code: str = "SlowDown"
    content: bytes = b""
    times_injected: int = 0
    released: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Trap:
    """A point at which the proxy stops the PUT of an object whose key ends with `key`.

    - before: no byte of the request reaches the server.
    - midway: half of the body reaches the server.
    - after: the server stores the object, and the client receives no response.
    """

    when: Literal["before", "midway", "after"]
    key: str
    sprung: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def spring(self) -> None:
        """Report that the PUT has been stopped, wait until the proxy closes, and drop the connection."""
        self.sprung.set()
        self.released.wait(_TRAP_SECONDS)
        raise ConnectionAbortedError


class BucketProxy:
    """A proxy that listens at `endpoint` and records `requests` in order."""

    def __init__(
        self,
        upstream: tuple[str, int],
        *,
        latency_seconds: float,
        bytes_per_second: float | None,
        faults: Sequence[Fault],
        trap: Trap | None,
        address: str,
    ):
        self.requests: list[Request] = []
        self.faults = list(faults)
        self._upstream = upstream
        self._latency_seconds = latency_seconds
        self._bytes_per_second = bytes_per_second
        self._trap = trap
        self._expired_key: str | None = None
        self._random = random.Random(0)
        self._random_lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = threading.Event()
        self._listener = socket.create_server((address, 0), backlog=256)
        self.endpoint = f"http://{address}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def downloads(self, bucket: str) -> list[Request]:
        """Return the requests that download an object's content from a bucket."""
        return [
            request
            for request in self.requests
            if request.is_download and request.path.startswith(f"/{bucket}/")
        ]

    def body_bytes(self, bucket: str) -> int:
        """Return how many bytes of object content the proxy has sent to clients."""
        return sum(request.sent for request in self.downloads(bucket))

    def expire(self, access_key: str) -> None:
        """Respond with ExpiredToken to requests signed with this key."""
        self._expired_key = access_key

    def close(self) -> None:
        self._closed.set()
        if self._trap:
            self._trap.released.set()
        self._listener.close()
        for open_socket in list(self._sockets):
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # Either side may close the connection at any time.
        with suppress(OSError), client, socket.create_connection(self._upstream) as server, _pipe() as pipe:
            self._sockets |= {client, server}
            try:
                for side in (client, server):
                    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if self._bytes_per_second:
                        side.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, int(self._bytes_per_second))
                time.sleep(self._latency_seconds)
                while _Exchange(self, client, server, pipe).run():
                    pass
            finally:
                self._sockets -= {client, server}

    def draw_fault(self, request: Request) -> Fault | None:
        if self._expired_key and self._expired_key in request.headers.get("authorization", ""):
            return Fault("reject", status=400, code="ExpiredToken")
        with self._random_lock:
            for fault in self.faults:
                if (
                    fault.method == request.method
                    and request.path.endswith(fault.key)
                    and any(name.startswith(fault.header) for name in request.headers)
                    and (request.method != "GET" or request.is_download or fault.kind in ("reject", "lose"))
                    and (fault.times is None or fault.times_injected < fault.times)
                    and self._random.random() < fault.share
                ):
                    fault.times_injected += 1
                    return fault
        return None

    def wait_for_round_trip(self) -> None:
        if self._latency_seconds:
            time.sleep(self._latency_seconds)

    def stall(self, fault: Fault) -> None:
        until = time.monotonic() + fault.seconds
        while time.monotonic() < until and not fault.released.is_set() and not self._closed.is_set():
            time.sleep(0.05)

    def trap_for(self, request: Request) -> Trap | None:
        trap = self._trap
        return trap if trap and request.method == "PUT" and request.path.endswith(trap.key) else None


class _Exchange:
    """One request and its response on a connection."""

    def __init__(
        self, proxy: BucketProxy, client: socket.socket, server: socket.socket, pipe: tuple[int, int]
    ):
        self._proxy, self._client, self._server, self._pipe = proxy, client, server, pipe

    def run(self) -> bool:
        """Forward the request and the response; return whether the connection stays open."""
        head = _read_head(self._client)
        if not head:
            return False
        request = _parse(head)
        self._proxy.requests.append(request)
        fault, trap = self._proxy.draw_fault(request), self._proxy.trap_for(request)
        self._proxy.wait_for_round_trip()
        if trap and trap.when == "before":
            trap.spring()
        if fault and fault.kind == "reject":
            return self._send_error(request, fault)
        self._server.sendall(head)
        response = b""
        if request.headers.get("expect") == "100-continue":
            response = _read_head(self._server)
            if _status(response) == 100:
                self._client.sendall(response)
                self._proxy.wait_for_round_trip()
                response = b""
        if not response:
            if trap and trap.when == "midway":
                self._copy(self._client, self._server, int(request.headers["content-length"]) // 2)
                trap.spring()
            if "delete" in request.query:
                self._server.sendall(self._receive_deletion(request))
            else:
                self._copy_body(
                    self._client,
                    self._server,
                    request.headers,
                    fault if request.method == "PUT" and fault and fault.kind != "lose" else None,
                )
            response = _read_head(self._server)
            while _status(response) == 100:
                response = _read_head(self._server)
        if trap and trap.when == "after" and _status(response) == 200:
            trap.spring()
        if fault and fault.kind == "lose":
            return False
        return self._forward_response(request, response, fault if request.method == "GET" else None)

    def _receive_deletion(self, request: Request) -> bytes:
        """Return the body of a DeleteObjects request, and record its keys."""
        body = _receive(self._client, int(request.headers["content-length"]))
        request.deleted = tuple(html.unescape(key) for key in _KEY.findall(body.decode()))
        return body

    def _send_error(self, request: Request, fault: Fault) -> bool:
        if "delete" in request.query:
            self._receive_deletion(request)
        elif request.headers.get("expect") != "100-continue":
            _receive(self._client, int(request.headers.get("content-length", 0)))
        body = _ERROR.format(code=fault.code).encode() if request.method != "HEAD" else b""
        request.status = fault.status
        self._client.sendall(
            f"HTTP/1.1 {fault.status} Error\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n".encode()
            + body
        )
        return False

    def _forward_response(self, request: Request, response: bytes, fault: Fault | None) -> bool:
        if not response:
            return False
        request.status = _status(response)
        headers = _headers(response)
        self._client.sendall(response)
        if request.method != "HEAD" and request.status not in (204, 304):
            if fault and fault.kind == "swap":
                self._swap(request, headers, fault)
            else:
                self._copy_body(self._server, self._client, headers, fault, request)
        return "close" not in (headers.get("connection"), request.headers.get("connection"))

    def _copy_body(
        self,
        source: socket.socket,
        sink: socket.socket,
        headers: dict[str, str],
        fault: Fault | None,
        request: Request | None = None,
    ) -> None:
        if headers.get("transfer-encoding") == "chunked":
            self._copy_chunks(source, sink)
            return
        length = int(headers.get("content-length", 0))
        if fault is None or not length:
            self._copy(source, sink, length, request)
            return
        at = min(length // 2 if fault.at is None else fault.at, length - 1)
        self._copy(source, sink, at, request)
        if fault.kind == "flip":
            sink.sendall(bytes([_receive(source, 1)[0] ^ 1]))
            self._copy(source, sink, length - at - 1, request)
            return
        if fault.kind == "stall":
            self._proxy.stall(fault)
        if fault.kind == "reset":
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionAbortedError

    def _swap(self, request: Request, headers: dict[str, str], fault: Fault) -> None:
        length = int(headers["content-length"])
        _receive(self._server, length)
        range_start = re.match(r"bytes=(\d+)-", request.headers.get("range", ""))
        start = int(range_start[1]) if range_start else 0
        self._client.sendall(fault.content[start : start + length])

    def _copy_chunks(self, source: socket.socket, sink: socket.socket) -> None:
        while True:
            line = _read_head(source, b"\r\n")
            sink.sendall(line)
            size = int(line.split(b";")[0], 16)
            if size == 0:
                break
            self._copy(source, sink, size + 2)
        while line := _read_head(source, b"\r\n"):  # trailers, up to an empty line
            sink.sendall(line)
            if line == b"\r\n":
                return

    def _copy(
        self, source: socket.socket, sink: socket.socket, length: int, request: Request | None = None
    ) -> None:
        read_end, write_end = self._pipe
        while length:
            moved = pending = os.splice(source.fileno(), write_end, min(length, _PIPE_BYTES))
            if not moved:
                raise ConnectionAbortedError
            while pending:
                pending -= os.splice(read_end, sink.fileno(), pending)
            length -= moved
            if request:
                request.sent += moved


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    import fcntl

    read_end, write_end = os.pipe()
    try:
        with suppress(PermissionError):  # the user's pipe quota is used up; the default size works too
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        yield read_end, write_end
    finally:
        os.close(read_end)
        os.close(write_end)


def _read_head(source: socket.socket, marker: bytes = b"\r\n\r\n") -> bytes:
    """Read up to an end marker and no further, so that the body stays in the kernel; return b"" at end of stream."""
    while True:
        buffered = source.recv(_MAX_HEAD_BYTES, socket.MSG_PEEK)
        if not buffered:
            return b""
        if (position := buffered.find(marker)) >= 0:
            return _receive(source, position + len(marker))
        time.sleep(0.001)


def _receive(source: socket.socket, length: int) -> bytes:
    blocks = []
    while length:
        block = source.recv(min(length, _PIPE_BYTES))
        if not block:
            raise ConnectionAbortedError
        blocks.append(block)
        length -= len(block)
    return b"".join(blocks)


def _parse(head: bytes) -> Request:
    method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
    path, _, query = target.partition("?")
    return Request(
        method,
        urllib.parse.unquote(path),
        dict(urllib.parse.parse_qsl(query, keep_blank_values=True)),
        _headers(head),
    )


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def _status(head: bytes) -> int:
    return int(head.split(b" ", 2)[1]) if head else 0


@contextmanager
def bucket_proxy(
    endpoint: str,
    *faults: Fault,
    latency_seconds: float = 0.0,
    bytes_per_second: float | None = None,
    trap: Trap | None = None,
    address: str = "127.0.0.1",
) -> Iterator[BucketProxy]:
    """Run a proxy in front of the server at `endpoint` (http://host:port), on an address of this machine."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    proxy = BucketProxy(
        (host, int(port)),
        latency_seconds=latency_seconds,
        bytes_per_second=bytes_per_second,
        faults=faults,
        trap=trap,
        address=address,
    )
    try:
        yield proxy
    finally:
        proxy.close()
