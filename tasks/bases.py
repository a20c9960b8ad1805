"""Base models that edges and coordinator of one process share, each loaded once per bit width."""

import functools
import threading

import torch

from fedpipe_core.config import FederationConfig, ModelSpec
from fedpipe_core.model import Base, load_base
from tasks.edge_models import let_go_of_idle_models

_loading = threading.Lock()


@functools.lru_cache(maxsize=4)
def _loaded_base(spec: ModelSpec, labels: int | None, bits: int, seed: int) -> Base:
    return load_base(spec, labels, bits, seed)


def shared_base(config: FederationConfig, bits: int) -> Base:
    """The base at a bit width, loaded once per process however many edges use it."""
    with _loading:
        return _loaded_base(config.model, config.data.labels, bits, config.seed)


def dense_bits(config: FederationConfig) -> int:
    """Width of the unquantized base: the widest of the menu, or what the device computes in."""
    widest = max(config.model.bits)
    return widest if widest >= 16 else 16 if torch.cuda.is_available() else 32


def dense_base(config: FederationConfig) -> Base:
    """The base unquantized, on which adapters are judged and merged."""
    return shared_base(config, dense_bits(config))


def let_go_of_bases() -> None:
    """Free every base that nothing else holds, in a process that serves one edge: it trains on another width."""
    let_go_of_idle_models()
    with _loading:
        _loaded_base.cache_clear()
