"""Bytes of updates: the change, its leading directions, and the residual an edge keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.adapters import Adapter, split_for_edge
from fedpipe_core.aggregation import Update, aggregate
from fedpipe_core.config import AggregationSpec
from fedpipe_core.errors import IntegrityError
from fedpipe_core.low_rank import LowRank
from fedpipe_core.wire import encode_adapter
from fedpipe_core.wire_updates import decode_update, encode_update, open_update

DTYPES = ("fp32", "bf16", "int8", "nf4")


def _pair(seed: int = 0, step: float = 0.01, rank: int = 4) -> tuple[Adapter, Adapter]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    start = Adapter({"m": LowRank(noise(64, rank), noise(rank, 128))}, {"weight": noise(10, 64)})
    f = start.factors["m"]
    moved = LowRank(f.B + step * noise(64, rank), f.A + step * noise(rank, 128))
    return start, Adapter({"m": moved}, {"weight": start.head["weight"] + step * noise(10, 64)})


def _dense(adapter: Adapter) -> torch.Tensor:
    return adapter.factors["m"].B.double() @ adapter.factors["m"].A.double()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.004), ("int8", 0.01), ("nf4", 0.12)])
def test_rounding_costs_a_share_of_the_change_and_not_of_the_value(dtype, tolerance):
    start, trained = _pair()
    data, _ = encode_update(trained, start, dtype)
    found = decode_update(data, start)
    wanted = _dense(trained) - _dense(start)
    assert float((_dense(found) - _dense(trained)).norm()) <= tolerance * float(wanted.norm())
    head_step = trained.head["weight"] - start.head["weight"]
    assert float((found.head["weight"] - trained.head["weight"]).norm()) <= tolerance * float(head_step.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unchanged_adapter_comes_back_unchanged(dtype):
    start, _ = _pair()
    data, _ = encode_update(start, start, dtype)
    assert decode_update(data, start).factors["m"].equals(start.factors["m"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_plain_formats_keep_no_residual(dtype):
    start, trained = _pair()
    assert encode_update(trained, start, dtype)[1] is None


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["int8", "nf4"]), st.sampled_from([1.0, 0.9, 0.5]), st.integers(0, 99))
def test_what_is_sent_and_the_residual_add_up_to_the_change(dtype, energy, seed):
    start, trained = _pair(seed)
    data, residual = encode_update(trained, start, dtype, energy=energy)
    sent = _dense(decode_update(data, start)) - _dense(start)
    wanted = _dense(trained) - _dense(start)
    if energy == 1.0:  # directions left out have a rank beyond what the residual keeps
        torch.testing.assert_close(sent + _dense(residual), wanted, rtol=1e-3, atol=1e-4)
    assert float((sent + _dense(residual) - wanted).norm()) < float((sent - wanted).norm()) + 1e-6
    head = decode_update(data, start).head["weight"] + residual.head["weight"]
    torch.testing.assert_close(head, trained.head["weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_the_next_update_takes_up_most_of_the_residual(dtype):
    start, trained = _pair()
    _, residual = encode_update(trained, start, dtype)
    data, _ = encode_update(trained, start, "fp32", residual=residual)
    missing = _dense(trained) - _dense(start) + _dense(residual) - (_dense(decode_update(data, start)) - _dense(start))
    assert float(missing.norm()) < 0.3 * float(_dense(residual).norm())


def test_a_frozen_right_factor_stays_frozen_through_rounding_and_feedback():
    start, trained = _pair()
    frozen = Adapter({"m": LowRank(trained.factors["m"].B, start.factors["m"].A)}, trained.head)
    _, residual = encode_update(frozen, start, "nf4")
    data, _ = encode_update(frozen, start, "nf4", residual=residual)
    assert torch.equal(decode_update(data, start).factors["m"].A, start.factors["m"].A)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_factor_that_stayed_frozen_does_not_travel(dtype, tmp_path):
    start, trained = _pair()
    frozen = Adapter({"m": LowRank(trained.factors["m"].B, start.factors["m"].A)}, {"weight": start.head["weight"]})
    data, _ = encode_update(frozen, start, dtype)
    (tmp_path / "update").write_bytes(data)
    for found in (decode_update(data, start), open_update(tmp_path / "update", start)):
        assert torch.equal(found.factors["m"].A, start.factors["m"].A)
        torch.testing.assert_close(found.factors["m"].B, frozen.factors["m"].B, rtol=0, atol=0.006)
    whole, _ = encode_update(Adapter(trained.factors, start.head), start, dtype)
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4}[dtype]
    assert len(whole) - len(data) >= 4 * 128 * bits // 8


@settings(deadline=None, max_examples=20)
@given(st.floats(0.3, 0.99), st.integers(0, 99))
def test_top_energy_sends_the_fewest_directions_that_hold_the_share(energy, seed):
    start, trained = _pair(seed, rank=6)
    data, _ = encode_update(trained, start, "fp32", energy=energy)
    found = decode_update(data, start)
    squares = torch.linalg.svdvals(_dense(trained) - _dense(start)).square()
    shares = squares.cumsum(0) / squares.sum()
    sent = found.factors["m"].rank - 6
    assert sent == min(6, int((shares < energy).sum()) + 1)
    left = float((_dense(found) - _dense(trained)).square().sum() / squares.sum())
    assert left == pytest.approx(1 - float(shares[sent - 1]), abs=1e-3)
    assert len(data) <= len(encode_update(trained, start, "fp32")[0])


def test_a_stored_update_is_read_module_by_module(tmp_path):
    start, trained = _pair()
    for energy in (1.0, 0.5):
        data, _ = encode_update(trained, start, "bf16", energy=energy)
        (tmp_path / "update").write_bytes(data)
        lazy, whole = open_update(tmp_path / "update", start), decode_update(data, start)
        assert list(lazy.factors) == ["m"]
        assert len(lazy.factors) == 1
        assert lazy.factors["m"].equals(whole.factors["m"])
        assert torch.equal(lazy.head["weight"], whole.head["weight"])


def test_an_update_of_another_start_is_refused(tmp_path):
    start, trained = _pair()
    data, _ = encode_update(trained, start, "fp32")
    (tmp_path / "update").write_bytes(data)
    other = Adapter({"m": start.factors["m"].leading(2)}, start.head)
    with pytest.raises(IntegrityError, match=r"holds \(64, 128, 4\), while its start has \(64, 128, 2\)"):
        decode_update(data, other)
    with pytest.raises(IntegrityError, match="while its start has"):
        open_update(tmp_path / "update", other).factors["m"]
    with pytest.raises(IntegrityError, match="cannot be read"):
        decode_update(data, Adapter({"n": start.factors["m"]}, start.head))
    with pytest.raises(IntegrityError, match="while its start has"):
        open_update(tmp_path / "update", Adapter(start.factors, {}))


def test_a_global_adapter_is_no_update():
    start, trained = _pair()
    with pytest.raises(IntegrityError, match="it holds an adapter, not the changes of one"):
        decode_update(encode_adapter(trained, "fp32"), start)


def _federated_loss(dtype: str, rounds: int = 25) -> float:
    """Excess loss of linear regression on 4 edges of rank 2 to 8, relative to the untrained model's."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(24, 6, generator=generator) @ torch.randn(6, 32, generator=generator) / 6
    wants = [target + 0.2 * torch.randn(24, 32, generator=generator) / 6 for _ in range(4)]
    adapter = Adapter({"m": LowRank(torch.zeros(24, 8), 0.2 * torch.randn(8, 32, generator=generator))}, {})
    residuals: dict[int, Adapter | None] = {}
    for _ in range(rounds):
        updates = []
        for i, want in enumerate(wants):
            start, tail = split_for_edge(adapter, {"m": 2 * (i + 1)}, seed=1)
            frozen = tail["m"].dense() if "m" in tail else torch.zeros(24, 32)
            B, A = (t.clone().requires_grad_() for t in (start.factors["m"].B, start.factors["m"].A))
            optimizer = torch.optim.SGD([B, A], lr=0.05)
            for _ in range(10):
                optimizer.zero_grad()
                (0.5 * (B @ A + frozen - want).square().sum()).backward()
                optimizer.step()
            trained = Adapter({"m": LowRank(B.detach(), A.detach())}, {})
            data, residuals[i] = encode_update(trained, start, dtype, residuals.get(i))
            updates.append(Update(f"edge-{i}", start, decode_update(data, start), 1))
        adapter = aggregate(adapter, updates, AggregationSpec(energy=1.0, rank_cap=16)).adapter
    best = sum(wants) / 4
    return float((adapter.factors["m"].dense() - best).square().sum() / best.square().sum())


def test_four_bit_updates_with_feedback_train_as_well_as_full_precision():
    full = _federated_loss("fp32")
    assert _federated_loss("nf4") < full + 0.01
