"""Signs of life: written by a thread, read with patience, judged by the reader's own clock."""

import time
from pathlib import Path

import pytest

from fedpipe_core.schemas import LeaseRecord
from tasks.leases import Heartbeat, LeaseWatch
from tasks.local_store import LocalStore
from tasks.records import get_record, put_record

KEY = "run/leases/edges/east.json"
LEASE_SECONDS = 0.2


def wait(seconds: float, watch: LeaseWatch) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        watch.look()
        time.sleep(0.01)


def test_living_holder_is_never_taken_for_dead(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    heartbeat, watch = Heartbeat(store, KEY, "me", LEASE_SECONDS), LeaseWatch(store, KEY, 10 * LEASE_SECONDS)
    heartbeat.start()
    wait(5 * LEASE_SECONDS, watch)
    assert watch.lease is not None
    assert (watch.lease.owner, watch.lease.ended, watch.expired) == ("me", None, False)
    heartbeat.end("done")


def test_holder_that_is_silent_expires_and_lives_again_with_its_next_sign(tmp_path: Path) -> None:
    store, watch = LocalStore(str(tmp_path)), LeaseWatch(LocalStore(str(tmp_path)), KEY, LEASE_SECONDS)
    put_record(store, KEY, LeaseRecord(owner="me", beat=7))
    wait(2 * LEASE_SECONDS, watch)
    assert watch.expired
    store.put(KEY, LeaseRecord(owner="me", beat=8).model_dump_json().encode())
    wait(LEASE_SECONDS / 2, watch)
    assert not watch.expired


def test_holder_that_never_came_expires_too(tmp_path: Path) -> None:
    watch = LeaseWatch(LocalStore(str(tmp_path)), KEY, LEASE_SECONDS)
    wait(2 * LEASE_SECONDS, watch)
    assert (watch.lease, watch.expired) == (None, True)


def test_time_in_which_the_store_was_not_read_does_not_count_as_silence(tmp_path: Path) -> None:
    store, watch = LocalStore(str(tmp_path)), LeaseWatch(LocalStore(str(tmp_path)), KEY, LEASE_SECONDS)
    put_record(store, KEY, LeaseRecord(owner="me", beat=0))
    watch.look()
    time.sleep(3 * LEASE_SECONDS)
    watch.look()
    assert not watch.expired


def test_ended_lease_says_how_and_why_and_stays(tmp_path: Path) -> None:
    store, beats = LocalStore(str(tmp_path)), []
    heartbeat = Heartbeat(store, KEY, "me", LEASE_SECONDS, on_beat=lambda: beats.append(1))
    heartbeat.start()
    time.sleep(2 * LEASE_SECONDS)
    heartbeat.end("failed", "no rows")
    time.sleep(LEASE_SECONDS)
    found = get_record(store, KEY, LeaseRecord)
    assert found is not None
    assert (found.ended, found.reason) == ("failed", "no rows")
    assert beats


def test_after_an_outage_silence_is_counted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.leases.LONGEST_PAUSE_SECONDS", LEASE_SECONDS)
    store, watch = LocalStore(str(tmp_path)), LeaseWatch(LocalStore(str(tmp_path)), KEY, LEASE_SECONDS)
    put_record(store, KEY, LeaseRecord(owner="me", beat=0))
    wait(0.8 * LEASE_SECONDS, watch)
    time.sleep(3 * LEASE_SECONDS)  # the store answers nobody, so the holder could not beat either
    watch.look()
    assert watch.silent_seconds == 0.0


def test_farewell_of_a_former_holder_leaves_its_successors_lease(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    old, new = Heartbeat(store, KEY, "old", 10.0), Heartbeat(store, KEY, "new", 10.0)
    old.start()
    new.start()
    old.end("orphaned")
    found = get_record(store, KEY, LeaseRecord)
    new.end("done")
    assert found is not None
    assert (found.owner, found.ended) == ("new", None)


def test_farewell_is_heard_at_once_where_it_is_asked_for(tmp_path: Path) -> None:
    store, watch = LocalStore(str(tmp_path)), LeaseWatch(LocalStore(str(tmp_path)), KEY, 1000 * LEASE_SECONDS)
    heartbeat = Heartbeat(store, KEY, "me", 1000 * LEASE_SECONDS)
    heartbeat.start()
    watch.look()
    heartbeat.end("left", "told to stop")
    read_before, read_again = watch.look(), watch.look(at_once=True)
    assert read_before is not None
    assert read_again is not None
    assert (read_before.ended, read_again.ended) == (None, "left")
