"""Every rule against a dense float64 reference of its published definition."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpipe_core.adapters import Adapter, fresh_for_edge, split_for_edge, truncated_for_edge
from fedpipe_core.aggregation import Update, aggregate
from fedpipe_core.aggregation_rules import RULES, edge_start
from fedpipe_core.config import AggregationSpec
from fedpipe_core.errors import UpdateRefusedError
from fedpipe_core.low_rank import LowRank

OUT, IN = 9, 13
Edges = list[tuple[LowRank, int]]


@st.composite
def edges(draw, equal_ranks: bool = False) -> Edges:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ranks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    return [
        (
            LowRank(
                torch.randn(OUT, ranks[0] if equal_ranks else r, generator=generator),
                torch.randn(ranks[0] if equal_ranks else r, IN, generator=generator),
            ),
            draw(st.integers(1, 50)),
        )
        for r in ranks
    ]


def _run(rule: str, trained: Edges, previous: LowRank | None = None, start: LowRank | None = None) -> LowRank:
    rank = max(factors.rank for factors, _ in trained)
    previous = previous or LowRank(torch.zeros(OUT, rank), torch.zeros(rank, IN))
    updates = [
        Update(
            f"edge-{i}",
            Adapter({"m": (start or previous).leading(factors.rank)}, {}),
            Adapter({"m": factors}, {}),
            examples,
        )
        for i, (factors, examples) in enumerate(trained)
    ]
    spec = AggregationSpec(rule=rule, energy=1.0, rank_cap=64)
    return aggregate(Adapter({"m": previous}, {}), updates, spec).adapter.factors["m"]


def _shares(trained: Edges) -> list[float]:
    total = sum(examples for _, examples in trained)
    return [examples / total for _, examples in trained]


def _padded(trained: Edges) -> tuple[list[Tensor], list[Tensor]]:
    rank = max(factors.rank for factors, _ in trained)
    Bs = [torch.cat([f.B.double(), torch.zeros(OUT, rank - f.rank)], dim=1) for f, _ in trained]
    As = [torch.cat([f.A.double(), torch.zeros(rank - f.rank, IN)], dim=0) for f, _ in trained]
    return Bs, As


def _assert_same(found: LowRank, reference: Tensor) -> None:
    error = (found.B.double() @ found.A.double() - reference).norm()
    assert float(error) <= 1e-5 * max(float(reference.norm()), 1.0)


RUN = settings(deadline=None, max_examples=25)


@RUN
@given(edges())
def test_fedavg_averages_zero_padded_factors(trained):
    (Bs, As), shares = _padded(trained), _shares(trained)
    B = sum(w * B for w, B in zip(shares, Bs, strict=True))
    A = sum(w * A for w, A in zip(shares, As, strict=True))
    _assert_same(_run("fedavg", trained), B @ A)


@RUN
@given(edges())
def test_hetlora_weighs_zero_padded_factors_by_the_norm_of_their_product(trained):
    Bs, As = _padded(trained)
    norms = [float((B @ A).norm()) for B, A in zip(Bs, As, strict=True)]
    B = sum(s / sum(norms) * B for s, B in zip(norms, Bs, strict=True))
    A = sum(s / sum(norms) * A for s, A in zip(norms, As, strict=True))
    _assert_same(_run("hetlora", trained), B @ A)


def _rankwise_reference(trained: Edges) -> tuple[Tensor, Tensor]:
    rank, shares = max(f.rank for f, _ in trained), _shares(trained)
    B, A = torch.zeros(OUT, rank, dtype=torch.float64), torch.zeros(rank, IN, dtype=torch.float64)
    for j in range(rank):
        holders = [(w, f) for w, (f, _) in zip(shares, trained, strict=True) if f.rank > j]
        held = sum(w for w, _ in holders)
        B[:, j] = sum(w / held * f.B[:, j].double() for w, f in holders)
        A[j] = sum(w / held * f.A[j].double() for w, f in holders)
    return B, A


@RUN
@given(edges())
def test_rankwise_averages_each_component_over_the_edges_that_have_it(trained):
    B, A = _rankwise_reference(trained)
    found = _run("rankwise", trained)
    torch.testing.assert_close(found.B.double(), B, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.A.double(), A, rtol=1e-5, atol=1e-6)


def test_rankwise_keeps_components_beyond_every_edge():
    previous = LowRank(torch.randn(OUT, 4), torch.randn(4, IN))
    found = _run("rankwise", [(LowRank(torch.zeros(OUT, 1), torch.zeros(1, IN)), 1)], previous)
    assert torch.equal(found.B[:, 1:], previous.B[:, 1:])
    assert torch.equal(found.A[1:], previous.A[1:])


@RUN
@given(edges())
def test_flexlora_averages_the_products(trained):
    reference = sum(w * f.B.double() @ f.A.double() for w, (f, _) in zip(_shares(trained), trained, strict=True))
    _assert_same(_run("flexlora", trained), reference)


@RUN
@given(edges())
def test_raflora_averages_each_band_over_the_edges_that_reach_it(trained):
    bounds = [0, *sorted({f.rank for f, _ in trained})]
    reference = torch.zeros(OUT, IN, dtype=torch.float64)
    for low, high in pairwise(bounds):
        holders = [(n, f) for f, n in trained if f.rank >= high]
        for examples, f in holders:
            share = examples / sum(n for n, _ in holders)
            reference += share * f.B[:, low:high].double() @ f.A[low:high].double()
    _assert_same(_run("raflora", trained), reference)


@RUN
@given(edges(), st.integers(0, 99))
def test_flora_stack_adds_the_weighted_products_to_all_that_was_learned(trained, seed):
    generator = torch.Generator().manual_seed(seed)
    previous = LowRank(torch.randn(OUT, 3, generator=generator), torch.randn(3, IN, generator=generator))
    fresh = LowRank(torch.zeros(OUT, 6), torch.randn(6, IN, generator=generator))
    reference = previous.B.double() @ previous.A.double()
    for share, (f, _) in zip(_shares(trained), trained, strict=True):
        reference = reference + share * f.B.double() @ f.A.double()
    found = _run("flora_stack", trained, previous, start=fresh)
    _assert_same(found, reference)
    assert found.rank <= min(OUT, IN)


def test_flora_stack_keeps_the_edges_factors_side_by_side():
    edge = LowRank(torch.randn(OUT, 2), torch.randn(2, IN))
    fresh = LowRank(torch.zeros(OUT, 2), torch.randn(2, IN))
    found = _run("flora_stack", [(edge, 1)], LowRank(torch.randn(OUT, 1), torch.randn(1, IN)), start=fresh)
    assert found.rank == 3
    assert torch.equal(found.A[:2], edge.A)


@RUN
@given(edges(), st.integers(0, 99))
def test_ffa_averages_the_left_factor_over_a_shared_right_one(trained, seed):
    shared = torch.randn(6, IN, generator=torch.Generator().manual_seed(seed))
    frozen = [(LowRank(f.B, shared[: f.rank]), n) for f, n in trained]
    found = _run("ffa", frozen, LowRank(torch.zeros(OUT, 6), shared))
    B, _ = _rankwise_reference(frozen)
    assert torch.equal(found.A, shared)
    torch.testing.assert_close(found.B[:, : B.shape[1]].double(), B, rtol=1e-5, atol=1e-6)


@RUN
@given(edges(equal_ranks=True), st.integers(0, 99))
def test_with_equal_ranks_and_a_shared_right_factor_every_average_is_the_plain_one(trained, seed):
    shared = torch.randn(6, IN, generator=torch.Generator().manual_seed(seed))
    frozen = [(LowRank(f.B, shared[: f.rank]), n) for f, n in trained]
    reference = sum(w * f.B.double() @ f.A.double() for w, (f, _) in zip(_shares(frozen), frozen, strict=True))
    previous = LowRank(torch.zeros(OUT, 6), shared)
    for rule in ("ffa", "fedavg", "rankwise", "flexlora", "raflora", "delta_svd", "flora_stack"):
        _assert_same(_run(rule, frozen, previous), reference)


def test_ffa_refuses_an_edge_that_trained_the_right_factor():
    previous = LowRank(torch.zeros(OUT, 2), torch.randn(2, IN))
    with pytest.raises(UpdateRefusedError, match=r"edge-0: returned m at rank 2 .* needs A frozen"):
        _run("ffa", [(LowRank(torch.ones(OUT, 2), previous.A + 1), 1)], previous)


def test_delta_svd_takes_a_start_that_is_not_the_global_adapters():
    previous = LowRank(torch.randn(OUT, 2), torch.randn(2, IN))
    start, trained = (LowRank(torch.randn(OUT, 2), torch.randn(2, IN)) for _ in range(2))
    reference = previous.dense().double() + trained.dense().double() - start.dense().double()
    _assert_same(_run("delta_svd", [(trained, 1)], previous, start=start), reference)


def test_delta_svd_takes_directions_of_change_behind_the_start():
    previous = LowRank(torch.randn(OUT, 2), torch.randn(2, IN))
    extended = LowRank(torch.cat([previous.B, torch.ones(OUT, 1)], 1), torch.cat([previous.A, torch.ones(1, IN)]))
    update = Update("edge", Adapter({"m": previous}, {}), Adapter({"m": extended}, {}), 1)
    found = aggregate(Adapter({"m": previous}, {}), [update], AggregationSpec(energy=1.0)).adapter.factors["m"]
    _assert_same(found, previous.dense().double() + 1)


def test_every_rule_of_the_config_exists_and_edges_start_as_it_was_published():
    assert set(RULES) == set(AggregationSpec.model_fields["rule"].annotation.__args__)
    assert edge_start("delta_svd") is split_for_edge
    assert edge_start("hetlora") is truncated_for_edge
    assert edge_start("flora_stack") is fresh_for_edge
