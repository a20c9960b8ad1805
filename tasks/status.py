"""How far runs are, read from the store alone: it works while a run goes on, after it died, and on another machine."""

from typing import Any

from fedpipe_core.errors import ConfigError
from fedpipe_core.methods import METHODS
from fedpipe_core.result_schemas import RunResult
from fedpipe_core.schemas import FederationRecord
from tasks.records import RunKeys, closed_rounds, get_record, recorded_edges
from tasks.storage import ObjectStore, open_store


def list_runs(root: str) -> list[str]:
    """Names of the runs in a store, sorted."""
    keys = open_store(root, write=False).list()
    return sorted({key.split("/")[0] for key in keys if key.endswith("/federation.json")})


def unreleased_runs(root: str) -> list[str]:
    """Names of the runs whose rounds are all closed and that can have a release and have none, sorted."""
    store = open_store(root, write=False)
    return [run for run in list_runs(root) if _waits_for_release(store, RunKeys(run))]


def _waits_for_release(store: ObjectStore, keys: RunKeys) -> bool:
    record = get_record(store, keys.federation, FederationRecord)
    unreleased = [name for name, traits in METHODS.items() if traits.unreleased]
    if record is None or record.config.get("method") in unreleased:
        return False
    done = len(closed_rounds(store, keys)) == record.config.get("rounds")
    return done and not store.exists(keys.release("report.json"))


def describe_run(root: str, run: str) -> dict[str, Any]:
    """Rounds closed, answers in the open round, last metrics. Raises ConfigError when there is no such run."""
    store, keys = open_store(root, write=False), RunKeys(run)
    record = get_record(store, keys.federation, FederationRecord)
    if record is None:
        raise ConfigError(f"run {run} is not in {store.root}; there are: {', '.join(list_runs(root)) or 'none'}")
    rounds = closed_rounds(store, keys)
    result = get_record(store, keys.result, RunResult)
    return {
        "run": run,
        "store": store.root,
        "status": "completed" if result else "unfinished",
        "planned": store.exists(keys.plan),
        "rounds_closed": len(rounds),
        "rounds": record.config.get("rounds"),
        "open_round_updates": recorded_edges(store, keys.updates(len(rounds) + 1)),
        "metrics": rounds[-1].metrics if rounds else None,
        "adapter_sha256": rounds[-1].adapter_sha256 if rounds else None,
    }
