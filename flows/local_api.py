"""Prefect's API for a command that finds no server configured: a child process that ends when the command does.

Prefect would start such a child itself, but Ctrl-C takes that one away before the run could report how it ended, and
`kill -9` leaves it behind. This one has a session of its own and ends with its standard input, of which the command
holds the other end. Its records are in PREFECT_HOME, where `prefect server start` shows them.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from fedpipe_core.errors import OrchestratorError

_servers: list[subprocess.Popen[str]] = []  # kept, as a collected one would close the pipe
START_SECONDS = 300.0  # the first start makes the database, which took 60 s on a busy machine with two slow cores
GRACE_SECONDS = 3


def start_api() -> Callable[[], None]:
    """Start Prefect's API unless a server is configured. What is returned waits until the API answers.

    Waiting raises OrchestratorError when it does not.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    configured = get_current_settings().api.url
    if configured:
        return lambda: _greet(configured)
    address = _start_server()
    os.environ["PREFECT_API_URL"] = f"{address}/api"
    refresh_global_settings_context()
    return lambda: _await_health(address)


def is_local() -> bool:
    """Whether this process reports to an API of its own, which ends with it."""
    return bool(_servers)


def _start_server() -> str:
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "flows.local_api"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
    )
    _servers.append(server)
    port = server.stdout.readline().strip() if server.stdout else ""
    if not port:
        raise OrchestratorError(f"Prefect's local API ended with {server.wait()} before it began; see the lines above")
    return f"http://127.0.0.1:{port}"


def _await_health(address: str) -> None:
    import httpx

    try:
        httpx.get(f"{address}/api/health", timeout=START_SECONDS, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise OrchestratorError(
            f"Prefect's local API did not start ({error or type(error).__name__}); see the lines above, or start a "
            "server with `prefect server start` and set PREFECT_API_URL"
        ) from None


def _greet(url: str) -> None:
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.hello()
    except Exception as error:
        reason = " ".join(str(error or type(error).__name__).split())[:200]
        raise OrchestratorError(
            f"Prefect at {url} does not answer ({reason}); correct PREFECT_API_URL, or unset it to run without a server"
        ) from None


def serve() -> None:
    """Serve Prefect's API on a free port, which is printed first, until standard input ends."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads our standard output any more
    threading.Thread(target=_end_with_input, daemon=True).start()
    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _end_with_input() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    serve()
