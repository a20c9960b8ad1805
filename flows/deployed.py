"""What differs when a worker runs a flow for a deployment: every place must outlast the folder it runs in.

A worker runs a flow in a temporary folder, where a path relative to it names nothing that was there before and nothing
that stays. A flow that the command line runs is left alone.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import runtime

from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config
from fedpipe_core.errors import ConfigError


def read_config(path: str) -> dict[str, Any]:
    """Read a config for a deployment's parameters, with absolute paths: a build step of `prefect.yaml`.

    Its outputs are `config`, with the keys that the file gives, and `store`.
    """
    config = load_config(path)
    if "://" not in config.store:
        config = config.model_copy(update={"store": str(Path(config.store).absolute())})
    return {"config": config.model_dump(mode="json", exclude_unset=True), "store": config.store}


def require_lasting_places(config: FederationConfig) -> None:
    """Raise ConfigError when a worker runs this federation and would look for, or leave, files in its own folder."""
    if runtime.deployment.id is None:
        return
    files = {f"data.{name}": getattr(config.data, name) for name in ("train", "test", "validation")}
    check_paths({"store": config.store, **files})
    if "://" in config.store and not (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise ConfigError(
            f"store {config.store} has no folder beside it for MLflow's records, and a worker's own folder does not "
            "stay; give tracking.uri the address of an MLflow server, or set MLFLOW_TRACKING_URI for the worker"
        )


def require_lasting_store(store: str) -> None:
    """Raise ConfigError when a worker runs this release and the store is relative to its own folder."""
    if runtime.deployment.id is not None:
        check_paths({"store": store})


def check_paths(places: Mapping[str, str]) -> None:
    """Raise ConfigError unless every place, by the key that names it, is an absolute path or an address."""
    relative = [
        f"{key} {place!r}"
        for key, place in places.items()
        if place and "://" not in place and not Path(place).is_absolute()
    ]
    if relative:
        raise ConfigError(
            f"a worker runs this flow in a temporary folder, where the relative {', '.join(relative)} would be lost; "
            "give absolute paths of the worker's machine, or s3://bucket/prefix for the store"
        )
