"""Exports quantized by bitsandbytes: the merged model in int8 or NF4, and the NF4 base with the adapter beside it.

Merging is done in float32 and quantizing once, afterwards: a change merged into a quantized base would be rounded away.
Folders load with `transformers` alone, whose config.json says how; the head and embeddings stay dense.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from fedpipe_core.adapters import Adapter
from fedpipe_core.architecture import dense_modules
from fedpipe_core.export import EXPORT_SCHEMES, ExportScheme, TunedModel, write_tokenizer
from fedpipe_core.model_weights import bitsandbytes_config, keep_weights_in_place
from fedpipe_core.startup import quiet_transformers


def _quantized(bits: int) -> Callable[[TunedModel, Path], None]:
    """A writer of dense base + adapter, read back through bitsandbytes, which saves what that made of it."""

    def write(tuned: TunedModel, folder: Path) -> None:
        on_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        config = bitsandbytes_config(dense_modules(tuned.base.model), bits, dtype)
        with TemporaryDirectory(prefix="fedpipe-dense-") as dense:
            EXPORT_SCHEMES["merged"].write(replace(tuned, dtype="fp32"), Path(dense))
            options = {"quantization_config": config, "device_map": "cuda" if on_gpu else "cpu", "dtype": dtype}
            model = _from_folder(tuned, Path(dense), **options)
            keep_weights_in_place(model)  # what a forward pass repacks would be saved wrongly
            model.save_pretrained(folder)
        write_tokenizer(tuned, folder)

    return write


def _write_beside(tuned: TunedModel, folder: Path) -> None:
    """`base/` holds the quantized base, `adapter/` the PEFT folder for it."""
    _quantized(4)(replace(tuned, adapter=Adapter({}, {})), folder / "base")
    EXPORT_SCHEMES["adapter"].write(tuned, folder / "adapter")


def _load(tuned: TunedModel, folder: Path) -> nn.Module:
    model: nn.Module = _from_folder(tuned, folder)
    return model


def _load_beside(tuned: TunedModel, folder: Path) -> nn.Module:
    from peft import PeftModel

    base = _from_folder(tuned, folder / "base")
    model: nn.Module = PeftModel.from_pretrained(base, folder / "adapter").eval()
    return model


def _from_folder(tuned: TunedModel, folder: Path, **options: object) -> Any:
    quiet_transformers()
    architecture: Any = type(tuned.base.model)
    return architecture.from_pretrained(folder, local_files_only=True, **options).eval()


QUANTIZED_SCHEMES: dict[str, ExportScheme] = {
    "int8": ExportScheme(_quantized(8), _load),
    "nf4": ExportScheme(_quantized(4), _load),
    "nf4+adapter": ExportScheme(_write_beside, _load_beside),
}
