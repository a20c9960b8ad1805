"""A PostgreSQL server of the tests' own: a new cluster in a temporary folder, reached through a Unix socket there."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60


def postgres_programs() -> Path | None:
    """Folder of the newest `initdb` and `postgres` of this machine; Debian keeps them off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


@contextmanager
def postgres_server(programs: Path) -> Iterator[str]:
    """Run a server until the block ends, and yield the address under which SQLAlchemy finds its database."""
    folder = Path(tempfile.mkdtemp(prefix="fedpipe-test-postgres-"))  # short: a socket's path has 107 characters
    owner = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    if owner:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
    data, options = folder / "data", {"cwd": folder, "stdin": subprocess.DEVNULL, **owner}
    try:
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
                server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _await_start(programs: Path, folder: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run([programs / "pg_isready", "-q", "-h", folder], check=False).returncode:
        log = (folder / "log").read_text()[-2000:]
        assert server.poll() is None and time.monotonic() < deadline, f"PostgreSQL did not start: {log}"  # noqa: PT018
        time.sleep(0.1)
