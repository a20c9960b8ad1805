"""Products B·A against dense float64 matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.low_rank import LowRank, RunningSum, change, inner, stacked, truncate

SMALL = settings(deadline=None, max_examples=30)


def _random(out_features: int, rank: int, in_features: int, seed: int = 0, dtype=torch.float32) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(out_features, rank, generator=generator, dtype=dtype),
        torch.randn(rank, in_features, generator=generator, dtype=dtype),
    )


@st.composite
def products(draw, dtypes=(torch.float32, torch.float64)) -> LowRank:
    sizes = st.integers(1, 24)
    return _random(draw(sizes), draw(sizes), draw(sizes), draw(st.integers(0, 99)), draw(st.sampled_from(dtypes)))


@SMALL
@given(products(), st.integers(1, 30), st.floats(0.05, 1.0))
def test_truncation_keeps_the_best_components_and_reports_what_it_cut(product, rank_cap, energy):
    kept, error = truncate(product, energy, rank_cap)
    sigma = torch.linalg.svdvals(product.B.double() @ product.A.double())
    scale = float(sigma.norm())
    assert kept.rank <= rank_cap
    assert error == pytest.approx(float(sigma[kept.rank :].norm()), abs=2e-6 * scale)
    distance = (product.B.double() @ product.A.double() - kept.B.double() @ kept.A.double()).norm()
    assert float(distance) == pytest.approx(error, abs=5e-6 * scale)


@SMALL
@given(products(), st.floats(0.05, 0.999))
def test_truncation_keeps_the_fewest_components_with_the_wanted_energy(product, energy):
    kept, _ = truncate(product, energy, 100)
    squares = torch.linalg.svdvals(product.B.double() @ product.A.double()).square()
    shares = squares.cumsum(0) / squares.sum()
    assert shares[kept.rank - 1] >= energy - 1e-5
    assert kept.rank == 1 or shares[kept.rank - 2] < energy + 1e-5


@SMALL
@given(products())
def test_truncated_factors_are_balanced_ordered_and_signed(product):
    kept, _ = truncate(product, 1.0, 100)
    lengths_B, lengths_A = kept.B.norm(dim=0), kept.A.norm(dim=1)
    torch.testing.assert_close(lengths_B, lengths_A, rtol=1e-3, atol=1e-3)
    assert bool((lengths_B[:-1] >= lengths_B[1:] * (1 - 1e-4)).all())
    assert bool((kept.B.gather(0, kept.B.abs().argmax(0)[None]) > 0).all())


def test_truncation_of_half_precision_factors_is_computed_in_float32():
    product = _random(16, 3, 12, dtype=torch.bfloat16)
    kept, _ = truncate(product, 1.0, 3)
    assert kept.B.dtype == torch.float32
    torch.testing.assert_close(kept.dense(), product.B.float() @ product.A.float(), rtol=1e-5, atol=1e-5)


def test_truncation_of_a_zero_matrix_keeps_one_silent_component():
    kept, error = truncate(LowRank(torch.zeros(8, 2), torch.randn(2, 6)), 0.99, 4)
    assert (kept.rank, error, float(kept.dense().abs().max())) == (1, 0.0, 0.0)


@SMALL
@given(st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 99))
def test_a_running_sum_is_the_sum_however_far_it_was_multiplied_out(out_features, in_features, ranks, seed):
    terms = [_random(out_features, rank, in_features, seed + i) for i, rank in enumerate(ranks)]
    total = RunningSum()
    for i, term in enumerate(terms):
        total.add(term, 1.0 / (i + 1))
    reference = sum(term.B.double() @ term.A.double() / (i + 1) for i, term in enumerate(terms))
    torch.testing.assert_close(total.exact().dense().double(), reference, rtol=1e-4, atol=1e-4)
    assert total.inner(terms[0]) == pytest.approx(float((reference * terms[0].dense().double()).sum()), abs=1e-2)
    doubled = RunningSum()
    doubled.add(terms[0])
    doubled.add_sum(total, 2.0)
    torch.testing.assert_close(
        doubled.exact().dense().double(), 2 * reference + terms[0].dense().double(), rtol=1e-4, atol=2e-4
    )


def test_a_running_sum_never_holds_more_than_the_dense_matrix():
    total = RunningSum()
    for seed in range(50):
        total.add(_random(12, 5, 10, seed))
        assert total.rank < 10


@SMALL
@given(products(), st.integers(0, 99))
def test_inner_products_and_norms_match_dense_ones(left, seed):
    right = _random(left.shape[0], 3, left.shape[1], seed, left.B.dtype)
    reference = (left.dense().double() * right.dense().double()).sum()
    assert inner(left, right) == pytest.approx(float(reference), rel=1e-4, abs=1e-2)
    assert left.norm() == pytest.approx(float(left.dense().double().norm()), rel=1e-4, abs=1e-3)


def test_a_small_change_of_large_factors_keeps_its_digits():
    start = _random(32, 4, 32)
    trained = LowRank(start.B + 1e-5 * torch.ones_like(start.B), start.A)
    step = trained.B.double() - start.B.double()
    assert change(start, trained).norm() == pytest.approx(float((step @ start.A.double()).norm()), rel=1e-5)


def test_stacked_products_add_up():
    terms = [_random(6, rank, 5, rank) for rank in (1, 2, 3)]
    torch.testing.assert_close(stacked(terms).dense(), sum(term.dense() for term in terms))
