"""A store in a folder: the default, the simulator's and the tests'.

It decides how a file becomes visible whole or not at all; what keys may look like is left to `tasks.keys`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from fedpipe_core.errors import ObjectMissingError, StoreError
from tasks.keys import MARKER, check_folder, check_key, is_key


@dataclass(frozen=True)
class LocalStore:
    """A folder on a file system with hard links. Objects are synced to the disk before they become visible."""

    root: str

    def check(self, *, write: bool) -> None:
        """Raise StoreError unless the folder can be read, or made and written."""
        if write:
            self._create(Path(self.root, MARKER), b"")
        elif not Path(self.root).is_dir():
            raise StoreError(f"store {self.root}: there is no such folder; correct the address of the store")

    def put(self, key: str, data: bytes) -> None:
        self._replace(self._path(key), BytesIO(data))

    def put_new(self, key: str, data: bytes) -> bool:
        return self._create(self._path(key), data)

    def put_file(self, key: str, path: Path) -> None:
        target = self._path(key)
        with path.open("rb") as source:
            self._replace(target, source)

    def get(self, key: str) -> bytes:
        with self._opened(key) as source:
            return source.read()

    def get_file(self, key: str, path: Path) -> None:
        with self._opened(key) as source:
            self._replace(path, source)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, folder: str = "") -> list[str]:
        root = Path(self.root)
        files = (root / check_folder(folder)).rglob("*")
        return sorted(key for file in files if is_key(key := file.relative_to(root).as_posix()) and file.is_file())

    def delete(self, key: str) -> None:
        with self._explained(path := self._path(key)):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return Path(self.root, check_key(key))

    @contextmanager
    def _opened(self, key: str) -> Iterator[BinaryIO]:
        with self._explained(path := self._path(key)):
            try:
                source = path.open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise ObjectMissingError(f"store {self.root}: there is no object {key}") from None
            with source:
                yield source

    def _replace(self, target: Path, source: BinaryIO) -> None:
        with self._staged(target, source) as temporary:
            temporary.replace(target)
            _sync_folder(target.parent)

    def _create(self, target: Path, data: bytes) -> bool:
        with self._staged(target, BytesIO(data)) as temporary:
            try:
                target.hardlink_to(temporary)  # atomic and exclusive, unlike a rename, which replaces
            except FileExistsError:
                return False
            _sync_folder(target.parent)
        return True

    @contextmanager
    def _staged(self, target: Path, source: BinaryIO) -> Iterator[Path]:
        """Write `source` to a hidden file beside `target` and sync it; what is left of it goes at the end."""
        temporary = target.with_name(f".{target.name}.{uuid4().hex}")
        with self._explained(target):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as staged:
                    shutil.copyfileobj(source, staged)
                    staged.flush()
                    os.fsync(staged.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"store {self.root}: {path} cannot be read or written ({error.strerror}); "
                "choose a folder that can be, on a disk with room left"
            ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
