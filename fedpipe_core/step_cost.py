"""What an optimizer step costs an edge: timed on its own batches, or reckoned from what the config declares."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe_core.architecture import adaptable_modules, bits_of
from fedpipe_core.batches import Batch
from fedpipe_core.costs import DEQUANTIZED_FORWARD
from fedpipe_core.edge_model import move_batch
from fedpipe_core.model import device_of
from fedpipe_core.probe_steps import adapted_step, forward_step
from fedpipe_core.profile_schemas import ModelShape, StepCost

Clock = Callable[[], float]
TIMED_RANKS = (2, 32)
TIMED_STEPS = 2
LEAST_FORWARD, MOST_FORWARD = 0.2, 0.6  # of a step's work: beyond, it is the clock that is wrong
TIMED_PARAMETERS = 2**22  # more than a cache holds
# What gradient, clipping and optimizer take per parameter, in floating-point operations of a step that take as long.
OPTIMIZER_FLOPS = 90


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
    kinds = ((0, large), (low, small), (low, large), (high, large))
    taken = [_seconds_of(adapted_step(base, rank), base, batch, clock) for rank, batch in kinds]
    seconds = [max(0.0, found - dequantized) for found in taken]
    features = sum(shape.features for shape in adaptable_modules(base).values())
    fitted = _fitted([_work_of(features, rank, batch) for rank, batch in kinds], seconds)
    tokens = large["input_ids"].numel()
    per_token = fitted[1] or (seconds[0] or taken[-1]) / tokens
    forward = _seconds_of(forward_step(base), base, large, clock) - fitted[0] - DEQUANTIZED_FORWARD * dequantized
    return StepCost(
        fixed_seconds=fitted[0],
        per_token_seconds=per_token,
        forward_share=min(max(forward / (per_token * tokens), LEAST_FORWARD), MOST_FORWARD),
        per_token_feature_seconds=fitted[2],
        per_token_rank_seconds=fitted[3],
        per_parameter_seconds=_parameter_seconds(device_of(base), clock) if whole else 0.0,
        dequantization_seconds=dequantization,
    )


def _work_of(features: int, rank: int, batch: Batch) -> list[float]:
    """What each coefficient of a step is multiplied by, with modules of that many features adapted at `rank`."""
    tokens = float(batch["input_ids"].numel())
    return [1.0, tokens, tokens * features * (rank > 0), tokens * features * rank]


def _fitted(work: list[list[float]], seconds: list[float]) -> list[float]:
    """The coefficients, none below 0, whose products with the work come closest to the seconds."""
    from scipy.optimize import nnls  # 0.4 s of CPU, which an edge of declared resources does not need

    matrix = torch.tensor(work, dtype=torch.float64)
    scale = matrix.amax(dim=0)
    return [float(value) for value in nnls((matrix / scale).numpy(), seconds)[0] / scale.numpy()]


def _seconds_of(step: Callable[[Mapping[str, Tensor]], Any], base: nn.Module, batch: Batch, clock: Clock) -> float:
    return _fastest_seconds(partial(step, move_batch(batch, base)), device_of(base), clock)


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
