"""An edge's own config, `edge.yaml`: where its rows are and what its machine may give. It never leaves the edge."""

import os
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError

from fedpipe_core.config import EdgeSpec, FederationConfig, Name, PublicKey, Spec
from fedpipe_core.config_file import describe_faults
from fedpipe_core.errors import ConfigError
from fedpipe_core.signatures import SigningKey, load_key

EDGE_CONFIG_VARIABLE = "FEDPIPE_EDGE_CONFIG"
GIB = 2**30


class EdgeDataSpec(Spec):
    """Where the edge's rows are, and what its columns are called where that differs from the federation's config."""

    train: str = Field(description="Training rows (.jsonl, .csv or .parquet, .gz too); relative to this file")
    validation: str | None = Field(
        None, description="Rows on which this edge judges rounds, a file as above; a share of `train` when left out"
    )
    text_column: str | None = Field(None, description="Column with the text; the federation's when left out")
    label_column: str | None = Field(None, description="Column with the label; the federation's when left out")
    prompt_column: str | None = Field(None, description="Column with the prompt; the federation's when left out")
    completion_column: str | None = Field(None, description="Column with what follows; the federation's when left out")
    messages_column: str | None = Field(None, description="Column with the messages; the federation's when left out")
    instruction_column: str | None = Field(None, description="Column with the task; the federation's when left out")
    input_column: str | None = Field(None, description="Column with the input; the federation's when left out")
    output_column: str | None = Field(None, description="Column with the answer; the federation's when left out")


class EdgeConfig(Spec):
    """What one edge keeps to itself."""

    edge_id: Name = Field(description="Name of this edge in the federation's config")
    data: EdgeDataSpec
    base: str | None = Field(
        None, description="This machine's copy of the base model, a folder; the federation's `model.base` when left out"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to train: `cuda` fails without a GPU, `cpu` leaves one alone, `auto` takes one"
    )
    memory_gib: float | None = Field(
        None, gt=0, le=1e5, description="Most memory training may use, in GiB; what is free or declared when left out"
    )
    threads: PositiveInt | None = Field(None, description="CPU threads of training; the number of cores when left out")
    store: str | None = Field(
        None, description="Address of the store as this machine reaches it; the coordinator's when left out"
    )
    state: str = Field(".fedpipe/edges", description="Folder of what is kept between rounds; relative to this file")
    trust_remote_code: bool = Field(
        False, description="Whether a federation may have Python code of its base model run on this machine"
    )

    key: str | None = Field(
        None, description="File of this edge's private key (`fedpipe edge keygen`); relative to this file"
    )
    coordinator_key: PublicKey | None = Field(
        None,
        description="Public key that must have signed what this edge is told to do; nobody need have when left out, "
        "which only a federation with `signing.mode: off` accepts",
    )

    @property
    def memory_bytes(self) -> int | None:
        """The limit on memory in bytes."""
        return None if self.memory_gib is None else round(self.memory_gib * GIB)


def load_edge_config(path: str | Path) -> EdgeConfig:
    """Read an `edge.yaml` and make its paths absolute. Raises ConfigError with every fault and its place."""
    path = Path(path)
    try:
        config = EdgeConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"edge config {path} does not exist; give the path of this machine's edge.yaml") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"edge config {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ConfigError(f"{path} has {describe_faults(error)}") from None
    folder = path.absolute().parent
    rows = {name: str(folder / value) for name in ("train", "validation") if (value := getattr(config.data, name))}
    data = config.data.model_copy(update=rows)
    places = {name: str(folder / value) for name in ("base", "key", "state") if (value := getattr(config, name))}
    return config.model_copy(update={"data": data, **places})


def find_edge_config() -> EdgeConfig:
    """The edge config that FEDPIPE_EDGE_CONFIG names. Raises ConfigError when it names none."""
    path = os.environ.get(EDGE_CONFIG_VARIABLE)
    if not path:
        raise ConfigError(
            f"{EDGE_CONFIG_VARIABLE} is not set on this machine, so its rows are unknown; start the worker with "
            f"{EDGE_CONFIG_VARIABLE}=/path/to/edge.yaml"
        )
    return load_edge_config(path)


def config_at_edge(config: FederationConfig, own: EdgeConfig) -> FederationConfig:
    """The federation's config as it holds at this edge: its own rows, columns and copy of the base.

    Raises ConfigError when the federation has no such edge, or wants to run code that this edge does not trust.
    """
    if own.edge_id not in {edge.edge_id for edge in config.edges}:
        raise ConfigError(
            f"{own.edge_id}: federation {config.name} lists no such edge; correct edge_id in edge.yaml, or the config"
        )
    if config.model.trust_remote_code and not own.trust_remote_code:
        raise ConfigError(
            f"{own.edge_id}: federation {config.name} would run Python code of {config.model.base} here; "
            "set trust_remote_code in edge.yaml to allow it"
        )
    rows = {"validation": "", **own.data.model_dump(exclude_none=True), "partition": None}
    data = config.data.model_copy(update=rows)
    model = config.model if own.base is None else config.model.model_copy(update={"base": own.base})
    return config.model_copy(update={"data": data, "model": model})


def signing_key_at_edge(config: FederationConfig, own: EdgeConfig) -> SigningKey | None:
    """The key with which this edge signs, None in a federation where nobody does.

    Raises ConfigError when edge and federation do not agree on keys.
    """
    spec = next(edge for edge in config.edges if edge.edge_id == own.edge_id)
    if config.signing.mode != "required":
        return None
    if own.coordinator_key != config.signing.coordinator_key:
        raise ConfigError(
            f"{own.edge_id}: federation {config.name} is signed with {config.signing.coordinator_key}, and edge.yaml "
            f"says coordinator_key {own.coordinator_key}; ask its coordinator for the key by another way, then set it"
        )
    if own.key is None:
        raise ConfigError(
            f"{own.edge_id}: federation {config.name} needs signed records and edge.yaml names no key; make one with "
            "`fedpipe edge keygen FILE`, set `key` in edge.yaml, and have the federation list the public key"
        )
    key = load_key(Path(own.key))
    require_key(key, spec)
    return key


def require_key(key: SigningKey, spec: EdgeSpec) -> None:
    """Raise ConfigError unless this is the key that the federation lists for the edge."""
    if key.public != spec.public_key:
        raise ConfigError(
            f"{spec.edge_id}: its key is {key.public}, and the federation lists {spec.public_key}; correct public_key "
            "in the federation's config, or `key` in edge.yaml"
        )
