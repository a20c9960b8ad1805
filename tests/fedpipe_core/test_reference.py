"""The reference config, read back as a user's file and against the model it documents."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config, parse_config
from fedpipe_core.reference import EXAMPLES, render_reference


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a model and of the sections in it, by its path; a list of sections has an item 0."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for section in sections(field.annotation):
            in_list = section is not field.annotation and "tuple" in str(field.annotation)
            yield from fields(section, f"{prefix}{name}.{'0.' if in_list else ''}")


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models named in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def value_at(document: Any, path: str) -> Any:
    """The value a path of the reference points to; KeyError when there is none."""
    for part in path.split("."):
        document = document[int(part)] if part.isdigit() else document[part]
    return document


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """The document with these values at these paths and nothing else; the one list there is has one item."""
    document: dict[str, Any] = {}
    for path, value in values.items():
        *parents, leaf = path.replace("edges.0", "edges").split(".")
        target = document
        for part in parents:
            target = target.setdefault(part, {})
        target[leaf] = value
    return document | {"edges": [document["edges"]]}


FIELDS = dict(fields(FederationConfig))


@pytest.fixture(scope="module")
def document() -> Any:
    """The reference as a YAML reader sees it."""
    return yaml.safe_load(render_reference())


def test_reference_is_a_config_that_load_config_accepts(tmp_path: Path) -> None:
    path = tmp_path / "reference.yaml"
    path.write_text(render_reference(), encoding="utf-8")
    assert load_config(path).data.labels == EXAMPLES["data.labels"]


@pytest.mark.parametrize("path", FIELDS)
def test_reference_shows_every_key_with_its_path_and_effect(path: str, document: Any) -> None:
    value_at(document, path)
    field, text = FIELDS[path], " ".join(render_reference().replace("#", "").split())
    assert f" {path} · " in text
    assert " ".join((field.description or "").split()) in text


def test_examples_are_given_for_keys_that_exist() -> None:
    assert set(EXAMPLES) <= set(FIELDS)


def test_values_without_an_example_are_the_defaults(document: Any) -> None:
    assert parse_config(document) == parse_config(nested(EXAMPLES))


def test_reference_needs_no_torch() -> None:
    code = "import sys, fedpipe_core.reference as r; r.render_reference(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
