from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import parse_config
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


def test_smallest_config_is_accepted() -> None:
    config = parse_config(document())
    assert [edge.edge_id for edge in config.edges] == ["east", "west"]
    assert config.rounds == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speed": 1}, "speed: unknown key; remove it or correct its name, found 1"),
        ({"name": "Not A Name"}, "name: String should match pattern"),
        ({"rounds": "many"}, "rounds: Input should be a valid integer.*found 'many'"),
        ({"edges": []}, "edges: .*at least 1 item"),
        ({"edges": [{"edge_id": "a"}, {"edge_id": "a"}]}, "edge_id 'a' is used 2 times"),
        ({"min_edges": 3}, "min_edges is 3 but only 2 edges are listed"),
        ({"data": {"train": "all.csv", "test": "t.csv", "labels": 2}}, "data.train is one file for all edges"),
        ({"data": {"train": "a", "test": "b", "labels": 1}}, "data.labels: .*greater than or equal to 2"),
        ({"release": {"exports": ["adapter"]}}, "release: exports lacks `merged`, the form that is registered"),
        ({"model": {}}, "model.base: is required"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"evaluation": {"at": "clinics"}}, "evaluation.at: Input should be 'coordinator', 'edges' or 'both'"),
    ],
)
def test_fault_is_told_with_its_place(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(document(**changes))


def test_partition_by_column_needs_the_column_and_every_edges_values() -> None:
    data = {"train": "all.csv", "test": "t.csv", "labels": 2, "partition": {"by": "column"}}
    with pytest.raises(ConfigError, match="`by: column` needs `column`"):
        parse_config(document(data=data))
    data["partition"] = {"by": "column", "column": "domain"}
    with pytest.raises(ConfigError, match=r"edge 'east' names no `values`.*; edge 'west' names no `values`"):
        parse_config(document(data=data))


def test_values_without_a_partition_by_column_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"edge 'east' names `values` but data.partition is not `by: column`"):
        parse_config(document(edges=[{"edge_id": "east", "values": ["bank"]}, {"edge_id": "west"}]))


def test_config_survives_json() -> None:
    config = parse_config(document(planning={"ranks": [8, 2, 2]}))
    assert FederationConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.planning.ranks == (2, 8)


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(document()).rounds = 9  # type: ignore[misc]


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for annotation in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from sections(annotation)


def test_every_plain_field_is_described() -> None:
    undescribed = [
        f"{model.__name__}.{name}"
        for model in sections(FederationConfig)
        for name, field in model.model_fields.items()
        if field.description is None
        and not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    ]
    assert undescribed == []


WRITER = {
    "model": {"base": "model", "task": "causal-lm"},
    "data": {"train": "{edge_id}.csv", "test": "test.csv", "format": "completion"},
}


def test_smallest_config_of_a_language_model_is_accepted() -> None:
    config = parse_config(document(**WRITER))
    assert (config.data.labels, config.evaluation.generate, config.release.metric) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": WRITER["model"]},
            "data.format is label, but model.task causal-lm reads rows of format completion, messages",
        ),
        ({"data": WRITER["data"]}, "data.format is completion, but .* reads rows of format label; data.labels"),
        (
            {"release": {"metric": "bleu"}},
            "release.metric is bleu, which is not measured: accuracy, macro_f1, loss are",
        ),
        (
            {**WRITER, "data": {**WRITER["data"], "format": "text"}, "evaluation": {"generate": {}}},
            "evaluation.generate needs prompts, which data.format text has not",
        ),
        ({**WRITER, "release": {"metric": "accuracy"}}, "not measured: loss, perplexity, token_accuracy are"),
        ({**WRITER, "release": {"metric": "bleu"}}, "not measured: loss, perplexity, token_accuracy are"),
        ({**WRITER, "evaluation": {"generate": {"answer_pattern": "("}}}, "answer_pattern: '\\(' is no regular expr"),
    ],
)
def test_task_data_and_metric_must_fit_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(document(**changes))


def test_text_that_is_written_may_decide_promotion() -> None:
    evaluation = {"generate": {"metrics": ["bleu"]}}
    config = parse_config(document(**WRITER, evaluation=evaluation, release={"metric": "bleu"}))
    assert config.release.metric == "bleu"


def test_edges_on_machines_of_their_own_need_a_word_on_signing() -> None:
    edges = [{"edge_id": "east", "work_pool": "edges"}]
    with pytest.raises(ConfigError, match=r"signing.mode is missing, which edges with a work_pool need"):
        parse_config(document(edges=edges))
    assert parse_config(document(edges=edges, signing={"mode": "off"})).coordinator_signs is None


def test_a_bare_off_in_yaml_is_a_word() -> None:
    assert parse_config(document(signing={"mode": yaml.safe_load("off")})).signing.mode == "off"


def test_signing_needs_every_remote_edges_key_and_the_coordinators() -> None:
    edges = [{"edge_id": "east", "work_pool": "edges"}, {"edge_id": "west"}]
    with pytest.raises(ConfigError, match=r"(?s)signing.coordinator_key is missing.*edge 'east' has no public_key"):
        parse_config(document(edges=edges, signing={"mode": "required"}))


def test_rows_of_remote_edges_are_not_in_the_config_and_those_of_local_ones_are() -> None:
    data = {"test": "test.jsonl", "labels": 3}
    remote, local = {"edge_id": "east", "work_pool": "edges"}, {"edge_id": "west"}
    assert parse_config(document(edges=[remote], data=data, signing={"mode": "off"})).local_edges == ()
    with pytest.raises(ConfigError, match=r"data.train is missing, the rows of edge 'west'"):
        parse_config(document(edges=[remote, local], data=data, signing={"mode": "off"}))
    with pytest.raises(ConfigError, match="edge 'west' names work_queue 'q' but no work_pool"):
        parse_config(document(edges=[local | {"work_queue": "q"}]))


@pytest.mark.parametrize(
    ("at", "test", "coordinator", "edges"),
    [
        (None, "test.csv", True, False),
        ("coordinator", "test.csv", True, False),
        ("both", "test.csv", True, True),
        (None, None, False, True),
        ("edges", None, False, True),
    ],
)
def test_who_judges_follows_from_the_key_or_else_from_the_test_file(
    at: str | None, test: str | None, coordinator: bool, edges: bool
) -> None:
    data = {"train": "{edge_id}.csv", "labels": 3} | ({"test": test} if test else {})
    config = parse_config(document(data=data, evaluation={"at": at}))
    assert (config.coordinator_judges, config.edges_judge) == (coordinator, edges)


@pytest.mark.parametrize(
    ("evaluation", "data", "more", "words"),
    [
        ("coordinator", {}, {}, "evaluation.at is coordinator, but data.test, .* is missing; name the file, or say"),
        ("both", {}, {}, "evaluation.at is both, but data.test, .* is missing"),
        ("edges", {"test": "t.csv"}, {}, "evaluation.at is edges, but data.test names rows at the coordinator"),
        (None, {"validation_fraction": 0}, {}, "validation rows, of which data.validation_fraction 0 keeps none"),
        ("both", {"test": "t.csv", "validation_fraction": 0}, {}, "data.validation_fraction 0 keeps none; raise it"),
        (None, {"label_name_column": "name"}, {}, "data.label_name_column is a column of data.test, which is missing"),
        (None, {}, {"release": {"slice_column": "ward"}}, "release.slice_column is a column of data.test"),
    ],
)
def test_judges_without_rows_are_told_in_one_sentence(
    evaluation: str | None, data: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    rows = {"train": "{edge_id}.csv", "labels": 3, **data}
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(document(data=rows, evaluation={"at": evaluation}, **more))
    assert str(caught.value).startswith("config has 1 fault ")


def test_a_file_of_rows_to_judge_on_takes_the_place_of_a_share() -> None:
    data = {"train": "{edge_id}.csv", "validation": "{edge_id}-kept.csv", "labels": 3, "validation_fraction": 0}
    assert parse_config(document(data=data)).edges_judge
