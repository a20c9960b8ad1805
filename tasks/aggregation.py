"""A round's stored updates turned into the next global adapter: read, checked, screened, combined.

The same function serves the coordinator, which publishes what it returns, and the verification of a released model,
which compares. It needs the records and updates alone, no base model.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fedpipe_core.adapters import Adapter
from fedpipe_core.aggregation import Update, aggregate
from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import FedPipeError, UpdateRefusedError
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan
from fedpipe_core.schemas import FailureRecord, GlobalRecord, UpdateRecord
from fedpipe_core.trials import settled
from fedpipe_core.update_checks import Screening, check_update, screen_updates
from fedpipe_core.wire import encode_adapter
from fedpipe_core.wire_updates import decode_update, open_update
from tasks.edge import edge_start, read_global
from tasks.records import RunKeys, get_data, get_data_file, get_record
from tasks.storage import ObjectStore

MOST_HELD_BYTES = 64 * 2**20  # of encoded updates; a round's others are read module by module, at each use


# Whether an edge whose change opposes the others' counts, told how to make the adapter had it stood still, and with it.
Arbiter = Callable[[str, Callable[[], Adapter], Callable[[], Adapter]], bool]


@dataclass(frozen=True)
class StoredRun:
    """A planned run in its store, as far as aggregating needs it."""

    config: FederationConfig
    store: ObjectStore
    keys: RunKeys
    base_sha256: str
    plan: FederationPlan


@dataclass(frozen=True, eq=False)
class Combination:
    """The encoded adapter that a round led to, and what became of every edge.

    `counted` and `refused` hold the hash of each update that was there; `dropped` the reason of every edge that did not
    count, whether its update was refused or never came; `pardoned` the edges that count though they oppose the others.
    """

    data: bytes
    ranks: dict[str, int]
    counted: dict[str, str]
    refused: dict[str, str]
    dropped: dict[str, str]
    opposed: tuple[str, ...]
    pardoned: tuple[str, ...] = ()


def combine_updates(
    run: StoredRun, round_index: int, arbiter: Arbiter | None = None, answered: Collection[str] | None = None
) -> Combination:
    """Check a round's updates and aggregate those that count; the order in which edges finished changes no byte.

    An update that opposes the others is refused, unless the `arbiter` lets it count. With `answered` every other edge
    is taken for one without an answer, though its update may have come since.
    Raises IntegrityError when the adapter the round started from is missing or damaged.
    """
    torch.set_num_threads(1)  # factors are small: threads that wait for each other cost more than they save
    record, previous = read_global(run.store, run.keys, round_index, run.config.coordinator_signs)
    asked = [edge_id for edge_id in run.plan.edges if answered is None or edge_id in answered]
    with TemporaryDirectory(prefix="fedpipe-updates-") as folder:
        return _combined(UpdateReader(run, record, previous, Path(folder)), asked, arbiter)


def _combined(reader: "UpdateReader", asked: Collection[str], arbiter: Arbiter | None) -> Combination:
    run, record, previous = reader.run, reader.start, reader.previous
    before = _before_previous(run, record.round)
    updates, records, dropped = _read_updates(reader, asked)

    @lru_cache(maxsize=1)  # what a pardon was judged by is what the round becomes
    def combined(counted: tuple[Update, ...]) -> Adapter:
        return aggregate(previous, counted, run.config.aggregation, before).adapter

    screening = screen_updates(updates, run.config.aggregation, record.opposed)
    screening, pardoned = _arbitrated(screening, combined, arbiter)
    hashes = {edge_id: update.adapter.sha256 for edge_id, update in records.items()}
    used = {update.edge_id: hashes[update.edge_id] for update in screening.counted}
    answers = {edge_id: records[edge_id] for edge_id in used}
    adapter = settled(combined(tuple(screening.counted)), previous.ranks, run.plan, answers)
    return Combination(
        data=encode_adapter(adapter, run.config.exchange.dtype_of_global),
        ranks=adapter.ranks,
        counted=used,
        refused={edge_id: sha256 for edge_id, sha256 in hashes.items() if edge_id not in used},
        dropped=run.plan.dropped | dropped | screening.refused,
        opposed=screening.opposed,
        pardoned=pardoned,
    )


def _arbitrated(
    screening: Screening, combined: Callable[[tuple[Update, ...]], Adapter], arbiter: Arbiter | None
) -> tuple[Screening, tuple[str, ...]]:
    """The screening after every suspect was heard, one after another, and the edges that were pardoned."""
    if arbiter is None:
        return screening, ()
    pardoned: list[str] = []
    for suspect in screening.suspects:
        together = screening.pardon(suspect)
        # Against its standing still, not its absence: that would let a reversed change count for damping the others'.
        still = (*screening.counted, replace(suspect, trained=suspect.start))
        if arbiter(suspect.edge_id, partial(combined, still), partial(combined, tuple(together.counted))):
            screening = together
            pardoned.append(suspect.edge_id)
    return screening, tuple(pardoned)


def update_record(
    store: ObjectStore, keys: RunKeys, round_index: int, edge_id: str, signed_by: str | None = None
) -> UpdateRecord | None:
    """What an edge returned from a round, or None."""
    return get_record(store, keys.update_record(round_index, edge_id), UpdateRecord, signed_by)


@dataclass(eq=False)
class UpdateReader:
    """Reads a round's updates: the first of them into memory, those beyond `MOST_HELD_BYTES` into files of `folder`."""

    run: StoredRun
    start: GlobalRecord
    previous: Adapter
    folder: Path
    held_bytes: int = 0
    _starts: dict[tuple[tuple[str, int], ...], Adapter] = field(default_factory=dict)

    def start_of(self, plan: EdgePlan) -> Adapter:
        """What an edge of that plan started from: the same for equal ranks."""
        ranks = tuple(sorted(plan.ranks.items()))
        if ranks not in self._starts:
            self._starts[ranks], _ = edge_start(self.run.config, plan, self.previous, self.start.round)
        return self._starts[ranks]

    def trained(self, record: UpdateRecord, start: Adapter) -> Adapter:
        """What the edge trained. Raises IntegrityError on bytes that are not what the record promises."""
        self.held_bytes += record.adapter.size_bytes
        if self.held_bytes <= MOST_HELD_BYTES:
            return decode_update(get_data(self.run.store, record.adapter), start)
        path = self.folder / f"{record.edge_id}.safetensors"
        get_data_file(self.run.store, record.adapter, path)
        return open_update(path, start)


def _read_updates(
    reader: UpdateReader, edges: Collection[str]
) -> tuple[list[Update], dict[str, UpdateRecord], dict[str, str]]:
    """The updates that are what the plan asked for, the record of each that came, and why other edges have none."""
    run, round_index = reader.run, reader.start.round
    updates, records, dropped = [], {}, {}
    for edge_id in edges:
        try:
            record = _required_update(run, round_index, edge_id)
            records[edge_id] = record
            _require(record, edge_id, run=run.keys.run, round=round_index, edge_id=edge_id)
            updates.append(_decode(reader, record))
        except FedPipeError as refusal:
            dropped[edge_id] = str(refusal)
    return updates, records, dropped


def _required_update(run: StoredRun, round_index: int, edge_id: str) -> UpdateRecord:
    record = update_record(run.store, run.keys, round_index, edge_id, run.config.edge_signs(edge_id))
    if record is not None:
        return record
    failure = get_record(run.store, run.keys.failure(round_index, edge_id), FailureRecord)
    raise UpdateRefusedError(failure.reason if failure else "no answer")


def _require(record: UpdateRecord, asked: str, /, **expected: object) -> None:
    """Refuse an update that says of itself what it should not, such as one copied from another round or edge."""
    for name, value in expected.items():
        if getattr(record, name) != value:
            found = str(getattr(record, name))
            raise UpdateRefusedError(f"{asked}: its update's {name} is {found[:16]}, needed {str(value)[:16]}")


def _decode(reader: UpdateReader, record: UpdateRecord) -> Update:
    """Read an update and check that it belongs to this base and adapter and has the plan's shapes."""
    expected = {"base_sha256": reader.run.base_sha256, "global_sha256": reader.start.adapter.sha256}
    _require(record, record.edge_id, **expected)
    edge_plan = reader.run.plan.edges[record.edge_id]
    start = reader.start_of(edge_plan)
    update = Update(record.edge_id, start, reader.trained(record, start), record.num_examples)
    check_update(update, edge_plan.ranks)
    return update


def _before_previous(run: StoredRun, round_index: int) -> Adapter | None:
    if not run.config.aggregation.server_momentum or round_index == 1:
        return None
    return read_global(run.store, run.keys, round_index - 1, run.config.coordinator_signs)[1]
