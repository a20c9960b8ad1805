"""Bad updates are refused with their reason; honest ones, however different, count."""

from dataclasses import replace
from statistics import median

import pytest
import torch

from fedpipe_core.adapters import Adapter
from fedpipe_core.aggregation import Update, aggregate
from fedpipe_core.config import AggregationSpec
from fedpipe_core.errors import UpdateRefusedError
from fedpipe_core.low_rank import LowRank
from fedpipe_core.update_checks import check_update, median_without, screen_updates
from fedpipe_core.update_geometry import change_norms, cosines_with_the_rest

OUT, IN, RANK = 24, 32, 4


def _updates(count: int = 5, agreement: float = 0.5, seed: int = 0, size: float = 0.1) -> list[Update]:
    """Edges whose changes share a direction; `agreement` is that part's share of each step of the factors."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    start = Adapter({"m": LowRank(noise(OUT, RANK), noise(RANK, IN))}, {"weight": noise(3, OUT)})
    common_B, common_A = noise(OUT, RANK), noise(RANK, IN)
    updates = []
    for i in range(count):
        step_B = agreement**0.5 * common_B + (1 - agreement) ** 0.5 * noise(OUT, RANK)
        step_A = agreement**0.5 * common_A + (1 - agreement) ** 0.5 * noise(RANK, IN)
        begin = start.factors["m"]
        trained = LowRank(begin.B + size * step_B, begin.A + size * step_A)
        head = {"weight": start.head["weight"] + size * noise(3, OUT)}
        updates.append(Update(f"edge-{i}", start, Adapter({"m": trained}, head), 10 + i))
    return updates


def _with_factors(update: Update, factors: LowRank) -> Update:
    return replace(update, trained=Adapter({"m": factors}, update.trained.head))


def _scaled(update: Update, factor: float) -> Update:
    """The update with its whole change, head included, scaled."""
    begin, end = update.start.factors["m"], update.trained.factors["m"]
    B = torch.cat([begin.B, factor * end.B, -factor * begin.B], dim=1)
    factors = LowRank(B, torch.cat([begin.A, end.A, begin.A]))
    weight = update.start.head["weight"]
    head = {"weight": weight + factor * (update.trained.head["weight"] - weight)}
    return replace(update, trained=Adapter({"m": factors}, head))


def test_an_update_that_follows_its_plan_passes():
    check_update(_updates(1)[0], {"m": RANK})


def test_directions_of_change_behind_the_start_pass():
    update = _updates(1)[0]
    begin = update.start.factors["m"]
    factors = LowRank(torch.cat([begin.B, torch.ones(OUT, 2)], 1), torch.cat([begin.A, torch.ones(2, IN)]))
    check_update(_with_factors(update, factors), {"m": RANK})
    with pytest.raises(UpdateRefusedError, match=r"B of m has shape \(24, 6\), needed rank 4"):
        check_update(_with_factors(update, LowRank(factors.B + 1, factors.A)), {"m": RANK})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused_with_its_place(bad):
    update = _updates(1)[0]
    A = update.trained.factors["m"].A.clone()
    A[1, 2] = bad
    broken = _with_factors(update, LowRank(update.trained.factors["m"].B, A))
    with pytest.raises(UpdateRefusedError, match="edge-0: A of m has 1 of 128 entries not finite"):
        check_update(broken, {"m": RANK})


def test_a_head_that_is_not_finite_is_refused():
    update = _updates(1)[0]
    broken = replace(update, trained=Adapter(update.trained.factors, {"weight": torch.full((3, OUT), torch.nan)}))
    with pytest.raises(UpdateRefusedError, match="head parameter weight has 72 of 72 entries not finite"):
        check_update(broken, {"m": RANK})


def test_wrong_ranks_shapes_and_dtypes_are_refused():
    update = _updates(1)[0]
    factors = update.trained.factors["m"]
    with pytest.raises(UpdateRefusedError, match=r"B of m has shape \(24, 4\), needed rank 2"):
        check_update(update, {"m": 2})
    with pytest.raises(UpdateRefusedError, match=r"A of m has shape \(4, 31\), needed \(4, 32\)"):
        check_update(_with_factors(update, LowRank(factors.B, factors.A[:, 1:])), {"m": RANK})
    with pytest.raises(UpdateRefusedError, match=r"B of m has dtype torch.int64, needed a floating dtype"):
        check_update(_with_factors(update, LowRank(factors.B.long(), factors.A)), {"m": RANK})


def test_missing_and_unplanned_modules_and_examples_are_refused():
    update = _updates(1)[0]
    with pytest.raises(UpdateRefusedError, match="edge-0: lacks module n"):
        check_update(update, {"m": RANK, "n": 2})
    with pytest.raises(UpdateRefusedError, match="edge-0: holds module m, which its plan does not train"):
        check_update(update, {})
    with pytest.raises(UpdateRefusedError, match="edge-0: lacks head parameter weight"):
        check_update(replace(update, trained=Adapter(update.trained.factors, {})), {"m": RANK})
    with pytest.raises(UpdateRefusedError, match="counts 0 examples"):
        check_update(replace(update, num_examples=0), {"m": RANK})


def test_honest_updates_all_count():
    updates = _updates()
    counted, refused, *_ = screen_updates(updates, AggregationSpec())
    assert [update.edge_id for update in counted] == [update.edge_id for update in updates]
    assert refused == {}


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_a_change_a_thousand_times_too_large_is_refused(count):
    updates = _updates(count)
    counted, refused, *_ = screen_updates([_scaled(updates[0], 1000.0), *updates[1:]], AggregationSpec())
    assert list(refused) == ["edge-0"]
    assert "edge-0: changed by a norm of" in refused["edge-0"]
    assert len(counted) == count - 1


def test_a_head_a_thousand_times_too_large_is_refused():
    updates = _updates()
    head = {"weight": 1000 * updates[0].trained.head["weight"]}
    attacked = replace(updates[0], trained=Adapter(updates[0].trained.factors, head))
    assert list(screen_updates([attacked, *updates[1:]], AggregationSpec())[1]) == ["edge-0"]


def test_a_change_that_overflows_is_refused():
    updates = _updates()
    factors = updates[0].trained.factors["m"]
    attacked = _with_factors(updates[0], LowRank(factors.B * 1e30, factors.A * 1e30))
    assert list(screen_updates([attacked, *updates[1:]], AggregationSpec())[1]) == ["edge-0"]


def test_clipping_scales_both_parts_of_a_change_to_what_is_usual():
    updates = _updates()
    spec = AggregationSpec(outliers="clip", outlier_factor=2.0)
    counted, refused, *_ = screen_updates([_scaled(updates[0], 1000.0), *updates[1:]], spec)
    usual = sorted(change_norms(update)["m"] for update in updates[1:])
    assert refused == {}
    assert change_norms(counted[0])["m"] == pytest.approx((usual[1] + usual[2]) / 2, rel=1e-3)
    assert counted[0].head_norm() == pytest.approx(sorted(u.head_norm() for u in updates[1:])[1], rel=0.1)
    assert counted[1] is updates[1]


def test_clipping_moves_factors_of_equal_rank_along_their_way():
    updates = _updates()
    begin, end = updates[0].start.factors["m"], updates[0].trained.factors["m"]
    far = LowRank(begin.B + 50 * (end.B - begin.B), begin.A + 50 * (end.A - begin.A))
    spec = AggregationSpec(outliers="clip")
    counted, *_ = screen_updates([_with_factors(updates[0], far), *updates[1:]], spec)
    usual = sorted(change_norms(update)["m"] for update in updates[1:])
    assert counted[0].trained.factors["m"].rank == RANK
    assert change_norms(counted[0])["m"] == pytest.approx((usual[1] + usual[2]) / 2, rel=1e-3)


def test_accepting_lets_everything_count():
    updates = _updates()
    attacked = [_scaled(updates[0], -1000.0), *updates[1:]]
    assert screen_updates(attacked, AggregationSpec(outliers="accept")) == (attacked, {}, (), ())


@pytest.mark.parametrize("agreement", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_change_with_its_sign_flipped_is_refused(agreement, seed):
    updates = _updates(agreement=agreement, seed=seed)
    _, refused, *_ = screen_updates([*updates[:2], _scaled(updates[2], -1.0), *updates[3:]], AggregationSpec())
    assert list(refused) == ["edge-2"]
    assert "opposes the other edges' with cosine -" in refused["edge-2"]


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_reversed_factors_are_refused_however_far_they_went(size):
    updates = _updates(size=size)
    begin, end = updates[1].start.factors["m"], updates[1].trained.factors["m"]
    back = LowRank(begin.B - (end.B - begin.B), begin.A - (end.A - begin.A))
    attacked = [updates[0], _with_factors(updates[1], back), *updates[2:]]
    assert list(screen_updates(attacked, AggregationSpec(outlier_factor=100.0))[1]) == ["edge-1"]


def test_an_edge_that_opposed_the_others_counts_again_when_it_agrees():
    updates = _updates()
    reversed_edge = _scaled(updates[2], -1.0)
    _, _, opposed, _ = screen_updates([*updates[:2], reversed_edge, *updates[3:]], AggregationSpec())
    assert opposed == ("edge-2",)
    counted, refused, opposed, _ = screen_updates(updates, AggregationSpec(), opposed)
    assert (len(counted), refused, opposed) == (5, {}, ())


def test_an_edge_that_opposed_the_others_stays_out_while_nobody_agrees():
    updates = _updates(agreement=0.0, seed=1)
    assert screen_updates(updates, AggregationSpec()).refused == {}
    apart = min(cosines_with_the_rest(updates).items(), key=lambda found: found[1])[0]
    counted, refused, opposed, _ = screen_updates(updates, AggregationSpec(), [apart, "edge-9"])
    assert (list(refused), opposed) == ([apart], tuple(sorted([apart, "edge-9"])))
    assert f"{apart}: its change opposed the other edges' before" in refused[apart]
    assert apart not in {update.edge_id for update in counted}


def test_two_of_seven_flipped_changes_are_refused():
    updates = _updates(7)
    attacked = [_scaled(updates[0], -1.0), _scaled(updates[1], -1.0), *updates[2:]]
    assert sorted(screen_updates(attacked, AggregationSpec())[1]) == ["edge-0", "edge-1"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("agreement", [0.0, 0.05, 0.2])
def test_edges_that_hardly_agree_are_honest(agreement, seed):
    assert screen_updates(_updates(5, agreement, seed), AggregationSpec())[1] == {}


def test_edges_that_all_oppose_each_other_are_honest():
    updates = _updates(5, agreement=0.0)
    steps = [update.trained.factors["m"].B - update.start.factors["m"].B for update in updates]
    mean = sum(steps) / len(steps)  # disjoint labels: each pushes its own up and all others' down
    begin = updates[0].start.factors["m"]
    apart = [_with_factors(u, LowRank(begin.B + s - mean, begin.A)) for u, s in zip(updates, steps, strict=True)]
    assert all(cosine < -0.9 for cosine in cosines_with_the_rest(apart).values())
    assert screen_updates(apart, AggregationSpec())[1] == {}


def test_edges_that_train_other_modules_are_compared_on_what_they_share():
    updates = _updates(4)
    lone = LowRank(torch.zeros(OUT, 1), torch.ones(1, IN))
    large = LowRank(torch.full((OUT, 1), 100.0), torch.ones(1, IN))
    start = Adapter({**updates[0].start.factors, "other": lone}, updates[0].start.head)
    trained = Adapter({**updates[0].trained.factors, "other": large}, updates[0].trained.head)
    both = replace(updates[0], start=start, trained=trained)
    assert screen_updates([both, *updates[1:]], AggregationSpec())[1] == {}


def test_edges_that_changed_nothing_make_nobody_an_outlier():
    updates = _updates()
    idle = [replace(update, trained=update.start) for update in updates[1:]]
    assert screen_updates([updates[0], *idle], AggregationSpec())[1] == {}


@pytest.mark.parametrize("factor", [1000.0, -1.0])
def test_the_aggregate_without_a_refused_edge_is_the_one_it_never_joined(factor):
    updates = _updates()
    counted, *_ = screen_updates([_scaled(updates[0], factor), *updates[1:]], AggregationSpec())
    found = aggregate(updates[0].start, counted, AggregationSpec()).adapter.factors["m"]
    needed = aggregate(updates[0].start, updates[1:], AggregationSpec()).adapter.factors["m"]
    assert found.equals(needed)


@pytest.mark.parametrize("values", [[3.0, 1.0], [2.0, 5.0, 1.0], [1.0, 1.0, 4.0, 4.0], [7.0, 2.0, 9.0, 2.0, 3.0]])
def test_the_median_of_the_others_is_that_of_the_list_without_one(values):
    for index, value in enumerate(values):
        assert median_without(sorted(values), value) == median(values[:index] + values[index + 1 :])
    assert median_without([1.0], 1.0) is None


def test_edge_refused_for_its_direction_alone_is_a_suspect_and_counts_once_it_is_pardoned():
    updates = _updates(6, 0.9)
    attacked = [_scaled(updates[0], 1000.0), updates[1], _scaled(updates[2], -1.0), *updates[3:]]
    found = screen_updates(attacked, AggregationSpec())
    assert sorted(found.refused) == ["edge-0", "edge-2"]
    assert [suspect.edge_id for suspect in found.suspects] == ["edge-2"]
    pardoned = found.pardon(found.suspects[0])
    assert [update.edge_id for update in pardoned.counted] == ["edge-1", "edge-2", "edge-3", "edge-4", "edge-5"]
    assert list(pardoned.refused) == ["edge-0"]
    assert (found.opposed, pardoned.opposed, pardoned.suspects) == (("edge-2",), (), ())
