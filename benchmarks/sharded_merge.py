"""How much memory does it take to merge an adapter into a large base and write the model?

Run `python benchmarks/sharded_merge.py [--json] [--quick]`. A Llama of random weights is written to a temporary folder
in shards, with an adapter of rank 16 on every matrix of its blocks; then a fresh process merges and writes it as a
release does, from the files, shard by shard, and another one whole in memory. Each process counts the kernel's peak
(VmHWM, pages of mapped files included) over what it held before it began. Both must write the same tensors.
"""

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Check, at_least, at_most, finish, markdown_table, parser
from costs_process import memory_of_process
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedpipe_core.adapters import Adapter, initial_adapter
from fedpipe_core.allocator import return_freed_memory
from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.export import merge
from fedpipe_core.merged_weights import MergedWeights, write_weights
from fedpipe_core.model import Base
from fedpipe_core.startup import quiet_transformers

INDEX = "model.safetensors.index.json"
RANK = 16
DTYPE = torch.bfloat16
MOST_SHARDS = 1.3
SIZES = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 12}
QUICK_SIZES = SIZES | {"num_hidden_layers": 6}
SHARD_BYTES, QUICK_SHARD_BYTES = 256 * 2**20, 96 * 2**20


@dataclass(frozen=True)
class Written:
    """One way of writing: what it took."""

    way: str
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """What peaks are told beside: the whole model, its largest shard, and its largest adapted matrix in float32."""

    model_bytes: int
    shard_bytes: int
    layer_bytes: int

    @property
    def allowed_bytes(self) -> float:
        """1.3 times the largest shard, plus one layer."""
        return MOST_SHARDS * self.shard_bytes + self.layer_bytes


def config_of(quick: bool) -> LlamaConfig:
    """A Llama of 0.8 or 0.3 billion parameters."""
    return LlamaConfig(**(QUICK_SIZES if quick else SIZES), vocab_size=32000, tie_word_embeddings=False, dtype=DTYPE)


def outline(folder: Path) -> Base:
    """The base without a weight in memory; names and shapes are all the writer asks of it."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    return Base(model, None, folder, "random", 16)


def adapter_for(base: Base) -> Adapter:
    """Random factors of rank 16 on every matrix of the blocks."""
    adapter = initial_adapter(adaptable_modules(base.model), RANK, {}, seed=0)
    generator = torch.Generator().manual_seed(0)
    for factors in adapter.factors.values():
        factors.B.normal_(std=1e-2, generator=generator)
    return adapter


def write_base(folder: Path, quick: bool, shard_bytes: int) -> None:
    """Random weights in shards, never more than one shard at a time."""
    config_of(quick).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for name, value in outline(folder).model.state_dict().items():
        shard[name] = torch.randn(value.shape, generator=generator).mul_(0.02).to(torch.float16)
        if sum(tensor.nbytes for tensor in shard.values()) > shard_bytes:
            weight_map |= _saved(shard, folder, name)
            shard = {}
    weight_map |= _saved(shard, folder, "last")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _saved(shard: dict[str, torch.Tensor], folder: Path, name: str) -> dict[str, str]:
    file = f"{name}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(shard, file)


def shard_by_shard(folder: Path, out: Path, shard_bytes: int) -> Callable[[], None]:
    """The writer of a release."""
    base = outline(folder)
    weights = MergedWeights(base, adapter_for(base))
    return lambda: write_weights(weights, out, DTYPE, shard_bytes)


def whole(folder: Path, out: Path, shard_bytes: int) -> Callable[[], None]:
    """Load, merge and save with the whole model in memory, in float32 as rounds are judged."""
    adapter = adapter_for(outline(folder))

    def write() -> None:
        model: Any = merge(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
        model.to(DTYPE).save_pretrained(out, max_shard_size=shard_bytes)

    return write


WAYS = {"shard by shard": shard_by_shard, "whole in memory": whole}


def measured(way: str, folder: Path, out: Path, shard_bytes: int) -> Written:
    """One way in this process, over what it holds before."""
    torch.set_num_threads(1)
    return_freed_memory()  # as every process that loads a base does
    quiet_transformers()
    write = WAYS[way](folder, out, shard_bytes)
    baseline = memory_of_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    started = time.perf_counter()
    write()
    return Written(way, memory_of_process("VmHWM") - baseline, time.perf_counter() - started)


def in_fresh_process(way: str, folder: Path, out: Path, shard_bytes: int) -> Written:
    """`measured` in a process that did nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (way, folder, out, shard_bytes))


def equal_tensors(left: Path, right: Path) -> float:
    """Share of the tensors of two folders that are equal to the bit; 0 where their names differ."""
    maps = [json.loads((folder / INDEX).read_text())["weight_map"] for folder in (left, right)]
    if maps[0].keys() != maps[1].keys():
        return 0.0
    equal = 0
    for name in maps[0]:
        with safe_open(left / maps[0][name], "pt") as one, safe_open(right / maps[1][name], "pt") as other:
            equal += torch.equal(one.get_tensor(name), other.get_tensor(name))
    return equal / len(maps[0])


def sizes_of(folder: Path, out: Path) -> Sizes:
    """Sizes of the model as it was written."""
    files = [path.stat().st_size for path in out.glob("*.safetensors")]
    shapes = adaptable_modules(outline(folder).model).values()
    return Sizes(sum(files), max(files), max(4 * shape.out_features * shape.in_features for shape in shapes))


def table(rows: list[Written], sizes: Sizes) -> str:
    """The table in Markdown."""
    mib = 2**20
    cells = [
        [
            row.way,
            f"{row.peak_bytes / mib:.0f}",
            f"{row.peak_bytes / sizes.shard_bytes:.2f}",
            f"{row.peak_bytes / sizes.model_bytes:.2f}",
            f"{row.seconds:.1f}",
        ]
        for row in rows
    ]
    head = ["written", "peak (MiB)", "of the largest shard", "of the model", "seconds"]
    return (
        f"{markdown_table(head, cells)}\n\nmodel {sizes.model_bytes / mib:.0f} MiB, largest shard "
        f"{sizes.shard_bytes / mib:.0f} MiB, largest adapted matrix in float32 {sizes.layer_bytes / mib:.0f} MiB"
    )


def main() -> None:
    """Write the base, merge it both ways, compare."""
    made = parser(__doc__)
    made.add_argument("--quick", action="store_true", help="a smaller model")
    options = made.parse_args()
    shard_bytes = QUICK_SHARD_BYTES if options.quick else SHARD_BYTES
    with TemporaryDirectory(prefix="fedpipe-merge-") as made_folder:
        root = Path(made_folder)
        folders = {way: root / way.replace(" ", "-") for way in WAYS}
        write_base(root / "base", options.quick, shard_bytes)
        rows = [in_fresh_process(way, root / "base", out, shard_bytes) for way, out in folders.items()]
        equal = equal_tensors(*folders.values())
        sizes = sizes_of(root / "base", folders["shard by shard"])
    checks: list[Check] = [
        at_most("peak_over_allowed", rows[0].peak_bytes / sizes.allowed_bytes, 1.0),
        at_least("tensors_equal", equal, 1.0),
    ]
    results = {"rows": [asdict(row) for row in rows], "sizes": asdict(sizes)}
    finish(options.json, results, checks, table(rows, sizes))


if __name__ == "__main__":
    main()
