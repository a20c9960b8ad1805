"""What holds for every aggregate, whatever the edges' ranks, modules, sizes and numbers of examples."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.adapters import Adapter, initial_adapter, split_for_edge
from fedpipe_core.aggregation import RULES, Update, aggregate
from fedpipe_core.config import AggregationSpec
from fedpipe_core.errors import UpdateRefusedError
from fedpipe_core.low_rank import LowRank
from fedpipe_core.profile_schemas import ModuleShape

SHAPES = {"query": (10, 14), "value": (6, 14), "dense": (20, 9)}
EXACT = AggregationSpec(energy=1.0, rank_cap=64)
PROPERTY = settings(deadline=None, max_examples=25)


def _random(out_features: int, rank: int, in_features: int, generator: torch.Generator, dtype) -> LowRank:
    B = torch.randn(out_features, rank, generator=generator, dtype=dtype)
    return LowRank(B, torch.randn(rank, in_features, generator=generator, dtype=dtype))


def _moved(start: Adapter, generator: torch.Generator, step: float = 0.3) -> Adapter:
    factors = {
        module: LowRank(
            f.B + step * torch.randn(f.B.shape, generator=generator, dtype=f.B.dtype),
            f.A + step * torch.randn(f.A.shape, generator=generator, dtype=f.A.dtype),
        )
        for module, f in start.factors.items()
    }
    return Adapter(factors, {n: v + torch.randn(v.shape, generator=generator) for n, v in start.head.items()})


@st.composite
def rounds(draw, dtypes=(torch.float32,)) -> tuple[Adapter, list[Update]]:
    """A global adapter and updates of edges with ranks, modules and examples of their own."""
    dtype, generator = draw(st.sampled_from(dtypes)), torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rank = draw(st.integers(1, 6))
    factors = {module: _random(m, rank, n, generator, dtype) for module, (m, n) in SHAPES.items()}
    previous = Adapter(factors, {"weight": torch.randn(3, 4, generator=generator)})
    plans = draw(
        st.lists(
            st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 8), min_size=1), min_size=1, max_size=4
        )
    )
    updates = []
    for i, ranks in enumerate(plans):
        start, _ = split_for_edge(previous, ranks, seed=3)
        updates.append(Update(f"edge-{i}", start, _moved(start, generator), draw(st.integers(1, 500))))
    return previous, updates


def _dense(factors: LowRank) -> torch.Tensor:
    return factors.B.double() @ factors.A.double()


def _dense_delta(previous: Adapter, updates: list[Update], module: str, weighting: str = "trained") -> torch.Tensor:
    """Δ + Σ w_k·(B_k·A_k − B⁰_k·A⁰_k) in float64."""
    holders = [update for update in updates if module in update.trained.factors]
    examples = sum(update.num_examples for update in (holders if weighting == "trained" else updates))
    total = _dense(previous.factors[module])
    for update in holders:
        step = _dense(update.trained.factors[module]) - _dense(update.start.factors[module])
        total = total + update.num_examples / examples * step
    return total


def _bytes(adapter: Adapter) -> list[bytes]:
    return [t.numpy().tobytes() for f in adapter.factors.values() for t in (f.B, f.A)] + [
        value.numpy().tobytes() for value in adapter.head.values()
    ]


@PROPERTY
@given(rounds(dtypes=(torch.float32, torch.float64)), st.sampled_from(["trained", "all"]))
def test_delta_svd_is_the_exact_weighted_sum_of_changes(round_, weighting):
    previous, updates = round_
    result = aggregate(previous, updates, EXACT.model_copy(update={"weighting": weighting}))
    probes = torch.randn(8, 14, dtype=torch.float64)
    for module in SHAPES:
        reference = _dense_delta(previous, updates, module, weighting)
        found = _dense(result.adapter.factors[module])
        assert float((found - reference).norm()) <= 1e-5 * float(reference.norm())
        seen = probes[:, : reference.shape[1]]
        assert float((seen @ (found - reference).T).norm()) <= 1e-5 * float((seen @ reference.T).norm())


@PROPERTY
@given(rounds(), st.integers(1, 5), st.floats(0.3, 1.0))
def test_the_truncation_error_is_the_norm_of_the_components_cut(round_, rank_cap, energy):
    previous, updates = round_
    spec = AggregationSpec(energy=energy, rank_cap=rank_cap)
    result = aggregate(previous, updates, spec)
    for module in {module for update in updates for module in update.trained.factors}:
        reference = _dense_delta(previous, updates, module)
        kept = result.adapter.factors[module]
        cut = torch.linalg.svdvals(reference)[kept.rank :].norm()
        assert kept.rank <= rank_cap
        assert result.truncation_error[module] == pytest.approx(float(cut), abs=1e-5 * float(reference.norm()))
        assert float((reference - _dense(kept)).norm()) == pytest.approx(float(cut), abs=2e-5 * float(reference.norm()))


@PROPERTY
@given(rounds(), st.sampled_from(["delta_svd", "flora_stack"]))
def test_unchanged_adapters_leave_the_global_adapter_as_it_is(round_, rule):
    previous, updates = round_
    unchanged = [replace(update, trained=update.start) for update in updates]
    result = aggregate(previous, unchanged, AggregationSpec(rule=rule, energy=0.5, rank_cap=1))
    assert _bytes(Adapter(result.adapter.factors, {})) == _bytes(Adapter(previous.factors, {}))


@PROPERTY
@given(rounds(), st.sampled_from(sorted(set(RULES) - {"ffa"})))
def test_a_module_nobody_trained_is_unchanged(round_, rule):
    previous, updates = round_
    result = aggregate(previous, updates, AggregationSpec(rule=rule))
    for module in set(SHAPES) - {module for update in updates for module in update.trained.factors}:
        assert result.adapter.factors[module] is previous.factors[module]


@PROPERTY
@given(st.integers(0, 999), st.integers(1, 14))
def test_one_edge_at_full_rank_gets_its_own_adapter_back(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    previous = Adapter({"query": _random(10, rank, 14, generator, torch.float32)}, {})
    start, tail = split_for_edge(previous, {"query": rank}, seed=3)
    trained = _moved(start, generator)
    result = aggregate(previous, [Update("edge", start, trained, 7)], EXACT)
    assert tail == {}
    torch.testing.assert_close(
        result.adapter.factors["query"].dense(), trained.factors["query"].dense(), rtol=1e-4, atol=1e-4
    )


@PROPERTY
@given(rounds(), st.sampled_from(sorted(set(RULES) - {"ffa"})), st.integers(0, 99))
def test_the_order_of_edges_changes_no_byte(round_, rule, seed):
    previous, updates = round_
    spec = AggregationSpec(rule=rule)
    shuffled = random.Random(seed).sample(updates, len(updates))
    assert _bytes(aggregate(previous, updates, spec).adapter) == _bytes(aggregate(previous, shuffled, spec).adapter)


@PROPERTY
@given(rounds(), st.sampled_from(sorted(set(RULES) - {"ffa", "hetlora"})))
def test_splitting_an_edge_into_two_halves_changes_nothing(round_, rule):
    previous, updates = round_
    spec = EXACT.model_copy(update={"rule": rule})
    whole = [replace(update, num_examples=2 * update.num_examples) for update in updates]
    halves = [replace(updates[0], edge_id=name) for name in ("edge-0a", "edge-0b")]
    split = aggregate(previous, [*halves, *whole[1:]], spec).adapter
    for module, factors in aggregate(previous, whole, spec).adapter.factors.items():
        torch.testing.assert_close(split.factors[module].dense(), factors.dense(), rtol=1e-3, atol=1e-4)


@PROPERTY
@given(rounds(), st.floats(0.1, 2.0), st.floats(0.0, 0.9))
def test_server_step_and_momentum_scale_the_change_and_add_the_last_one(round_, step, momentum):
    previous, updates = round_
    before = _moved(previous, torch.Generator().manual_seed(1))
    spec = EXACT.model_copy(update={"server_step": step, "server_momentum": momentum})
    result = aggregate(previous, updates, spec, before_previous=before)
    for module in {module for update in updates for module in update.trained.factors}:
        old = _dense(previous.factors[module])
        reference = old + step * (_dense_delta(previous, updates, module) - old)
        reference = reference + momentum * (old - _dense(before.factors[module]))
        found = _dense(result.adapter.factors[module])
        assert float((found - reference).norm()) <= 2e-5 * float(reference.norm() + old.norm())


@PROPERTY
@given(rounds(), st.lists(st.floats(0.25, 16), min_size=4, max_size=4))
def test_alpha_over_rank_folded_into_factors_makes_edges_of_any_scaling_exact(round_, scalings):
    previous, updates = round_
    folded, reference = [], {module: _dense(f) for module, f in previous.factors.items()}
    for update, scaling in zip(updates, scalings, strict=False):  # an edge trains B / scaling under its own scaling
        raw = {m: LowRank(f.B / scaling, f.A) for m, f in update.trained.factors.items()}
        factors = {m: LowRank(f.B * scaling, f.A) for m, f in raw.items()}
        folded.append(replace(update, trained=Adapter(factors, update.trained.head)))
        for module, f in raw.items():
            held = sum(u.num_examples for u in updates if module in u.trained.factors)
            step = scaling * _dense(f) - _dense(update.start.factors[module])
            reference[module] = reference[module] + update.num_examples / held * step
    for module, factors in aggregate(previous, folded, EXACT).adapter.factors.items():
        assert float((_dense(factors) - reference[module]).norm()) <= 1e-5 * float(reference[module].norm())


def test_the_head_is_averaged_by_examples():
    head = {"weight": torch.zeros(2, 2)}
    previous = initial_adapter({"query": ModuleShape(out_features=4, in_features=4)}, 2, head, seed=0)
    start, _ = split_for_edge(previous, {"query": 2}, seed=0)
    updates = [
        Update(edge, start, Adapter(start.factors, {"weight": torch.full((2, 2), value)}), examples)
        for edge, value, examples in (("a", 1.0, 30), ("b", 5.0, 10))
    ]
    result = aggregate(previous, updates, AggregationSpec())
    torch.testing.assert_close(result.adapter.head["weight"], torch.full((2, 2), 2.0))
    assert result.weights == {"a": 30.0, "b": 10.0}


def test_without_updates_nothing_changes():
    previous = Adapter({"query": LowRank(torch.ones(4, 1), torch.ones(1, 4))}, {"weight": torch.ones(2)})
    assert _bytes(aggregate(previous, [], AggregationSpec()).adapter) == _bytes(previous)


def test_an_edge_that_answers_twice_is_refused():
    previous = Adapter({"query": LowRank(torch.ones(4, 1), torch.ones(1, 4))}, {})
    with pytest.raises(UpdateRefusedError, match="edge-a: has two updates"):
        aggregate(previous, [Update("edge-a", previous, previous, 1)] * 2, AggregationSpec())


def test_a_module_unknown_to_the_global_adapter_is_refused():
    previous = Adapter({"query": LowRank(torch.ones(4, 1), torch.ones(1, 4))}, {})
    other = Adapter({"key": previous.factors["query"]}, {})
    with pytest.raises(UpdateRefusedError, match="edge-a: trained key, which the global adapter does not have"):
        aggregate(previous, [Update("edge-a", other, other, 1)], AggregationSpec())


@pytest.mark.parametrize("center", ["trimmed_mean", "geometric_median"])
def test_a_robust_center_nearly_ignores_one_far_edge_of_five(center):
    generator = torch.Generator().manual_seed(0)
    previous = Adapter({"query": _random(10, 4, 14, generator, torch.float32)}, {})
    start, _ = split_for_edge(previous, {"query": 4}, seed=0)
    common = _moved(start, generator)
    updates = [Update(f"edge-{i}", start, _moved(common, generator, 0.02), 10) for i in range(5)]
    far = LowRank(100 * updates[0].trained.factors["query"].B, updates[0].trained.factors["query"].A)
    attacked = [replace(updates[0], trained=Adapter({"query": far}, {})), *updates[1:]]
    reference = aggregate(previous, updates[1:], EXACT).adapter.factors["query"].dense()
    result = aggregate(previous, attacked, EXACT.model_copy(update={"center": center}))
    error = (result.adapter.factors["query"].dense() - reference).norm() / reference.norm()
    plain = (
        aggregate(previous, attacked, EXACT).adapter.factors["query"].dense() - reference
    ).norm() / reference.norm()
    assert float(error) < 0.05 * float(plain)
    assert result.weights["edge-0"] < 0.05 * result.weights["edge-1"]


@PROPERTY
@given(rounds(), st.integers(0, 99))
def test_the_geometric_median_depends_on_products_and_not_on_the_basis_of_their_factors(round_, seed):
    previous, updates = round_
    spec = EXACT.model_copy(update={"center": "geometric_median"})
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for update in updates:
        factors = {}
        for module, f in update.trained.factors.items():
            rotation = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=generator))[0]
            factors[module] = LowRank(f.B @ rotation, rotation.T @ f.A)
        turned.append(replace(update, trained=Adapter(factors, update.trained.head)))
    found, expected = (aggregate(previous, given, spec).adapter for given in (turned, updates))
    # Where an update lies on the median its weight is a quotient of two small numbers; what it comes to is not.
    for module, factors in expected.factors.items():
        reach = sum(float(u.trained.factors[module].dense().norm()) for u in updates if module in u.trained.factors)
        assert float((found.factors[module].dense() - factors.dense()).norm()) <= 1e-2 * reach + 1e-4
