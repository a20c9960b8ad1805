import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedpipe_core.errors import TrackingError
from tasks.mlflow_client import connect, connect_early
from tasks.tracking import open_run


def test_server_that_does_not_answer_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with pytest.raises(TrackingError, match=rf"MLflow at http://127\.0\.0\.1:{port} did not answer"):
            open_run(f"http://user:secret@127.0.0.1:{port}", "x", "run-1", {}, {})


def test_database_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="MLflow at sqlite"):
        open_run(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", "x", "run-1", {}, {})


def test_importing_what_speaks_to_mlflow_imports_no_mlflow() -> None:
    code = "import sys, tasks.tracking, tasks.registry, tasks.logged_model; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_connection_made_early_is_the_one_used_later(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/early.db"
    connect_early(uri)
    for thread in threading.enumerate():
        if thread.name == "MLflow":
            thread.join()
    known = connect.cache_info().hits
    open_run(uri, "early", "run", {}, {})
    assert connect.cache_info().hits > known
    assert (tmp_path / "early.db").is_file()
