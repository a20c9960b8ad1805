from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpipe_core.config import FederationConfig
from fedpipe_core.edge_config import EdgeConfig, load_edge_config
from fedpipe_core.errors import ConfigError, DataError, StoreError
from fedpipe_core.plan_schemas import FederationPlan
from fedpipe_core.signatures import new_key, save_key
from tasks.coordinator import Coordinator
from tasks.edge_check import check_edge


def own(folder: Path, config: FederationConfig, **changes: Any) -> EdgeConfig:
    rows = config.data.train.replace("{edge_id}", "east")
    path = folder / "edge.yaml"
    document = {"edge_id": "east", "data": {"train": rows}, "device": "cpu", "threads": 1, **changes}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_edge_config(path)


def test_edge_is_told_its_rows_device_memory_and_key(tiny_config: FederationConfig, tmp_path: Path) -> None:
    key = new_key()
    save_key(key, tmp_path / "key.pem")
    found = check_edge(own(tmp_path, tiny_config, memory_gib=0.001, key="key.pem"), None)
    assert (found["edge_id"], found["device"], found["threads"]) == ("east", "cpu", 1)
    assert (found["rows"], found["columns"]) == (60, ["label", "name", "text"])
    assert (found["memory_bytes"], found["public_key"]) == (round(0.001 * 2**30), key.public)


def test_what_the_edge_would_report_is_printed_and_not_published(
    coordinator: Coordinator, plan: FederationPlan, tmp_path: Path
) -> None:
    store = coordinator.store
    store.delete(coordinator.keys.profile("east"))
    before = store.list()
    found = check_edge(own(tmp_path, coordinator.config, store=store.root), "run")
    assert (found["profile"]["edge_id"], found["profile"]["num_examples"]) == ("east", 54)
    tokens = found["tokens"]
    assert tokens["length_percentiles"]["100"] == found["profile"]["longest_example_tokens"]
    assert (tokens["cut_share"], tokens["dropped_share"]) == (0, 0)
    assert tokens["example"].startswith("[CLS]")
    assert store.list() == before


def test_faults_are_those_that_would_stop_the_edge(tiny_config: FederationConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl"):
        check_edge(own(tmp_path, tiny_config, data={"train": "none.jsonl"}), None)
    with pytest.raises(StoreError, match="there is no such folder"):
        check_edge(own(tmp_path, tiny_config, store=str(tmp_path / "nowhere")), None)
    with pytest.raises(ConfigError, match=r"key .*key.pem cannot be read"):
        check_edge(own(tmp_path, tiny_config, key="key.pem"), None)
    with pytest.raises(ConfigError, match="--run needs the address of the store; set `store`"):
        check_edge(own(tmp_path, tiny_config), "run")
