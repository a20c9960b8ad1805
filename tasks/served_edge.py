"""An edge on a machine of its own: what it serves, how it waits for the coordinator, and when it stops by itself.

It meets the coordinator in the store alone. What it does in a round is `tasks.edge`'s, as in local mode.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from fedpipe_core.config import FederationConfig
from fedpipe_core.edge_config import EdgeConfig, config_at_edge, signing_key_at_edge
from fedpipe_core.errors import ConfigError, ModelError, UpdateRefusedError
from fedpipe_core.schemas import FederationRecord
from fedpipe_core.startup import import_libraries
from tasks.edge import EdgeSession, Machine, StoppedError, let_go_of_bases
from tasks.leases import Ending, Heartbeat, LeaseWatch
from tasks.records import RunKeys, get_record
from tasks.storage import ObjectStore, open_store

T = TypeVar("T")
EARLY_SECONDS = 120.0  # for the coordinator to load base and data; one that takes longer starts the edge again
EARLY_POLL_SECONDS = 0.5


class NotOpenedError(BaseException):
    """Raised when a run for which an edge was called early did not come to be; no edge's fault."""


def open_session(own: EdgeConfig, run: str, address: str, early: bool = False) -> tuple[EdgeSession, FederationRecord]:
    """The session of this machine's edge in a run, and what the run is; no base is loaded yet.

    With `early` the coordinator may still be loading: libraries are imported, then the run's record is waited for.
    Raises ConfigError when the run is not in the store, or does not want this edge, and NotOpenedError when it was
    waited for too long.
    """
    choose_device(own)
    store, keys = open_store(own.store or address, write=False, patient=True), RunKeys(run)
    if early:
        import_libraries()
    record = _find_record(own, store, keys, EARLY_SECONDS if early else 0.0)
    config = config_at_edge(FederationConfig.model_validate(record.config), own)
    spec = next(edge for edge in config.edges if edge.edge_id == own.edge_id)
    key = signing_key_at_edge(config, own)
    machine = Machine(own.threads or torch.get_num_threads(), own.memory_bytes, Path(own.state), key)
    return EdgeSession(config, spec, store, keys, machine), record


def _find_record(own: EdgeConfig, store: ObjectStore, keys: RunKeys, patience_seconds: float) -> FederationRecord:
    deadline = time.monotonic() + patience_seconds
    while (record := get_record(store, keys.federation, FederationRecord, own.coordinator_key)) is None:
        if not patience_seconds:
            raise ConfigError(f"{own.edge_id}: run {keys.run} is not in {store.root}; correct `store` in edge.yaml")
        if time.monotonic() > deadline:
            raise NotOpenedError(f"run {keys.run} did not appear in {store.root} within {patience_seconds:g} s")
        time.sleep(random.uniform(0.5, 1.0) * EARLY_POLL_SECONDS)
    return record


def load_base(session: EdgeSession, record: FederationRecord) -> None:
    """Load the base, for all rounds. Raises ModelError when it is not the federation's."""
    found = session.profile_base.sha256
    if found != record.base_sha256:
        raise ModelError(
            f"{session.edge_id}: base {session.config.model.base} has hash {found[:12]}, the federation's has "
            f"{record.base_sha256[:12]}; bring the same weights to this machine, and correct `base` in edge.yaml"
        )


def keep_planned_base(session: EdgeSession) -> None:
    """Free the base the edge was profiled on where the plan has it train on another: its memory holds one."""
    if session.plan.base_bits != session.profile_bits:
        let_go_of_bases()


class ServedEdge:
    """One edge's session with its signs of life, from entering the block to leaving it.

    A thread of its own renews the edge's lease and looks whether the coordinator lives and the open round is still
    open; the work stops between two steps when not. With `retried` a failure is not told, as the edge comes back.
    """

    def __init__(self, session: EdgeSession, owner: str, retried: bool = False):
        store, keys, seconds = session.store, session.keys, session.config.remote.lease_seconds
        own_key = keys.edge_lease(session.edge_id)
        self.session, self._owner, self._retried = session, owner, retried
        self._open_round = self._closed_round = self._answered_round = self._judged_round = 0
        self.judges = False  # whether the round that was taken up last is to be judged, not trained
        self._stop_reason: str | None = None
        self._complete = False
        self._coordinator = LeaseWatch(store, keys.coordinator_lease, seconds)
        self._own = LeaseWatch(store, own_key, 0)
        self._heartbeat = Heartbeat(store, own_key, owner, seconds, self._look)
        session.check = self.check

    def __enter__(self) -> "ServedEdge":
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        ending = _ending_of(error)
        with _undisturbed():
            if ending == "failed" and self._retried:
                self._heartbeat.stop()
            else:
                self._heartbeat.end(ending, _reason_of(error))

    def check(self) -> None:
        """Raise StoppedError when the edge has to stop, UpdateRefusedError when its round went on without it."""
        if self._stop_reason is not None:
            raise StoppedError(self._stop_reason)
        if self._open_round and self._closed_round == self._open_round:
            raise UpdateRefusedError(f"late: round {self._open_round} was closed before training ended")

    def await_plan(self) -> None:
        """Wait until a plan has this edge, or the run has ended. Raises StoppedError when none is to come."""
        self._await(lambda: self.session.is_planned() or self._complete or None)

    def next_round(self) -> int | None:
        """Wait for an open round without this edge's answer, or its judgement; None when no round is left."""
        return self._await(self._unanswered_round) or None

    def _has_to_judge(self, round_index: int) -> bool:
        """Whether what this round starts from waits for this edge's judgement."""
        store, keys, edge_id = self.session.store, self.session.keys, self.session.edge_id
        if not self.session.config.edges_judge or not round_index or round_index == self._judged_round:
            return False
        answers = (
            keys.evaluation(round_index, edge_id),
            keys.evaluation_failure(round_index, edge_id),
            keys.judged(round_index),
        )
        if not any(map(store.exists, answers)):
            return True
        # A resumed coordinator removes failures, and the edge judges then; every other answer stays.
        if not store.exists(answers[1]):
            self._judged_round = round_index
        return False

    def _unanswered_round(self) -> int | None:
        """The round to judge or train now: 0 when no round is left, None when there is none yet."""
        store, keys, index = self.session.store, self.session.keys, self._open_round
        while index <= self.session.config.rounds and store.exists(keys.global_record(index + 1)):
            index += 1
        self.judges = not self._complete and self._has_to_judge(index)  # what the last round led to as well
        if self._complete or (index > self.session.config.rounds and not self.judges):
            return 0
        self._open_round = index
        if self.judges:
            return index
        if index in (0, self._answered_round) or not self.session.is_ready(index):
            return None
        edge_id = self.session.edge_id
        if store.exists(keys.update_record(index, edge_id)):
            self._answered_round = index
        # A resumed coordinator removes the failures of its open round: the edge tries again then.
        elif not store.exists(keys.failure(index, edge_id)):
            return index
        return None

    def _await(self, found: Callable[[], T | None]) -> T:
        """The first thing found, looked for until the edge has to stop."""
        while self._stop_reason is None:
            if (result := found()) is not None:
                return result
            time.sleep(random.uniform(0.5, 1.0) * self.session.config.remote.poll_seconds)
        raise StoppedError(self._stop_reason)

    def _look(self) -> None:
        """What the heartbeat's thread looks for."""
        coordinator, own, index = self._coordinator.look(), self._own.look(), self._open_round
        self._complete = coordinator is not None and coordinator.ended == "done"
        if coordinator is not None and coordinator.ended == "failed":
            self._stop_reason = coordinator.reason
        elif self._coordinator.expired and not self._complete:
            self._stop_reason = f"the coordinator gave no sign of life for {self._coordinator.silent_seconds:.0f} s"
        elif own is not None and own.owner != self._owner and own.ended is None:  # else an older one said farewell
            self._stop_reason = f"flow run {own.owner} serves this edge now"
        if index and self.session.store.exists(self.session.keys.global_record(index + 1)):
            self._closed_round = index


def _ending_of(error: BaseException | None) -> Ending:
    if error is None:
        return "done"
    if isinstance(error, StoppedError):
        return "orphaned"
    return "failed" if isinstance(error, Exception) else "left"


def _reason_of(error: BaseException | None) -> str:
    if error is None:
        return ""
    if _ending_of(error) == "left":
        return f"its process was told to stop ({type(error).__name__})"
    return str(error) or type(error).__name__


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no further signal cut the farewell of an edge that a signal ends.

    A service manager sends SIGTERM to the worker and to the edge's process, to which the worker then sends its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def choose_device(own: EdgeConfig) -> None:
    """Hide the GPU from an edge that says `cpu`. Raises ConfigError where it says `cuda` and there is none."""
    if own.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif own.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"{own.edge_id}: device is cuda and torch finds no GPU; mend the driver, or say `device: cpu` in edge.yaml"
        )
