from pathlib import Path
from typing import Any

import pytest
import yaml
from planning_cases import make_config

from fedpipe_core.config import FederationConfig
from fedpipe_core.edge_config import config_at_edge, find_edge_config, load_edge_config
from fedpipe_core.errors import ConfigError


def written(folder: Path, **document: Any) -> Path:
    path = folder / "edge.yaml"
    path.write_text(yaml.safe_dump({"edge_id": "east", "data": {"train": "rows.jsonl"}, **document}), encoding="utf-8")
    return path


@pytest.fixture
def federation() -> FederationConfig:
    return make_config(["east", "west"])


def test_paths_are_relative_to_the_edges_own_file(tmp_path: Path) -> None:
    own = load_edge_config(written(tmp_path, base="model"))
    assert (own.data.train, own.base) == (str(tmp_path / "rows.jsonl"), str(tmp_path / "model"))
    assert own.state == str(tmp_path / ".fedpipe/edges")
    assert own.memory_bytes is None


def test_absolute_paths_stay(tmp_path: Path) -> None:
    assert load_edge_config(written(tmp_path, data={"train": "/rows.jsonl"})).data.train == "/rows.jsonl"


def test_every_fault_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)edge.yaml has 2 faults.*memory_gib: .*gpu: unknown key"):
        load_edge_config(written(tmp_path, memory_gib=0, gpu=True))


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"edge config .*edge.yaml does not exist; give the path"):
        load_edge_config(tmp_path / "edge.yaml")


def test_file_that_is_no_yaml_is_told(tmp_path: Path) -> None:
    (tmp_path / "edge.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_edge_config(tmp_path / "edge.yaml")


def test_worker_without_an_edge_config_is_told_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDPIPE_EDGE_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="start the worker with FEDPIPE_EDGE_CONFIG="):
        find_edge_config()
    monkeypatch.setenv("FEDPIPE_EDGE_CONFIG", str(written(tmp_path)))
    assert find_edge_config().edge_id == "east"


def test_edge_reads_its_own_rows_columns_and_base(tmp_path: Path, federation: FederationConfig) -> None:
    own = load_edge_config(written(tmp_path, base="model", data={"train": "rows.jsonl", "text_column": "words"}))
    found = config_at_edge(federation, own)
    assert (found.data.train, found.data.text_column) == (str(tmp_path / "rows.jsonl"), "words")
    assert found.data.label_column == federation.data.label_column
    assert (found.data.partition, found.model.base) == (None, str(tmp_path / "model"))
    assert found.training == federation.training


def test_edge_that_the_federation_does_not_list_is_refused(tmp_path: Path, federation: FederationConfig) -> None:
    with pytest.raises(ConfigError, match=r"north: federation .* lists no such edge; correct edge_id"):
        config_at_edge(federation, load_edge_config(written(tmp_path, edge_id="north")))


def test_code_of_the_base_runs_only_where_the_edge_trusts_it(tmp_path: Path, federation: FederationConfig) -> None:
    model = federation.model.model_copy(update={"trust_remote_code": True})
    wanted = federation.model_copy(update={"model": model})
    with pytest.raises(ConfigError, match=r"east: .* would run Python code of .* here; set trust_remote_code"):
        config_at_edge(wanted, load_edge_config(written(tmp_path)))
    assert config_at_edge(wanted, load_edge_config(written(tmp_path, trust_remote_code=True)))


def test_rows_to_judge_on_are_the_edges_own_file_or_a_share_of_its_rows(
    tmp_path: Path, federation: FederationConfig
) -> None:
    named = federation.model_copy(update={"data": federation.data.model_copy(update={"validation": "/central.csv"})})
    own = load_edge_config(written(tmp_path, data={"train": "rows.jsonl", "validation": "kept.jsonl"}))
    assert config_at_edge(named, own).data.validation == str(tmp_path / "kept.jsonl")
    assert config_at_edge(named, load_edge_config(written(tmp_path))).data.validation == ""
