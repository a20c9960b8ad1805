"""Where adapters start, and how one is split between an edge's training and its frozen tail."""

import torch
from default_dtype import half_precision
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.adapters import (
    Adapter,
    fresh_for_edge,
    initial_adapter,
    joined,
    split_for_edge,
    truncated_for_edge,
)
from fedpipe_core.low_rank import LowRank
from fedpipe_core.profile_schemas import ModuleShape

SHAPES = {
    "query": ModuleShape(out_features=12, in_features=16),
    "value": ModuleShape(out_features=8, in_features=16),
}


def _adapter(rank: int, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        module: LowRank(
            torch.randn(shape.out_features, rank, generator=generator),
            torch.randn(rank, shape.in_features, generator=generator),
        )
        for module, shape in SHAPES.items()
    }
    return Adapter(factors, {"weight": torch.randn(3, 8, generator=generator)})


def test_the_initial_adapter_leaves_the_base_as_it_is_and_depends_on_seed_and_module_alone():
    first, again = initial_adapter(SHAPES, 4, {}, seed=1), initial_adapter({"value": SHAPES["value"]}, 6, {}, seed=1)
    assert float(first.factors["query"].dense().abs().max()) == 0.0
    assert torch.equal(first.factors["value"].A, again.factors["value"].A[:4])
    assert not torch.equal(first.factors["query"].A, first.factors["value"].A)
    assert not torch.equal(first.factors["value"].A, initial_adapter(SHAPES, 4, {}, seed=2).factors["value"].A)
    assert float(first.factors["query"].A.abs().max()) <= 1 / 4


def test_the_first_adapter_does_not_depend_on_a_default_dtype_that_another_thread_has_set():
    usual = initial_adapter(SHAPES, 4, {}, seed=1).factors["value"]
    with half_precision():
        found = initial_adapter(SHAPES, 4, {}, seed=1).factors["value"]
    assert found.equals(usual)
    assert found.B.dtype == torch.float32


def test_the_initial_adapter_has_the_same_bytes_on_every_machine():
    A = initial_adapter({"m": ModuleShape(out_features=2, in_features=4)}, 1, {}, seed=0).factors["m"].A
    torch.testing.assert_close(
        A,
        torch.tensor([[-0.10364657640457153, 0.08799493312835693, 0.19107604026794434, -0.47170329093933105]]),
        rtol=0,
        atol=0,
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 8)), st.integers(0, 99))
def test_the_trained_part_and_its_tail_are_exactly_the_adapter(rank, ranks, seed):
    adapter = _adapter(rank, seed)
    trained, tail = split_for_edge(adapter, ranks, seed=5)
    assert trained.ranks == ranks
    whole = joined(trained, tail)
    for module, factors in adapter.factors.items():
        torch.testing.assert_close(whole.factors[module].dense(), factors.dense(), rtol=1e-5, atol=1e-5)
        parts = trained.factors[module].rank if module in ranks else 0
        assert (module in tail) == (rank > parts)


def test_components_that_do_not_exist_start_fresh_and_alike_for_all_ranks():
    adapter = _adapter(2)
    small, _ = split_for_edge(adapter, {"query": 4}, seed=5)
    large, _ = split_for_edge(adapter, {"query": 7}, seed=5)
    assert torch.equal(small.factors["query"].A, large.factors["query"].A[:4])
    assert not bool(small.factors["query"].B[:, 2:].any())
    assert bool(small.factors["query"].A[2:].any(dim=1).all())


def test_a_dead_component_moves_to_the_tail_and_its_place_is_trained_anew():
    factors = _adapter(3).factors["query"]
    dead = LowRank(factors.B, factors.A * torch.tensor([1.0, 1e-6, 1.0])[:, None])
    trained, tail = split_for_edge(Adapter({"query": dead}, {}), {"query": 3}, seed=5)
    assert tail["query"].rank == 1
    assert not bool(trained.factors["query"].B[:, 1].any())
    assert float(trained.factors["query"].A[1].norm()) > 0.1
    torch.testing.assert_close(joined(trained, tail).factors["query"].dense(), dead.dense())


def test_the_initial_adapter_is_trained_with_the_factors_it_has():
    adapter = initial_adapter(SHAPES, 4, {}, seed=1)
    trained, tail = split_for_edge(adapter, {"query": 2}, seed=9)
    assert torch.equal(trained.factors["query"].A, adapter.factors["query"].A[:2])
    assert tail == {}


def test_a_truncated_start_drops_the_tail_of_trained_modules_only():
    trained, tail = truncated_for_edge(_adapter(4), {"query": 2}, seed=5)
    assert trained.ranks == {"query": 2}
    assert list(tail) == ["value"]


def test_a_fresh_start_freezes_everything_learned_and_begins_at_zero():
    adapter = _adapter(4)
    trained, tail = fresh_for_edge(adapter, {"query": 2}, seed=5)
    assert not bool(trained.factors["query"].B.any())
    assert tail["query"].equals(adapter.factors["query"])
    assert tail["value"].equals(adapter.factors["value"])
