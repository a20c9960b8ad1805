"""What a folder must withstand beyond the contract in test_storage.py: killed writers, bad folders."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedpipe_core.errors import StoreError
from tasks.storage import open_store

_KILLED_BEFORE_THE_LINK = """
import os, signal, sys
from tasks.storage import open_store
store = open_store(sys.argv[1])
os.link = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
store.put_new("run/record.json", b"{}")
"""
_COPY = """
import pathlib, sys
from tasks.storage import open_store
open_store(sys.argv[1]).put_file("run/data", pathlib.Path(sys.argv[2]))
"""


def _hidden_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != ".fedpipe"]


def test_writer_killed_between_writing_and_linking_leaves_nothing_visible(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED_BEFORE_THE_LINK, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(_hidden_files(tmp_path)) == 1  # it did get that far
    store = open_store(str(tmp_path))
    assert store.list() == []
    assert not store.exists("run/record.json")
    assert store.put_new("run/record.json", b"{}")


def test_half_written_object_is_never_visible_even_if_its_writer_is_killed(tmp_path: Path) -> None:
    pipe, root = tmp_path / "pipe", tmp_path / "store"
    os.mkfifo(pipe)
    store = open_store(str(root))
    store.put("run/data", b"before")
    with subprocess.Popen([sys.executable, "-c", _COPY, str(root), str(pipe)]) as writer, pipe.open("wb") as feed:
        feed.write(b"x" * 2**20)
        feed.flush()
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size for path in _hidden_files(root)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert store.get("run/data") == b"before"
        writer.send_signal(signal.SIGKILL)
    assert store.get("run/data") == b"before"
    assert store.list() == ["run/data"]


def test_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a", b"1")
    with pytest.raises(StoreError, match=r"a/b cannot be read or written"):
        store.put("a/b", b"2")
    with pytest.raises(StoreError, match=r"a/b cannot be read or written"):
        store.put_new("a/b", b"2")
    assert _hidden_files(tmp_path) == []


def test_objects_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_new("a", b"1")
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "a").stat().st_mode == plain.stat().st_mode


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"store \S+/file/store: .* cannot be read or written \(Not a directory\)"):
        open_store(str(tmp_path / "file" / "store"))


def test_folder_without_write_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:  # root may write anywhere, so become nobody for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match="Permission denied"):
            open_store(str(tmp_path))
    finally:
        os.seteuid(user)


def test_opening_for_reading_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such folder"):
        open_store(str(tmp_path / "store"), write=False)
    assert not (tmp_path / "store").exists()
