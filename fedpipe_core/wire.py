"""Adapters as bytes: one safetensors file each, equal bytes for equal values.

fp32 and bf16 keep one tensor per factor. int8 and nf4 keep all codes in one tensor and all scales in another, since
a safetensors entry costs a hundred bytes; the metadata says which numbers are whose. Updates are in `wire_updates`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from typing_extensions import TypeIs

from fedpipe_core.adapters import Adapter
from fedpipe_core.config_base import WireDtype
from fedpipe_core.errors import IntegrityError
from fedpipe_core.low_rank import LowRank
from fedpipe_core.quantization import QuantizedDtype, dequantize, quantize, stored_sizes

Content = Literal["adapter", "factor_changes", "left_factor_changes", "directions"]
Shape = tuple[int, ...]
FORMAT = 1
_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED_DTYPES = {"fp32": "F32", "bf16": "BF16"}
# What reading bytes of the wrong form raises inside safetensors, json, torch and this module.
_MALFORMED = (safetensors.SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError)


def encode_adapter(adapter: Adapter, dtype: WireDtype, content: Content = "adapter") -> bytes:
    """The adapter as one safetensors file, whose metadata key `fedpipe` carries format, dtype, content and layout.

    Of `left_factor_changes` only B is kept: A did not change.
    """
    layout = {
        "content": content,
        "dtype": dtype,
        "format": FORMAT,
        "head": {name: list(value.shape) for name, value in sorted(adapter.head.items())},
        "modules": {m: [f.shape[0], f.rank, f.shape[1]] for m, f in sorted(adapter.factors.items())},
    }
    values = {f"head/{name}": value.detach() for name, value in adapter.head.items()}
    for module, factors in adapter.factors.items():
        values[f"factors/{module}/B"], values[f"factors/{module}/A"] = factors.B.detach(), factors.A.detach()
    if is_plain(dtype):
        tensors = {name: values[name].to(_PLAIN[dtype]).contiguous() for name in _shapes(layout)}
    else:
        parts = [quantize(_blockwise(name, values[name]), dtype) for name in _shapes(layout)]
        tensors = {"codes": torch.cat([codes for codes, _ in parts]), "scales": torch.cat([s for _, s in parts])}
    # One metadata key: safetensors writes several in an order that differs from process to process.
    return safetensors.torch.save(tensors, {"fedpipe": json.dumps(layout, separators=(",", ":"), sort_keys=True)})


def is_plain(dtype: WireDtype) -> TypeIs[Literal["fp32", "bf16"]]:
    """Whether numbers are only rounded to a shorter float, not replaced by blockwise codes."""
    return dtype in _PLAIN


def decode_adapter(data: bytes) -> Adapter:
    """The adapter in float32. Numbers that are not finite pass: `update_checks` names them.

    Raises IntegrityError on anything `encode_adapter` cannot have written.
    """
    with malformed_is_integrity_error(f"adapter of {len(data)} bytes"):
        stored = _stored_bytes(data)
        stored.require("adapter")
        return stored.adapter()


def decode_any(data: bytes) -> tuple[Content, Adapter]:
    """What the bytes hold and its tensors in float32. Raises IntegrityError as `decode_adapter` does."""
    with malformed_is_integrity_error(f"adapter of {len(data)} bytes"):
        stored = _stored_bytes(data)
        return stored.content, stored.adapter()


def open_adapter(path: Path) -> Adapter:
    """`decode_adapter` of a file, read module by module at each use, so memory never holds more than one.

    Raises IntegrityError on a file `encode_adapter` cannot have written, now or at the use of a module.
    """
    factors = StoredFactors(path)
    with factors.opened() as stored:
        stored.require("adapter")
        return Adapter(factors, stored.head())


class StoredFactors(Mapping[str, LowRank]):
    """The factors of an encoded adapter in a file, read at each use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self.opened() as stored:
            self.content, self._modules = stored.content, stored.modules

    def __getitem__(self, module: str) -> LowRank:
        if module not in self._modules:
            raise KeyError(module)
        with self.opened() as stored:
            return stored.factors(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @contextmanager
    def opened(self) -> "Iterator[Stored]":
        """The encoded adapter while its file is open."""
        with malformed_is_integrity_error(f"adapter file {self._path.name}"):
            with self._path.open("rb") as file:
                length = min(int.from_bytes(file.read(8), "little"), self._path.stat().st_size)
                header = json.loads(file.read(length))
            with safetensors.safe_open(self._path, framework="pt") as tensors:
                yield Stored(header, tensors.get_tensor, lambda name, part: tensors.get_slice(name)[part])


class Stored:
    """One encoded adapter behind two readers: of a whole tensor, and of a part of one."""

    def __init__(
        self, header: Mapping[str, Any], whole: Callable[[str], Tensor], part: Callable[[str, slice], Tensor]
    ) -> None:
        layout = json.loads(header["__metadata__"]["fedpipe"])
        if layout["format"] != FORMAT or layout["dtype"] not in get_args(WireDtype):
            raise ValueError(f"format {layout['format']} with dtype {layout['dtype']} is not one this version reads")
        self.content: Content = layout["content"]
        self.modules: list[str] = list(layout["modules"])
        self._head: list[str] = list(layout["head"])
        self._dtype: WireDtype = layout["dtype"]
        self._sizes: dict[str, list[int]] = layout["modules"]
        self._shapes, self._whole, self._part = _shapes(layout), whole, part
        self._check_entries({name: entry for name, entry in header.items() if name != "__metadata__"})

    def require(self, content: Content) -> None:
        """Raises ValueError when these bytes hold something else."""
        if self.content != content:
            raise ValueError(f"it holds {self.content}, not {content}")

    def adapter(self) -> Adapter:
        """All of it in float32."""
        return Adapter({module: self.factors(module) for module in self.modules}, self.head())

    def factors(self, module: str) -> LowRank:
        """One module's factors in float32; an A that was left out as unchanged is zero."""
        B = self._read(f"factors/{module}/B")
        if self.content == "left_factor_changes":
            return LowRank(B, torch.zeros(self._sizes[module][1:], dtype=torch.float32))
        return LowRank(B, self._read(f"factors/{module}/A"))

    def head(self) -> dict[str, Tensor]:
        """The head's parameters in float32."""
        return {name: self._read(f"head/{name}") for name in self._head}

    def _read(self, name: str) -> Tensor:
        if is_plain(self._dtype):
            return self._whole(name).float()
        code, scale = self._begins[name]
        codes, scales = stored_sizes(self._shapes[name], self._dtype)
        pieces = self._part("codes", slice(code, code + codes)), self._part("scales", slice(scale, scale + scales))
        shape = self._shapes[name][::-1] if name.endswith("/B") else self._shapes[name]
        return _blockwise(name, dequantize(*pieces, shape, self._dtype))

    def _check_entries(self, entries: Mapping[str, Any]) -> None:
        """Raises ValueError unless the file holds exactly the tensors its layout promises."""
        found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        if is_plain(self._dtype):
            needed = {name: (_STORED_DTYPES[self._dtype], shape) for name, shape in self._shapes.items()}
        else:
            self._begins, codes, scales = _begins(self._shapes, self._dtype)
            needed = {"codes": ("U8", (codes,)), "scales": ("BF16", (scales,))}
        wrong = sorted(name for name in found.keys() | needed.keys() if found.get(name) != needed.get(name))
        if wrong:
            raise ValueError(f"{wrong[0]} is {found.get(wrong[0])}, needed {needed.get(wrong[0])}")


def _shapes(layout: Mapping[str, Any]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for module, (out_features, rank, in_features) in layout["modules"].items():
        shapes[f"factors/{module}/B"] = (out_features, rank)
        if layout["content"] != "left_factor_changes":
            shapes[f"factors/{module}/A"] = (rank, in_features)
    shapes |= {f"head/{name}": tuple(shape) for name, shape in layout["head"].items()}
    if not all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape):
        raise ValueError("a size in the layout is not a natural number")
    return shapes


def _begins(shapes: Mapping[str, Shape], dtype: QuantizedDtype) -> tuple[dict[str, tuple[int, int]], int, int]:
    """Where each tensor's codes and scales begin, and how many there are of both."""
    begins, code, scale = {}, 0, 0
    for name, shape in shapes.items():
        begins[name] = (code, scale)
        codes, scales = stored_sizes(shape, dtype)
        code, scale = code + codes, scale + scales
    return begins, code, scale


def _blockwise(name: str, value: Tensor) -> Tensor:
    """B transposed, so that a block lies within one component; components differ in size by orders of magnitude."""
    return value.T.contiguous() if name.endswith("/B") and name.startswith("factors/") else value


def _stored_bytes(data: bytes) -> Stored:
    tensors = safetensors.torch.load(data)  # checks the header's own consistency first
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return Stored(header, tensors.__getitem__, lambda name, part: tensors[name][part])


@contextmanager
def malformed_is_integrity_error(what: str) -> Iterator[None]:
    """Raises IntegrityError, naming `what`, where reading it fails."""
    try:
        yield
    except _MALFORMED as error:
        cause = " ".join(str(error).split())
        raise IntegrityError(
            f"{what} cannot be read ({cause}), needed one written by fedpipe; fetch it again"
        ) from None
