"""What an edge has, measured: free memory, step time, and the bytes autograd keeps.

Declared resources stand in for the measured ones (`declared_step_cost`); what a link to the store carries is measured
where the store is known, in `tasks`.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe_core.adapters import initial_adapter, split_for_edge
from fedpipe_core.architecture import adaptable_modules, bits_of, head_parameters
from fedpipe_core.batches import Batch
from fedpipe_core.costs import DEQUANTIZED_FORWARD
from fedpipe_core.edge_model import build_edge_model, load_adapter, move_batch, own_head
from fedpipe_core.losses import training_loss
from fedpipe_core.model import device_of, share
from fedpipe_core.profile_schemas import ActivationCost, ModelShape, StepCost

Clock = Callable[[], float]
CGROUP = Path("/sys/fs/cgroup")
TIMED_RANKS = (2, 32)
TIMED_STEPS = 2
LEAST_FORWARD, MOST_FORWARD = 0.2, 0.6  # of a step's work: beyond, it is the clock that is wrong
TIMED_PARAMETERS = 2**22  # more than a cache holds
# What gradient, clipping and optimizer take per parameter, in floating-point operations of a step that take as long.
OPTIMIZER_FLOPS = 90


def free_memory_bytes(device: torch.device) -> int:
    """Memory this process may still take: of the GPU, or of the machine within its container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    machine = int(psutil.virtual_memory().available)
    container = container_free_bytes(CGROUP)
    return machine if container is None else min(machine, container)


def container_free_bytes(cgroup: Path) -> int | None:
    """What a container's limit leaves (Linux control groups, version 2); None where there is no limit.

    Cached files count as free, for the kernel drops them first.
    """
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used) + int(statistics.get("inactive_file", 0)))


def declared_step_cost(tokens_per_second: float, step_seconds: float, shape: ModelShape) -> StepCost:
    """Step cost of an edge that is declared to train `tokens_per_second` on the dense base without adapters.

    A frozen matrix costs 4 FLOPs per parameter and token (forward, and gradient of the input), an adapter 6 per rank
    and feature (its weight gradients too); their ratio prices a rank.
    """
    per_token = 1.0 / tokens_per_second
    return StepCost(
        fixed_seconds=step_seconds,
        per_token_seconds=per_token,
        per_token_rank_seconds=per_token * 6.0 / (4.0 * shape.linear_parameters),
        per_parameter_seconds=per_token * OPTIMIZER_FLOPS / (4.0 * shape.linear_parameters),
    )


def measured_step_cost(
    base: nn.Module,
    small: Batch,
    large: Batch,
    bits: Iterable[int] = (),
    clock: Clock = time.perf_counter,
    whole: bool = False,
) -> StepCost:
    """Time a few steps of five kinds and solve for the coefficients of `StepCost`, none below 0.

    The kinds: no adapter, and adapters of two ranks on every module, with the large batch; the lower rank with the
    small batch; and the head alone, whose gradients reach no block, for what the forward pass takes. `small` and
    `large` are batches of the edge's own data. Each kind counts with the fastest of its steps, since other work can
    only slow one down. `bits` are the widths that a plan may choose, of which the quantized ones are priced by what
    dequantization takes; on a quantized `base` that is taken off what was measured, so that the coefficients are a
    dense base's. With `whole` the optimizer is timed for a model all of which is trained. `clock` gives seconds: wall
    time, which a round is made of, or another that a comparison needs.
    """
    low, high = TIMED_RANKS
    quantized = sorted((width for width in {*bits, bits_of(base)} if width < 16), reverse=True)
    dequantization = {width: _dequantization_seconds(base, width, clock) for width in quantized}
    dequantized = dequantization.get(bits_of(base), 0.0)
    features = sum(shape.features for shape in adaptable_modules(base).values())

    def timed(step: Callable[[Mapping[str, Tensor]], Any], batch: Batch) -> float:
        return _fastest_seconds(partial(step, move_batch(batch, base)), device_of(base), clock)

    rows, seconds = [], []
    for rank, batch in ((0, large), (low, small), (low, large), (high, large)):
        tokens = float(batch["input_ids"].numel())
        rows.append([1.0, tokens, tokens * features * (rank > 0), tokens * features * rank])
        taken = timed(_adapted_step(base, rank) if rank else _plain_step(base), batch)
        seconds.append(max(0.0, taken - dequantized))
    from scipy.optimize import nnls  # 0.4 s of CPU, which an edge of declared resources does not need

    matrix = torch.tensor(rows, dtype=torch.float64)
    scale = matrix.amax(dim=0)
    fitted = nnls((matrix / scale).numpy(), seconds)[0] / scale.numpy()
    per_token = float(fitted[1]) or (seconds[0] or taken) / rows[0][1]
    forward = timed(_forward_step(base), large) - float(fitted[0]) - DEQUANTIZED_FORWARD * dequantized
    return StepCost(
        fixed_seconds=float(fitted[0]),
        per_token_seconds=per_token,
        forward_share=min(max(forward / (per_token * rows[0][1]), LEAST_FORWARD), MOST_FORWARD),
        per_token_feature_seconds=float(fitted[2]),
        per_token_rank_seconds=float(fitted[3]),
        per_parameter_seconds=_parameter_seconds(device_of(base), clock) if whole else 0.0,
        dequantization_seconds=dequantization,
    )


def measured_activation_cost(base: nn.Module, small: Batch, large: Batch) -> ActivationCost:
    """Count the bytes kept for the backward pass at two batch sizes, and what an adapter on each module adds.

    Exact, and costs two forward passes: tensors are counted as autograd saves them, each storage once.
    """
    model = _reached_to_the_first_block(base)
    inputs: dict[str, Tensor] = {}
    for name in adaptable_modules(model):
        model.get_submodule(name).register_forward_pre_hook(_remember_input(inputs, name))
    (few, few_bytes, _), (many, many_bytes, kept) = (_saved_bytes(model, batch) for batch in (small, large))
    per_token = max(0.0, (many_bytes - few_bytes) / max(1, many - few))
    return ActivationCost(
        fixed_bytes=max(0, round(few_bytes - per_token * few)),
        per_token_bytes=per_token,
        per_token_module_bytes={name: _unkept_bytes(value, kept) / many for name, value in inputs.items()},
    )


def saved_tensor_bytes(forward: Callable[[], Any], ignored: Iterable[Tensor] = ()) -> tuple[int, set[int]]:
    """Bytes that autograd keeps while `forward` runs, each storage once, and the storages themselves by address."""
    skipped = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation that keeps its own result would hold itself, and all before it, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept alive until counted, so that no address is used twice
    del result
    return sum(kept.values()), set(kept)


def _saved_bytes(model: nn.Module, batch: Batch) -> tuple[int, int, set[int]]:
    moved = move_batch(batch, model)
    size, kept = saved_tensor_bytes(lambda: training_loss(model, moved), model.parameters())
    return batch["input_ids"].numel(), size, kept


def _remember_input(inputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def remember(module: nn.Module, values: tuple[Tensor, ...]) -> None:
        inputs[name] = values[0]

    return remember


def _unkept_bytes(value: Tensor, kept: set[int]) -> int:
    """An adapter needs its module's input in the backward pass; it costs nothing where the base keeps it anyway."""
    storage = value.untyped_storage()
    return 0 if storage.data_ptr() in kept else storage.nbytes()


def _reached_to_the_first_block(base: nn.Module) -> nn.Module:
    """An instance without adapters whose gradients flow through all its blocks."""
    model = share(base)
    own_head(model)
    model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_(True))  # type: ignore[operator]
    return model


def _plain_step(base: nn.Module) -> Callable[[Mapping[str, Tensor]], None]:
    """One step of a throw-away instance that trains its head alone, or nothing where it has none."""
    model = _reached_to_the_first_block(base)
    return _step(model, head_parameters(model).values())


def _forward_step(base: nn.Module) -> Callable[[Mapping[str, Tensor]], Any]:
    """One step of a throw-away instance whose gradients end at its head, or that has none where there is no head."""
    model = share(base)
    own_head(model)
    head = head_parameters(model).values()
    return _step(model, head) if head else torch.no_grad()(partial(training_loss, model))


def _adapted_step(base: nn.Module, rank: int) -> Callable[[Mapping[str, Tensor]], None]:
    """One optimizer step of a throw-away instance with every module adapted at `rank`."""
    shapes = adaptable_modules(base)
    ranks = dict.fromkeys(shapes, rank)
    edge = build_edge_model(base, ranks, rank, scaling=1.0)
    head = {name: value.detach().clone() for name, value in head_parameters(edge.model).items()}
    load_adapter(edge, *split_for_edge(initial_adapter(shapes, rank, head, seed=0), ranks, seed=0))
    return _step(edge.model, [*edge.adapter_parameters(), *edge.head_parameters()])


def _step(model: nn.Module, trained: Iterable[nn.Parameter]) -> Callable[[Mapping[str, Tensor]], None]:
    # An unused parameter makes the step of a model without a head the same call.
    optimizer = torch.optim.AdamW([*trained, nn.Parameter(torch.zeros(1))], lr=1e-5)

    def step(batch: Mapping[str, Tensor]) -> None:
        training_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _parameter_seconds(device: torch.device, clock: Clock) -> float:
    """Seconds that a new gradient, clipping and the optimizer's step take per parameter, where all are trained."""
    parameter = nn.Parameter(torch.zeros(TIMED_PARAMETERS, device=device, dtype=torch.float32))
    optimizer = torch.optim.AdamW([parameter], lr=1e-5, fused=True)

    def step() -> None:
        parameter.grad = torch.ones_like(parameter)
        nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _fastest_seconds(step, device, clock) / TIMED_PARAMETERS


def _dequantization_seconds(base: nn.Module, bits: int, clock: Clock) -> float:
    """Seconds to dequantize all matrices twice, forward and backward, in proportion to what the largest takes."""
    sizes = [(shape.out_features, shape.in_features) for shape in adaptable_modules(base).values()]
    largest = max(sizes, key=math.prod)
    device = device_of(base)
    weight = torch.randn(largest, device=device, dtype=next(base.parameters()).dtype)
    seconds = _fastest_seconds(_dequantizer(weight, bits), device, clock)
    return 2 * seconds * sum(map(math.prod, sizes)) / math.prod(largest)


def _dequantizer(weight: Tensor, bits: int) -> Callable[[], Any]:
    """What bitsandbytes does to a weight before it multiplies by it."""
    if bits == 8:
        codes, scales = weight.to(torch.int8), weight[:, :1].clone()
        return lambda: codes.to(weight.dtype).mul_(scales)
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return lambda: dequantize_4bit(packed, state)


def _fastest_seconds(action: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    action()  # the first one also pays for allocations
    return min(_timed(action, device, clock) for _ in range(TIMED_STEPS))


def _timed(action: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    started = clock()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started
