"""Signs of life in the store: how an edge learns that its coordinator died, and the coordinator that an edge did.

Two machines' clocks are never compared. A holder changes its lease again and again; a watcher counts how long, by its
own clock, it has read the same content, and counts no time in which the store could not be read.
"""

import threading
import time
from collections.abc import Callable
from typing import Literal

from fedpipe_core.errors import FedPipeError
from fedpipe_core.schemas import LeaseRecord
from tasks.records import get_record
from tasks.s3_faults import LONGEST_PAUSE_SECONDS
from tasks.storage import ObjectStore

BEATS_PER_LEASE = 4
Ending = Literal["done", "left", "failed", "orphaned"]


class Heartbeat:
    """Renews a lease from a thread of its own, and calls `on_beat` as often, between `start` and `end`.

    It survives a store that fails for a while: its own silence is what others notice then.
    """

    def __init__(
        self, store: ObjectStore, key: str, owner: str, lease_seconds: float, on_beat: Callable[[], None] | None = None
    ):
        self.store, self.key, self.owner = store, key, owner
        self._pause_seconds, self._on_beat = lease_seconds / BEATS_PER_LEASE, on_beat
        self._beats, self._ending = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat {key}", daemon=True)

    def start(self) -> None:
        """Write the lease and begin to renew it. Raises StoreError when it cannot be written."""
        self._write(LeaseRecord(owner=self.owner, beat=0))
        self._thread.start()

    def end(self, ended: Ending, reason: str = "") -> None:
        """Stop renewing and say how the holder ended; a store that fails then leaves others to notice the silence."""
        self.stop()
        try:
            found = get_record(self.store, self.key, LeaseRecord)
            if found is not None and found.owner != self.owner and found.ended is None:
                return  # another holds the lease by now
            self._write(LeaseRecord(owner=self.owner, beat=self._beats + 1, ended=ended, reason=reason))
        except FedPipeError:
            return

    def stop(self) -> None:
        """Stop renewing, without a word."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(self._pause_seconds)

    def _run(self) -> None:
        while not self._ending.wait(self._pause_seconds):
            self._beats += 1
            try:
                if self._on_beat is not None:
                    self._on_beat()
                if not self._ending.is_set():
                    self._write(LeaseRecord(owner=self.owner, beat=self._beats))
            except FedPipeError:
                continue

    def _write(self, lease: LeaseRecord) -> None:
        self.store.put(self.key, lease.model_dump_json().encode())


class LeaseWatch:
    """Another's lease, read a few times per lease however often `look` is called."""

    def __init__(self, store: ObjectStore, key: str, lease_seconds: float):
        self.lease: LeaseRecord | None = None
        self.silent_seconds = 0.0
        self._store, self._key, self._lease_seconds = store, key, lease_seconds
        self._read_at: float | None = None

    @property
    def expired(self) -> bool:
        """Whether the holder was silent for the length of a lease."""
        return self.silent_seconds >= self._lease_seconds

    def look(self, at_once: bool = False) -> LeaseRecord | None:
        """The newest lease known; None while there is none. Raises StoreError when the store cannot be read.

        With `at_once` it is read again, however short ago it was.
        """
        pause_seconds, now = self._lease_seconds / BEATS_PER_LEASE, time.monotonic()
        if not at_once and self._read_at is not None and now - self._read_at < pause_seconds:
            return self.lease
        found = get_record(self._store, self._key, LeaseRecord)
        now = time.monotonic()
        gap_seconds = 0.0 if self._read_at is None else now - self._read_at
        # A store that was away let the holder's beats wait as well: after an outage the count begins anew.
        known = found == self.lease and gap_seconds < max(self._lease_seconds, LONGEST_PAUSE_SECONDS)
        self.silent_seconds = self.silent_seconds + min(gap_seconds, 2 * pause_seconds) if known else 0.0
        self._read_at, self.lease = now, found
        return found
