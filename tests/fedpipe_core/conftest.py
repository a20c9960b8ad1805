"""Tiny models that the tests of the core share: written once, loaded once per bit width."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import LABELS, save_tiny_model, save_tiny_writer

from fedpipe_core.config import ModelSpec
from fedpipe_core.model import Base, load_base


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model, by architecture."""

    @functools.cache
    def folder(architecture: str) -> Path:
        return save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)

    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_folder: Callable[[str], Path]) -> Callable[..., Base]:
    """A tiny model in memory, by architecture and bits; tests must leave it as it was."""

    @functools.cache
    def base(architecture: str, bits: int = 32) -> Base:
        return load_base(ModelSpec(base=str(tiny_folder(architecture))), LABELS, bits, seed=0)

    return base


@pytest.fixture(scope="session")
def tiny_writer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    """A tiny causal language model in memory, by architecture and bits; tests must leave it as it was."""

    @functools.cache
    def folder(architecture: str) -> Path:
        return save_tiny_writer(tmp_path_factory.mktemp(architecture), architecture)

    @functools.cache
    def base(architecture: str, bits: int = 32) -> Base:
        return load_base(ModelSpec(base=str(folder(architecture)), task="causal-lm"), None, bits, seed=0)

    return base
