from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.config_file import load_config, parse_config
from fedpipe_core.errors import ConfigError


def document(**changes: Any) -> dict[str, Any]:
    """The smallest config that is accepted, with changes."""
    return {
        "name": "test",
        "model": {"base": "model"},
        "data": {"train": "{edge_id}.csv", "test": "test.csv", "labels": 3},
        "edges": [{"edge_id": "east"}, {"edge_id": "west"}],
        **changes,
    }


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(document(speed=1, rounds=0, seed=-1), source="here.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "here.yaml has 3 faults (`fedpipe schema` prints what is allowed):"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["seed", "rounds", "speed"]


def test_list_with_a_wrong_item_is_not_also_called_too_short() -> None:
    with pytest.raises(ConfigError, match="1 fault ") as caught:
        parse_config(document(model={"base": "model", "bits": [3]}))
    assert "model.bits.0: Input should be 4, 8, 16 or 32, found 3" in str(caught.value)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(document(rounds="x" * 1000))
    assert len(str(caught.value)) < 300


def test_data_paths_are_relative_to_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = load_config(write(tmp_path / "federation.yaml", document()))
    assert config.data.test == str(tmp_path / "test.csv")
    assert config.data.train == str(tmp_path / "{edge_id}.csv")
    assert config.model.base == str(tmp_path / "model")


@pytest.mark.parametrize("base", ["package:some_package", "owner/model"])
def test_base_that_is_no_folder_here_stays_as_it_is(tmp_path: Path, base: str) -> None:
    assert load_config(write(tmp_path / "federation.yaml", document(model={"base": base}))).model.base == base


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: [", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"- a\n- b\n", "holds list, needed a mapping"),
        (b"", "holds NoneType, needed a mapping"),
        (b"!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
    ],
)
def test_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "federation.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; give the path of a YAML file"):
        load_config(tmp_path / "federation.yaml")


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("rounds=5", "rounds", 5),
        ("training.learning_rate=0.5", "training.learning_rate", 0.5),
        ("planning.ranks=[4, 2]", "planning.ranks", (2, 4)),
        ("edges.1.edge_id=south", "edges.1.edge_id", "south"),
        ("edges.0.pin.batch_size=4", "edges.0.pin.batch_size", 4),
        ("tracking.uri=http://server:5000", "tracking.uri", "http://server:5000"),
        ("store=a=b", "store", "a=b"),
        ("planning.round_seconds=null", "planning.round_seconds", None),
    ],
)
def test_override_reaches_its_key(tmp_path: Path, override: str, path: str, value: object) -> None:
    found: Any = load_config(write(tmp_path / "federation.yaml", document()), [override])
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value


def test_override_fills_a_section_left_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "federation.yaml", document(training=None))
    assert load_config(path, ["training.warmup_steps=1"]).training.warmup_steps == 1


def test_override_changes_one_place_of_a_yaml_anchor(tmp_path: Path) -> None:
    resources = {"memory_gib": 1.0, "tokens_per_second": 10.0, "bandwidth_mbit": 10.0}
    edges = [{"edge_id": edge_id, "resources": resources} for edge_id in ("east", "west")]
    path = write(tmp_path / "federation.yaml", document(edges=edges))
    assert "*id" in path.read_text(encoding="utf-8")
    config = load_config(path, ["edges.1.resources.memory_gib=2"])
    assert [edge.resources.memory_gib for edge in config.edges if edge.resources] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rounds", "is not KEY=VALUE, for example --set training.learning_rate=0.0005"),
        ("=3", "is not KEY=VALUE"),
        ("name.first=x", "--set name.first: 'first' lies inside a plain value"),
        ("name.first.second=x", "lies inside a plain value"),
        ("edges.9.edge_id=x", "'9' is not an index below 2 of that list"),
        ("edges.last=x", "'last' is not an index below 2"),
        ("edges.-1.edge_id=x", "'-1' is not an index below 2"),
        ("edges.²=x", "'²' is not an index below 2"),
        ("rounds=[1", r"--set rounds: '\[1' is not YAML"),
        ("rounds=0", "rounds: Input should be greater than or equal to 1, found 0"),
    ],
)
def test_override_that_leads_nowhere_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path / "federation.yaml", document()), [override])


@given(key=st.text(max_size=20), value=st.text(max_size=20))
@settings(deadline=None, max_examples=100)
def test_any_override_is_taken_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    write(path, document())
    with suppress(ConfigError):
        load_config(path, [f"{key}={value}"])
