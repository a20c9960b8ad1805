"""How MLflow is reached, and what is said when it is not.

MLflow is imported no sooner than it is needed. Callers speak to `MlflowClient` with explicit run ids and addresses: the
fluent API's active run is state of a thread and is lost in parallel tasks, and what of it is not told an address
(`MlflowClient.load_table` too) opens a database in the working directory.
"""

import fcntl
import functools
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

from fedpipe_core.errors import TrackingError
from fedpipe_core.startup import quick_imports

SQLITE = "sqlite:///"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the default of 7 lets an unreachable server hang for minutes
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to the command's result
}


@functools.lru_cache(maxsize=8)
def connect(uri: str) -> Any:
    """Return the `MlflowClient` of a tracking server or database, whose registry lies at the same place."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with _sole_migration(uri):
        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # creates and migrates a SQLite file
        return client


def connect_early(uri: str) -> None:
    """Import MLflow and open its database in a thread, while other work goes on; what fails is told to who needs it.

    The library that draws a run's plots comes along: at the run's end everyone would wait for it.
    """

    def work() -> None:
        with suppress(Exception), quick_imports():
            connect(uri)
            import matplotlib.backends.backend_agg  # noqa: F401

    threading.Thread(target=work, name="MLflow", daemon=True).start()


@contextmanager
def speaking_to(uri: str) -> Iterator[None]:
    """Turn what MLflow raises inside the block into one TrackingError with the start of the reason."""
    try:
        yield
    except Exception as error:
        if not _is_trackers_fault(error):
            raise
        shown = re.sub(r"//[^/@]*@", "//", uri)  # a database URI may carry a password
        reason = shorten(str(error) or repr(error), 300)
        raise TrackingError(
            f"MLflow at {shown} did not answer or refused: {reason}; check tracking.uri or MLFLOW_TRACKING_URI"
        ) from error


def _is_trackers_fault(error: Exception) -> bool:
    origin = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or origin in ("mlflow", "sqlalchemy", "requests", "boto3", "botocore")


@contextmanager
def _sole_migration(uri: str) -> Iterator[None]:
    """Let one process at a time open a SQLite file: concurrent first migrations break each other."""
    if not uri.startswith(SQLITE):
        yield
        return
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, and when the process dies
        yield
