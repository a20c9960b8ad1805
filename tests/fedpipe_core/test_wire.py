"""Bytes of adapters: what comes back, how many they are, and what is refused."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_core.adapters import Adapter
from fedpipe_core.errors import IntegrityError
from fedpipe_core.low_rank import LowRank
from fedpipe_core.quantization import BLOCK, dequantize, levels, quantize, stored_sizes
from fedpipe_core.wire import decode_adapter, encode_adapter, open_adapter

DTYPES = ("fp32", "bf16", "int8", "nf4")


def _adapter(rank: int = 4, seed: int = 0, width: int = 384) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    names = [f"encoder.layer.{i}.attention.self.{kind}" for i in range(3) for kind in ("query", "value")]
    factors = {
        name: LowRank(torch.randn(width, rank, generator=generator), torch.randn(rank, width, generator=generator))
        for name in names
    }
    head = {"weight": torch.randn(150, width, generator=generator), "bias": torch.randn(150, generator=generator)}
    return Adapter(factors, {**head, "temperature": torch.tensor(0.5)})


def _tensors(adapter: Adapter) -> list[torch.Tensor]:
    return [t for _, f in sorted(adapter.factors.items()) for t in (f.B, f.A)] + [
        value for _, value in sorted(adapter.head.items())
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("bf16", 0.003), ("int8", 0.008), ("nf4", 0.11)])
def test_an_adapter_comes_back_in_float32_within_its_formats_rounding(dtype, tolerance):
    adapter = _adapter()
    found = decode_adapter(encode_adapter(adapter, dtype))
    assert list(found.factors) == sorted(adapter.factors)
    for value, back in zip(_tensors(adapter), _tensors(found), strict=True):
        assert back.dtype == torch.float32
        assert back.shape == value.shape
        assert float((back - value).norm()) <= tolerance * float(value.norm())


@pytest.mark.parametrize(("dtype", "share"), [("bf16", 0.51), ("int8", 0.27), ("nf4", 0.15)])
@pytest.mark.parametrize("rank", [2, 16])
def test_short_formats_take_their_share_of_the_bytes(dtype, share, rank):
    adapter = _adapter(rank)
    assert len(encode_adapter(adapter, dtype)) <= share * len(encode_adapter(adapter, "fp32"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_adapters_give_equal_bytes_in_any_order(dtype):
    adapter = _adapter()
    reordered = Adapter(dict(reversed(adapter.factors.items())), dict(reversed(adapter.head.items())))
    assert encode_adapter(adapter, dtype) == encode_adapter(reordered, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stored_adapter_is_read_module_by_module(dtype, tmp_path):
    path = tmp_path / "global.safetensors"
    path.write_bytes(encode_adapter(_adapter(), dtype))
    whole, lazy = decode_adapter(path.read_bytes()), open_adapter(path)
    assert list(lazy.factors) == list(whole.factors)
    assert len(lazy.factors) == 6
    for value, read in zip(_tensors(whole), _tensors(lazy), strict=True):
        assert torch.equal(value, read)
    with pytest.raises(KeyError):
        lazy.factors["unknown"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_hidden(dtype, bad):
    adapter = _adapter()
    adapter.head["weight"][3, 5] = bad
    assert not bool(torch.isfinite(decode_adapter(encode_adapter(adapter, dtype)).head["weight"]).all())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DTYPES), st.integers(0, 10_000), st.integers(0, 255))
def test_damaged_bytes_are_refused_or_read_as_an_adapter_and_never_fail_otherwise(dtype, position, value):
    data = bytearray(encode_adapter(_adapter(1, width=8), dtype))
    data[position % len(data)] = value
    try:
        decode_adapter(bytes(data))
    except IntegrityError as error:
        assert "cannot be read" in str(error)  # noqa: PT017 (both outcomes are right)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(DTYPES), st.floats(0, 0.999))
def test_truncated_bytes_are_refused(dtype, share):
    data = encode_adapter(_adapter(1, width=8), dtype)
    with pytest.raises(IntegrityError, match="cannot be read"):
        decode_adapter(data[: int(share * len(data))])


def _foreign(layout: str) -> bytes:
    return safetensors.torch.save({"factors/m/B": torch.zeros(4, 2)}, {"fedpipe": layout})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an adapter at all",
        safetensors.torch.save({"weight": torch.zeros(2)}),
        _foreign("{}"),
        _foreign("[]"),
        _foreign('{"content":"adapter","dtype":"fp64","format":1,"head":{},"modules":{}}'),
        _foreign('{"content":"adapter","dtype":"fp32","format":9,"head":{},"modules":{}}'),
        _foreign('{"content":"adapter","dtype":"fp32","format":1,"head":{},"modules":{"m":[4,2,4]}}'),
        _foreign('{"content":"adapter","dtype":"fp32","format":1,"head":{},"modules":{"m":[4,-2,4]}}'),
        _foreign('{"content":"adapter","dtype":"nf4","format":1,"head":{},"modules":{"m":[4,2,4]}}'),
        _foreign('{"content":"directions","dtype":"fp32","format":1,"head":{},"modules":{}}'),
    ],
)
def test_what_is_not_an_adapter_is_refused(data, tmp_path):
    with pytest.raises(IntegrityError, match="cannot be read"):
        decode_adapter(data)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(IntegrityError, match="adapter file file cannot be read"):
        open_adapter(tmp_path / "file")


def test_codes_beyond_the_levels_are_refused():
    data = bytearray(encode_adapter(Adapter({}, {"w": torch.zeros(BLOCK)}), "int8"))
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = safetensors.torch.load(bytes(data))
    data[start : start + BLOCK + 2] = data[start : start + BLOCK + 2].replace(bytes([127]), bytes([255]))
    assert tensors["codes"].shape == (BLOCK,)
    with pytest.raises(IntegrityError, match="code 255 is beyond the 255 levels"):
        decode_adapter(bytes(data))


def test_the_nf4_levels_are_those_of_qlora():
    published = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    torch.testing.assert_close(levels("nf4"), torch.tensor(published), rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["int8", "nf4"]), st.integers(0, 200), st.integers(1, 3), st.floats(1e-6, 1e6))
def test_every_number_is_rounded_to_the_nearest_level_of_its_block(dtype, rows, columns, scale):
    values = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    codes, scales = quantize(values, dtype)
    assert (len(codes), len(scales)) == stored_sizes((rows, columns), dtype)
    found = dequantize(codes, scales, (rows, columns), dtype)
    widest = float((levels(dtype)[1:] - levels(dtype)[:-1]).max()) / 2 + 2**-7
    largest = values.abs().max() if rows else torch.tensor(0.0)
    assert bool(((found - values).abs() <= widest * largest).all())


def test_the_wire_needs_no_accelerator_and_no_quantization_library():
    code = (
        "import sys, fedpipe_core.wire_updates; assert not {'bitsandbytes', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
