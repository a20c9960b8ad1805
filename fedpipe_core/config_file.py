"""A config file: YAML read, single keys overridden, every fault reported at once with its location.

What a config may say is `fedpipe_core.config`'s; this module turns a file, or a mapping, into it.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> FederationConfig:
    """Read a YAML config, apply `key.path=value` overrides, and make data paths relative to the file's folder.

    Raises ConfigError with every fault and its location.
    """
    path = Path(path)
    document = _read_yaml(path)
    for override in overrides or []:
        _apply_override(document, override)
    config = parse_config(document, source=str(path))
    return _resolve_paths(config, path.parent)


def parse_config(document: dict[str, Any], source: str = "config") -> FederationConfig:
    """Validate a config given as a mapping. Raises ConfigError with every fault and its location."""
    try:
        return FederationConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source} has {describe_faults(error)}") from None


def describe_faults(error: ValidationError) -> str:
    """Every fault of a config with its place, and how many there are."""
    lines = []
    for fault in _root_faults(error):
        location = ".".join(str(part) for part in fault["loc"]) or "the whole"
        found = "" if fault["type"] in ("missing", "value_error") else f", found {_shorten(fault['input'])}"
        lines.append(f"  {location}: {_wording(fault)}{found}")
    count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    return f"{count} (`fedpipe schema` prints what is allowed):\n" + "\n".join(lines)


def _root_faults(error: ValidationError) -> list[Any]:
    """All faults but those that only follow from one inside them: a list whose items are wrong counts as too short."""
    faults = error.errors(include_url=False)
    places = [fault["loc"] for fault in faults]
    follows = {loc for loc in places for inner in places if len(inner) > len(loc) and inner[: len(loc)] == loc}
    return [fault for fault in faults if fault["loc"] not in follows or fault["type"] != "too_short"]


def _wording(fault: Any) -> str:
    known = {"extra_forbidden": "unknown key; remove it or correct its name", "missing": "is required"}
    return known.get(fault["type"], str(fault["msg"]).removeprefix("Value error, "))


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"config {path} holds {type(document).__name__}, needed a mapping of keys to values")
    return {key: _unshared(value) for key, value in document.items()}


def _unshared(value: Any) -> Any:
    """A copy in which what YAML anchors repeat is there once for every place, so that one can be overridden alone."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} is not KEY=VALUE, for example --set training.learning_rate=0.0005")
    *parents, leaf = key.split(".")
    target: Any = document
    for part in parents:
        place = _place(target, part, key)
        if isinstance(target, dict) and target.get(place) is None:
            target[place] = {}  # a section the file leaves out, or empty
        target = target[place]
    target[_place(target, leaf, key)] = _parse_value(key, text)


def _place(target: Any, part: str, key: str) -> str | int:
    """The key or index that one part of an override's path stands for."""
    if isinstance(target, dict):
        return part
    if not isinstance(target, list):
        raise ConfigError(f"--set {key}: {part!r} lies inside a plain value; `fedpipe schema` prints the keys")
    if not part.isdecimal() or int(part) >= len(target):
        raise ConfigError(f"--set {key}: {part!r} is not an index below {len(target)} of that list")
    return int(part)


def _parse_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: {text!r} is not YAML; close its brackets and quotes") from None


def _resolve_paths(config: FederationConfig, folder: Path) -> FederationConfig:
    def resolve(path: str) -> str:
        return path if not path or "://" in path else str((folder / path).resolve())

    base = config.model.base
    local_base = base if base.startswith("package:") or not (folder / base).exists() else resolve(base)
    files = {name: resolve(getattr(config.data, name)) for name in ("train", "test", "validation")}
    data = config.data.model_copy(update=files)
    return config.model_copy(update={"data": data, "model": config.model.model_copy(update={"base": local_base})})
