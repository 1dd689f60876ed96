"""An S3 server on this machine, behind a proxy that injects faults."""

from __future__ import annotations

import contextlib
import functools
import http.client
import logging
import math
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("unavailable", "dropped", "short", "garbled", "hangs", "expired", "denied", "applied")
"""The proxy answers 503; closes the connection; sends half of the body; changes a byte of the body; never answers;
answers that the credentials have expired; denies access; or executes the request and then answers 503."""

_TIMEOUT_S = 60.0
_ERRORS = {
    "unavailable": (503, "ServiceUnavailable"),
    "expired": (403, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
}
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}


@dataclass
class Fault:
    """A fault of some of the requests that match a method and a path.

    Attributes:
        name: One of `FAULTS`.
        method: HTTP method of the requests; "" for any.
        path: Substring of their path and query.
        first, last: The first and the last request to fail, counted from 1.
        num_requests: Number of matching requests so far.
        over: Set when the fault ends.
    """

    name: str
    method: str
    path: str
    first: int
    last: float
    num_requests: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def strikes(self, method: str, path: str) -> bool:
        """Count a request if it matches; return whether it fails."""
        if self.method not in ("", method) or self.path not in path:
            return False
        self.num_requests += 1
        return self.first <= self.num_requests <= self.last


class S3:
    """moto's S3 server behind a proxy, in this process; moto starts on the first request."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self._moto: Any = None
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that make this server serve `s3://` URLs, without retries in botocore."""
        return {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*self._proxy.server_address),
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @contextlib.contextmanager
    def failing(
        self, name: str, *, method: str = "", path: str = "", first: int = 1, last: float = math.inf
    ) -> Iterator[Fault]:
        """Make requests fail while the block runs; see `Fault`."""
        assert name in FAULTS
        fault = Fault(name, method, path, first, last)
        with self.lock:
            self.faults.append(fault)
        try:
            yield fault
        finally:
            with self.lock:
                self.faults.remove(fault)
            fault.over.set()

    def backend(self) -> tuple[str, int]:
        """Return moto's host and port."""
        with self.lock:
            if self._moto is None:
                from moto.server import ThreadedMotoServer

                logging.getLogger("werkzeug").setLevel(logging.ERROR)
                self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
                self._moto.start()
            host, port = self._moto.get_host_and_port()
        return host, port

    def close(self) -> None:
        for fault in self.faults:
            fault.over.set()
        self._proxy.shutdown()
        self._proxy.server_close()
        if self._moto is not None:
            self._moto.stop()


class _Handler(BaseHTTPRequestHandler):
    """Forwards requests to moto, or makes them fail."""

    protocol_version = "HTTP/1.1"

    def __init__(self, s3: S3, *args: Any) -> None:
        self._s3 = s3
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def _handle(self) -> None:
        body = self._body()
        with self._s3.lock:
            fault = next((f for f in list(self._s3.faults) if f.strikes(self.command, self.path)), None)
        name = fault.name if fault else ""
        if fault and name == "hangs":
            fault.over.wait(_TIMEOUT_S)
        if name in ("dropped", "hangs"):
            self._hang_up()
        elif name in _ERRORS:
            self._answer_error(*_ERRORS[name])
        else:
            status, headers, data = self._forward(body)
            if name == "applied":
                self._answer_error(*_ERRORS["unavailable"])
                return
            if name == "garbled" and data:
                data = data[:-1] + bytes([data[-1] ^ 1])
            self._answer(status, headers, data, num_sent=len(data) // 2 if name == "short" else len(data))

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self._s3.backend(), timeout=_TIMEOUT_S)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in (*_HOP_BY_HOP, "content-length")}
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _answer_error(self, status: int, code: str) -> None:
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code} by the proxy</Message></Error>'
        data = b"" if self.command == "HEAD" else text.encode()
        self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(data)))], data, len(data))

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, num_sent: int) -> None:
        self.send_response(status)
        has_length = False
        for name, value in headers:
            if name.lower() in (*_HOP_BY_HOP, "date", "server"):
                continue
            has_length = has_length or name.lower() == "content-length"
            self.send_header(name, value)
        if not has_length and status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:num_sent])
        if num_sent < len(data):
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
