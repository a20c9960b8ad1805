"""A PostgreSQL server of the tests' own, with a cluster of its own, reached through a Unix socket."""

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60
STOP_SECONDS = 10


def postgres_programs() -> Path | None:
    """Folder of the newest `initdb` and `postgres` of this machine; Debian keeps them off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def may_keep(cluster: Path) -> bool:
    """Whether PostgreSQL can have its cluster there: its user, never root, has to get through every folder above."""
    above = [folder for folder in cluster.absolute().parents if folder.exists()]
    return os.geteuid() != 0 or all(folder.stat().st_mode & stat.S_IXOTH for folder in above)


@contextmanager
def postgres_server(programs: Path, cluster: Path | None = None) -> Iterator[str]:
    """Run a server until the block ends, and yield the address under which SQLAlchemy finds its database.

    The cluster is made in the folder `cluster`, unless it is there, and stays; without one it is gone with the server.
    """
    folder = Path(tempfile.mkdtemp(prefix="fedpipe-test-postgres-"))  # short: a socket's path has 107 characters
    data = cluster or folder / "data"
    owner = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    options = {"cwd": folder, "stdin": subprocess.DEVNULL, **owner}
    try:
        if not data.exists():
            data.mkdir(mode=0o700, parents=True)
        for path in (folder, data) if owner else ():  # PostgreSQL refuses to run as root
            shutil.chown(path, "postgres", "postgres")
        if not (data / "PG_VERSION").exists():
            subprocess.run(
                [programs / "initdb", "--pgdata", data, "--username", "fedpipe", "--auth", "trust", "--no-sync"],
                check=True, capture_output=True, **options,
            )  # fmt: skip
        settings = ("listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "max_connections=300")
        command = [programs / "postgres", "-D", data, *(word for setting in settings for word in ("-c", setting))]
        with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, **options) as server:
            try:
                _await_start(programs, folder, server)
                yield f"postgresql+asyncpg://fedpipe@/postgres?host={folder}"
            finally:
                _stop(server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server so that its next start has nothing to recover."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()


def _await_start(programs: Path, folder: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run([programs / "pg_isready", "-q", "-h", folder], check=False).returncode:
        log = (folder / "log").read_text()[-2000:]
        assert server.poll() is None and time.monotonic() < deadline, f"PostgreSQL did not start: {log}"  # noqa: PT018
        time.sleep(0.1)
