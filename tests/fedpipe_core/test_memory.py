from collections.abc import Callable

import pytest
from tiny_models import tiny_examples

from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.batches import Batch, pad_batch
from fedpipe_core.edge_model import EdgeModel, build_edge_model, count_parameters
from fedpipe_core.memory import OPTIMIZER_COPIES, training_memory_bytes
from fedpipe_core.model import Base


def edge_model(base: Base, rank: int = 2, checkpointing: bool = False) -> EdgeModel:
    return build_edge_model(base.model, dict.fromkeys(adaptable_modules(base.model), rank), rank, 1.0, checkpointing)


def batch_of(size: int) -> Batch:
    return pad_batch(tiny_examples(size), list(range(size)))


def weights_bytes(base: Base) -> int:
    return sum(parameter.nbytes for parameter in base.model.parameters())


def test_memory_holds_the_weights_and_three_copies_of_what_is_trained(tiny_base: Callable[..., Base]) -> None:
    base = tiny_base("bert")
    edge = edge_model(base)
    trained = 4 * count_parameters([*edge.adapter_parameters(), *edge.head_parameters()])
    found = training_memory_bytes(edge, batch_of(1))
    assert found > weights_bytes(base) + (OPTIMIZER_COPIES + 1) * trained - 4 * count_parameters(edge.head_parameters())


def test_memory_grows_with_batch_and_rank(tiny_base: Callable[..., Base]) -> None:
    base = tiny_base("bert")
    small = training_memory_bytes(edge_model(base), batch_of(2))
    assert training_memory_bytes(edge_model(base), batch_of(16)) > small
    assert training_memory_bytes(edge_model(base, rank=8), batch_of(2)) > small


def test_kept_activations_are_proportional_to_the_examples(tiny_base: Callable[..., Base]) -> None:
    edge = edge_model(tiny_base("bert"))
    examples = tiny_examples(1)
    one, two, four = (training_memory_bytes(edge, pad_batch(examples, [0] * size)) for size in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


def test_checkpointing_keeps_less(tiny_base: Callable[..., Base]) -> None:
    base = tiny_base("bert")
    kept, recomputed = (training_memory_bytes(edge_model(base, checkpointing=on), batch_of(16)) for on in (False, True))
    assert recomputed < kept


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_base_weighs_less(tiny_base: Callable[..., Base], bits: int) -> None:
    batch = batch_of(1)
    dense = training_memory_bytes(edge_model(tiny_base("bert")), batch)
    assert training_memory_bytes(edge_model(tiny_base("bert", bits)), batch) < dense
