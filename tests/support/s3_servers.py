"""S3 on loopback for the tests: moto's server in a process of its own, and a proxy that hurts requests on demand."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["cut request", "lose answer", "truncate answer", "slow down", "deny", "ignore condition"]

# Ends with its standard input, so that a killed test run leaves no server behind.
_MOTO = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def moto_server() -> Iterator[str]:
    """Run moto's S3 server on a free port and yield its address."""
    with subprocess.Popen([sys.executable, "-c", _MOTO], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        port = int(process.stdout.readline())
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


class FaultProxy(ThreadingHTTPServer):
    """Hands requests on to an S3 server; the next one meets the next of `faults`, None is no fault.

    Until `away_until`, by the monotonic clock, every request is cut. `answered` holds what the server took or gave.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.faults: Iterator[Fault | None] = iter(())
        self.requests: list[str] = []
        self.answered: list[tuple[str, int]] = []
        self.away_until = 0.0
        self._held: dict[str, tuple[Event, Event]] = {}
        self._lock = Lock()

    @property
    def address(self) -> str:
        """Where clients reach the proxy."""
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def holding(self, key: str) -> Iterator[Event]:
        """Let writes of a key that ends like this wait while the block runs; the event tells that one waits."""
        waits, released = self._held.setdefault(key, (Event(), Event()))
        try:
            yield waits
        finally:
            del self._held[key]
            released.set()

    def wait_while_held(self, command: str, path: str) -> None:
        """Return at once, or when the write is no longer held."""
        for key, (waits, released) in list(self._held.items()):
            if command == "PUT" and path.partition("?")[0].endswith(key):
                waits.set()
                released.wait()

    def next_fault(self, request: str) -> Fault | None:
        """What shall happen to this request."""
        with self._lock:
            self.requests.append(request)
            if time.monotonic() < self.away_until:
                return "cut request"
            return next(self.faults, None)

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent: clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def do_GET(self) -> None:
        fault = self.server.next_fault(f"{self.command} {self.path}")
        size = int(self.headers.get("Content-Length", 0))
        if fault == "cut request":
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        body = self.rfile.read(size)
        self.server.wait_while_held(self.command, self.path)
        if fault == "slow down":
            self._refuse(503, "SlowDown")
        elif fault == "deny":
            self._refuse(403, "InvalidAccessKeyId")
        else:
            self._hand_on(body, fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""

    def _hand_on(self, body: bytes, fault: Fault | None) -> None:
        upstream = self.server.upstream
        kind = HTTPSConnection if upstream.scheme == "https" else HTTPConnection
        connection = kind(upstream.netloc, timeout=30)
        left_out = {"expect", "if-none-match" if fault == "ignore condition" else ""}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        self.server.answered.append((f"{self.command} {self.path}", response.status))
        if fault == "lose answer":
            self.close_connection = True
        else:
            self._answer(response, answer, truncated=fault == "truncate answer")

    def _answer(self, response: HTTPResponse, body: bytes, *, truncated: bool) -> None:
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in {"connection", "content-length", "date", "server", "transfer-encoding"}:
                self.send_header(name, value)
        length = response.headers.get("Content-Length", "0") if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if truncated else body)
        self.close_connection = truncated

    def _refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy before `upstream` on a free port."""
    with FaultProxy(upstream) as proxy:
        thread = Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
