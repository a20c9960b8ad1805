"""One edge's planning problem as arrays: what each module and rank is worth and costs in each cell.

A cell fixes batch size, base bits and checkpointing. Given a cell, the lowest block that carries an adapter and the
number of local steps, value, memory and seconds are linear in the chosen (module, rank) pairs. This module builds the
arrays from `costs`; choosing is left to `planning_greedy` and `planning_solver`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fedpipe_core.config import FederationConfig, PlanPin
from fedpipe_core.costs import CostModel, Work
from fedpipe_core.methods import METHODS
from fedpipe_core.planning_utility import FloatArray
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape

IntArray = NDArray[np.int64]
# Utility given up for a coarser base, as a share of the whole menu's: its rounding error is never trained away.
BITS_LOSS = {32: 0.0, 16: 0.002, 8: 0.01, 4: 0.05}
# A batch of b examples moves the model like b·noise/(b + noise) examples taken singly (gradient noise scale, arXiv
# 1812.06162, eq. 2.6), so the same data in larger batches teaches less. With 64 the slowest edge of CLINC150 by domain
# took 6 steps of 32 examples a round and hardly learned.
NOISE_SCALE_EXAMPLES = 16


@dataclass(frozen=True)
class Cell:
    """Batch size, bits and checkpointing, with the costs that follow. `item_*` are (modules, ranks)."""

    batch_size: int
    base_bits: int
    checkpointing: bool
    planned_steps: int
    least_steps: int
    loss: float  # of value, for a coarser base
    share_per_step: float  # of what the planned examples teach in the menu's smallest batches
    idle_seconds: float
    block_memory: FloatArray
    block_seconds: FloatArray
    item_memory: FloatArray
    item_seconds: FloatArray
    item_upload_seconds: FloatArray

    @property
    def preference(self) -> tuple[int, bool, int]:
        """Order among plans of equal value: finer base, no recomputation, smaller batch (more steps per example)."""
        return (-self.base_bits, self.checkpointing, self.batch_size)


@dataclass(frozen=True)
class RoundTerms:
    """What a round allows an edge, and what examples it leaves over cost."""

    seconds: float
    penalty: float


@dataclass(frozen=True)
class EdgeProblem:
    """What one edge may choose from. Modules are sorted by block, last block first; `blocks` are the lowest blocks."""

    costs: CostModel
    planned_examples: int
    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    pinned_ranks: Mapping[str, int]
    blocks: tuple[int, ...]
    modules_reached: tuple[int, ...]  # per lowest block, how many of `modules` lie at or above it
    utility: FloatArray  # (modules, ranks); negative where a rank exceeds what the module can carry
    pinned_utility: float
    cells: tuple[Cell, ...]

    @property
    def memory_bytes(self) -> int:
        """The edge's budget."""
        return self.costs.profile.memory_bytes

    @cached_property
    def block_of_module(self) -> IntArray:
        """Per module the index into `blocks` of the block it lies in."""
        last = np.arange(len(self.modules))[:, None] < np.asarray(self.modules_reached)
        index: IntArray = last.sum(axis=1) - 1
        return index

    def ranks_of(self, choice: Sequence[int]) -> dict[str, int]:
        """The ranks behind a choice of one column per module, -1 for no adapter, in the model's order."""
        chosen = {name: self.ranks[column] for name, column in zip(self.modules, choice, strict=True) if column >= 0}
        chosen |= self.pinned_ranks
        return {name: chosen[name] for name in self.costs.shape.modules if name in chosen}


def adaptable_modules(shape: ModelShape, ranks: Sequence[int]) -> tuple[str, ...]:
    """Modules that can carry the smallest rank, last block first."""
    fitting = [n for n, m in shape.modules.items() if min(m.out_features, m.in_features) >= min(ranks)]
    return tuple(sorted(fitting, key=lambda name: -shape.modules[name].layer))


def cost_model(
    shape: ModelShape, profile: EdgeProfile, global_ranks: Mapping[str, int], config: FederationConfig
) -> CostModel:
    """Prices of an edge's work under the config's number format, micro batches and aggregation rule."""
    return CostModel(
        shape=shape,
        profile=profile,
        global_ranks=global_ranks,
        wire_dtype=config.exchange.dtype,
        global_dtype=config.exchange.dtype_of_global,
        micro_batch_size=config.training.micro_batch_size,
        frozen_a=config.aggregation.rule == "ffa",
        whole=METHODS[config.method].form == "whole",
    )


def build_problem(
    costs: CostModel, config: FederationConfig, pin: PlanPin, utility: Mapping[str, FloatArray], ranks: Sequence[int]
) -> EdgeProblem:
    """Lay out one edge's problem; `utility` maps a module to its value at each of `ranks`."""
    pinned = dict(pin.ranks or {})
    modules = () if pinned else adaptable_modules(costs.shape, ranks)
    layers = [costs.shape.modules[name].layer for name in modules or pinned]
    blocks = (min(layers),) if pinned else tuple(sorted(set(layers)))
    planned = config.training.examples_per_round or costs.profile.num_examples
    items, menu = _price_items(costs, modules, ranks, pinned, blocks), _menu(costs, config, pin)
    return EdgeProblem(
        costs=costs,
        planned_examples=planned,
        modules=modules,
        ranks=tuple(ranks),
        pinned_ranks=pinned,
        blocks=blocks,
        modules_reached=tuple(0 if pinned else sum(layer >= block for layer in layers) for block in blocks),
        utility=_utility_table(costs.shape, modules, ranks, utility),
        pinned_utility=sum(_utility_at(utility[name], ranks, r) for name, r in pinned.items() if name in utility),
        cells=tuple(_price_cell(items, blocks, work, planned, pin, _taught(work, menu)) for work in menu),
    )


def _utility_table(
    shape: ModelShape, modules: Sequence[str], ranks: Sequence[int], utility: Mapping[str, FloatArray]
) -> FloatArray:
    limits = [min(shape.modules[name].out_features, shape.modules[name].in_features) for name in modules]
    rows = [np.where(np.asarray(ranks) <= limit, utility[m], -1.0) for m, limit in zip(modules, limits, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(len(modules), len(ranks))


def _utility_at(utility: FloatArray, ranks: Sequence[int], rank: int) -> float:
    return float(np.interp(rank, [0, *ranks], [0.0, *utility]))


def _menu(costs: CostModel, config: FederationConfig, pin: PlanPin) -> list[Work]:
    """One unit of work per cell. A batch never exceeds the data: larger ones would be the same short batch."""
    planning = config.planning
    sizes = {pin.batch_size} if pin.batch_size else {costs.batch_examples(size) for size in planning.batch_sizes}
    bits = {pin.base_bits} if pin.base_bits else set(config.model.bits)
    can_checkpoint = planning.checkpointing == "auto" and costs.shape.hidden_features > 0
    menu = product(sorted(sizes), sorted(bits, reverse=True), (False, True) if can_checkpoint else (False,))
    return [Work(pin.ranks or {}, size, 1, width, checkpointing) for size, width, checkpointing in menu]


def _taught(work: Work, menu: Sequence[Work]) -> float:
    """Examples of the menu's smallest batches that one step of this work is worth."""
    smallest = min(other.batch_size for other in menu)
    return work.batch_size * (NOISE_SCALE_EXAMPLES + smallest) / (NOISE_SCALE_EXAMPLES + work.batch_size)


@dataclass(frozen=True)
class _Items:
    """Cost of each (module, rank) beyond no adapter, and of what is there whatever is chosen."""

    costs: CostModel
    parameter_bytes: FloatArray
    activation_bytes_per_token: FloatArray
    seconds_per_token: FloatArray
    upload_seconds: FloatArray
    standing_bytes: float
    standing_seconds_per_token: dict[bool, FloatArray]  # by checkpointing, per lowest block
    fullest_block_bytes_per_token: float  # every module of one block at its largest rank


def _price_items(
    costs: CostModel, modules: Sequence[str], ranks: Sequence[int], pinned: Mapping[str, int], blocks: Sequence[int]
) -> _Items:
    def table(price: Callable[[str, int], float]) -> FloatArray:
        return np.array([[price(name, rank) for rank in ranks] for name in modules]).reshape(len(modules), len(ranks))

    def standing_seconds(block: int, checkpointing: bool) -> float:
        return sum(seconds(name, pinned.get(name, 0), block, checkpointing) for name in costs.shape.modules)

    largest = Work({name: max(ranks) for name in modules}, 1, 1, 32, checkpointing=True)
    seconds = costs.adapter_seconds_per_token
    return _Items(
        costs=costs,
        parameter_bytes=table(lambda m, r: costs.adapter_bytes(m, r) - costs.adapter_bytes(m, 0)),
        activation_bytes_per_token=table(costs.adapter_activation_bytes),
        seconds_per_token=table(lambda m, r: seconds(m, r, 0, False) - seconds(m, 0, 0, False)),
        upload_seconds=table(costs.module_upload_bytes) / costs.profile.bandwidth_bytes_per_second,
        standing_bytes=sum(costs.adapter_bytes(name, pinned.get(name, 0)) for name in costs.shape.modules),
        standing_seconds_per_token={k: np.array([standing_seconds(b, k) for b in blocks]) for k in (False, True)},
        fullest_block_bytes_per_token=costs.adapter_activations(largest),
    )


def _price_cell(
    items: _Items, blocks: Sequence[int], work: Work, planned_examples: int, pin: PlanPin, taught: float
) -> Cell:
    costs, examples = items.costs, items.costs.batch_examples(work.batch_size)
    tokens, longest = examples * costs.profile.tokens_per_example, costs.longest_tokens(work.batch_size)
    planned = pin.local_steps or math.ceil(planned_examples / work.batch_size)
    backbone = [costs.backbone_seconds_per_token(block, work.checkpointing) for block in blocks]
    fixed = [costs.fixed_step_seconds(work.base_bits, block, work.checkpointing) for block in blocks]
    kept = items.fullest_block_bytes_per_token if work.checkpointing else 0.0
    adapters = costs.adapter_activations(work) if work.ranks else kept
    transferred = costs.download_bytes({}) + costs.upload_bytes(work.ranks)
    return Cell(
        batch_size=work.batch_size,
        base_bits=work.base_bits,
        checkpointing=work.checkpointing,
        planned_steps=planned,
        least_steps=pin.local_steps or 1,
        loss=BITS_LOSS[work.base_bits],
        share_per_step=taught / planned_examples,
        idle_seconds=costs.idle_seconds(transferred),
        block_memory=np.array(
            [
                costs.resident_bytes(work.base_bits)
                + items.standing_bytes
                + longest * adapters
                + costs.backbone_activation_bytes(longest, block, work.checkpointing)
                for block in blocks
            ]
        ),
        block_seconds=np.array(fixed)
        + tokens * (items.standing_seconds_per_token[work.checkpointing] + np.array(backbone)),
        item_memory=items.parameter_bytes + (0 if work.checkpointing else longest) * items.activation_bytes_per_token,
        item_seconds=tokens * items.seconds_per_token,
        item_upload_seconds=items.upload_seconds,
    )
