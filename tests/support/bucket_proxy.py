"""A proxy in front of an S3 server: it counts what passes, makes it slow, and breaks it as networks and stores do.

Bodies go from socket to socket inside the kernel, and the kernel paces them, so that a Python process keeps up with many
fast connections: a rate is that of one connection, in each direction. A latency is a round trip: one for the connection,
one for each request, and one more where a client asks whether it may send its body.
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
_MOST_HEAD_BYTES = 32 * 1024
_HOLD_SECONDS = 240
_KEY = re.compile(r"<Key>(.*?)</Key>")
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>made by a test</Message></Error>'


@dataclass
class Request:
    """What a client asked for; `sent` are the bytes of the answer's body that went to it, `deleted` the keys it named."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    deleted: tuple[str, ...] = ()

    @property
    def is_download(self) -> bool:
        """Whether it asks for an object's content."""
        return (
            self.method == "GET"
            and self.path.count("/") > 1
            and not {"list-type", "uploads"} & set(self.query)
        )


@dataclass
class Fault:
    """What happens to requests of one method whose path ends with `key`: to a share of them, and to so many at most.

    Where `header` is given, to those only that carry a header which begins like that.

    refuse: answered with `status` and `code`. lose: carried out, and the answer never comes. reset, truncate, stall: the connection is cut, closed, or silent for
    `seconds`, at byte `at` of the body (its middle, when not given). flip: one bit of that byte is another one. swap: the
    body is that of another object. The body is the answer's of a GET and the request's of a PUT.
    """

    kind: Literal["refuse", "lose", "reset", "truncate", "stall", "flip", "swap"]
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
    struck: int = 0


@dataclass(frozen=True)
class Trap:
    """A PUT of an object whose key ends with `key` is caught there and goes no further.

    `before`: no byte of it reaches the server; `midway`: half of its body does; `after`: the object is stored, and the
    answer does not reach the client.
    """

    when: Literal["before", "midway", "after"]
    key: str
    sprung: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def spring(self) -> None:
        """Tell that it is caught, wait until the client is dead, and drop the connection."""
        self.sprung.set()
        self.released.wait(_HOLD_SECONDS)
        raise ConnectionAbortedError


class BucketProxy:
    """Listens at `endpoint`; `requests` holds what was asked, in order."""

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
        self._drawing = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = threading.Event()
        self._listener = socket.create_server((address, 0), backlog=256)
        self.endpoint = f"http://{address}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def downloads(self, bucket: str) -> list[Request]:
        """The requests for objects' contents."""
        return [
            request
            for request in self.requests
            if request.is_download and request.path.startswith(f"/{bucket}/")
        ]

    def body_bytes(self, bucket: str) -> int:
        """The bytes of objects' contents that went to clients."""
        return sum(request.sent for request in self.downloads(bucket))

    def expire(self, access_key: str | None) -> None:
        """Answer requests signed with this key as those are whose credentials have expired; None ends it."""
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
        # Either side may go at any time.
        with suppress(OSError), client, socket.create_connection(self._upstream) as server, _pipe() as pipe:
            self._sockets |= {client, server}
            try:
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if self._bytes_per_second:
                        end.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, int(self._bytes_per_second))
                time.sleep(self._latency_seconds)
                while _Exchange(self, client, server, pipe).run():
                    pass
            finally:
                self._sockets -= {client, server}

    def draw_fault(self, request: Request) -> Fault | None:
        if self._expired_key and self._expired_key in request.headers.get("authorization", ""):
            return Fault("refuse", status=400, code="ExpiredToken")
        with self._drawing:
            for fault in self.faults:
                if (
                    fault.method == request.method
                    and request.path.endswith(fault.key)
                    and any(name.startswith(fault.header) for name in request.headers)
                    and (request.method != "GET" or request.is_download or fault.kind in ("refuse", "lose"))
                    and (fault.times is None or fault.struck < fault.times)
                    and self._random.random() < fault.share
                ):
                    fault.struck += 1
                    return fault
        return None

    def wait_a_round_trip(self) -> None:
        if self._latency_seconds:
            time.sleep(self._latency_seconds)

    def stall(self, seconds: float) -> None:
        self._closed.wait(seconds)

    def trap_for(self, request: Request) -> Trap | None:
        trap = self._trap
        return trap if trap and request.method == "PUT" and request.path.endswith(trap.key) else None


class _Exchange:
    """One request and its answer on a connection."""

    def __init__(
        self, proxy: BucketProxy, client: socket.socket, server: socket.socket, pipe: tuple[int, int]
    ):
        self._proxy, self._client, self._server, self._pipe = proxy, client, server, pipe

    def run(self) -> bool:
        """Returns whether the connection can carry another."""
        head = _read_head(self._client)
        if not head:
            return False
        request = _parse(head)
        self._proxy.requests.append(request)
        fault, trap = self._proxy.draw_fault(request), self._proxy.trap_for(request)
        self._proxy.wait_a_round_trip()
        if trap and trap.when == "before":
            trap.spring()
        if fault and fault.kind == "refuse":
            return self._refuse(request, fault)
        self._server.sendall(head)
        answer = b""
        if request.headers.get("expect") == "100-continue":
            answer = _read_head(self._server)
            if _status(answer) == 100:
                self._client.sendall(answer)
                self._proxy.wait_a_round_trip()
                answer = b""
        if not answer:
            if trap and trap.when == "midway":
                self._copy(self._client, self._server, int(request.headers["content-length"]) // 2)
                trap.spring()
            if "delete" in request.query:
                self._server.sendall(self._deletion(request))
            else:
                self._copy_body(
                    self._client,
                    self._server,
                    request.headers,
                    fault if request.method == "PUT" and fault and fault.kind != "lose" else None,
                )
            answer = _read_head(self._server)
            while _status(answer) == 100:
                answer = _read_head(self._server)
        if trap and trap.when == "after" and _status(answer) == 200:
            trap.spring()
        if fault and fault.kind == "lose":
            return False
        return self._answer(request, answer, fault if request.method == "GET" else None)

    def _deletion(self, request: Request) -> bytes:
        """The body of a request that deletes many objects; their keys are noted."""
        body = _receive(self._client, int(request.headers["content-length"]))
        request.deleted = tuple(html.unescape(key) for key in _KEY.findall(body.decode()))
        return body

    def _refuse(self, request: Request, fault: Fault) -> bool:
        if "delete" in request.query:
            self._deletion(request)
        elif request.headers.get("expect") != "100-continue":
            _receive(self._client, int(request.headers.get("content-length", 0)))
        body = _ERROR.format(code=fault.code).encode() if request.method != "HEAD" else b""
        request.status = fault.status
        self._client.sendall(
            f"HTTP/1.1 {fault.status} Refused\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n".encode()
            + body
        )
        return False

    def _answer(self, request: Request, answer: bytes, fault: Fault | None) -> bool:
        if not answer:
            return False
        request.status = _status(answer)
        headers = _headers(answer)
        self._client.sendall(answer)
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
            self._proxy.stall(fault.seconds)
        if fault.kind == "reset":
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionAbortedError

    def _swap(self, request: Request, headers: dict[str, str], fault: Fault) -> None:
        length = int(headers["content-length"])
        _receive(self._server, length)
        wanted = re.match(r"bytes=(\d+)-", request.headers.get("range", ""))
        start = int(wanted[1]) if wanted else 0
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
        outlet, inlet = self._pipe
        while length:
            moved = waiting = os.splice(source.fileno(), inlet, min(length, _PIPE_BYTES))
            if not moved:
                raise ConnectionAbortedError
            while waiting:
                waiting -= os.splice(outlet, sink.fileno(), waiting)
            length -= moved
            if request:
                request.sent += moved


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    import fcntl

    outlet, inlet = os.pipe()
    try:
        with suppress(PermissionError):  # an ordinary user's share of pipes is used up: smaller ones do
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        yield outlet, inlet
    finally:
        os.close(outlet)
        os.close(inlet)


def _read_head(source: socket.socket, end: bytes = b"\r\n\r\n") -> bytes:
    """All up to an end marker, and not a byte more: the body stays in the kernel. Empty when the other side has gone."""
    while True:
        seen = source.recv(_MOST_HEAD_BYTES, socket.MSG_PEEK)
        if not seen:
            return b""
        if (found := seen.find(end)) >= 0:
            return _receive(source, found + len(end))
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
    """Put a proxy in front of the server at `endpoint` (http://host:port), listening at an address of this machine."""
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
