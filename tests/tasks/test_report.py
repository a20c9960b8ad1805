import shutil
from pathlib import Path

import pytest

from fedpipe_core.errors import ConfigError
from fedpipe_core.report import render_page
from fedpipe_core.report.facts import importance
from tasks.records import RunKeys
from tasks.report import read_facts
from tasks.storage import ObjectStore, open_store

KEYS = RunKeys("run")


@pytest.fixture
def store(finished_store: Path, tmp_path: Path) -> ObjectStore:
    return open_store(str(shutil.copytree(finished_store, tmp_path / "store")))


def test_refused_update_is_told_with_its_reason(store: ObjectStore) -> None:
    page = render_page(read_facts(store, KEYS))
    assert "north: its update&#x27;s run is elsewhere" in page
    assert "not released" in page


def test_run_in_its_first_round_has_a_page(store: ObjectStore) -> None:
    for key in store.list("run/rounds"):
        store.delete(key)
    facts = read_facts(store, KEYS)
    assert facts.rounds == []
    assert "0 of 2 rounds" in render_page(facts)


def test_importance_of_all_modules_sums_to_one(store: ObjectStore) -> None:
    assert sum(importance(read_facts(store, KEYS).profiles).values()) == pytest.approx(1)


def test_run_without_a_plan_has_no_page(store: ObjectStore) -> None:
    store.delete(KEYS.plan)
    with pytest.raises(ConfigError, match="run run has no plan yet in"):
        read_facts(store, KEYS)
