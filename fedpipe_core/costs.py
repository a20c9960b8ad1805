"""The cost model: memory, seconds and bytes of one edge's round, from the model's shape and the edge's profile.

It only predicts; `planning` decides, `resources` measures the coefficients. Importing this module imports no torch.

Units of work: per token and frozen weight a training step makes a forward product and a backward product (for the
gradient of the input); a trained adapter adds a third (for its own gradient). Gradients stop below the lowest block
that carries an adapter, so blocks below it cost a forward product and keep no activations. Where every parameter is
trained (`whole`) each weight has the third product and keeps its input, and the optimizer counts by the parameter.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fedpipe_core.plan_schemas import PredictedCost
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape, ModuleShape

TRAINED_BYTES = 16  # fp32 weight, gradient and AdamW's two moments
FROZEN_BYTES = 4  # fp32 weight of the frozen tail
NF4_BYTES = 0.5 + 0.127 / 8  # with double-quantized scales (arXiv 2305.14314, §3)
BASE_BYTES = {32: 4.0, 16: 2.0, 8: 1.0, 4: NF4_BYTES}
WIRE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 2 / 64, "nf4": 0.5 + 2 / 64}  # blockwise: a scale per 64 values
HEADER_BYTES = {"fp32": 240, "bf16": 240, "int8": 60, "nf4": 60}  # per module in the file's header, without its names
HEADER_NAMES = {"fp32": 2, "bf16": 2, "int8": 1, "nf4": 1}  # how often a module's name stands there
GRADIENTS_IN_FLIGHT = 2  # of a module's input and output: a formula such as GELU holds several of one width at once
RECOMPUTED_IN_FLIGHT = 0.5  # of them more in a recomputed block: none where GELU is one operation, one where it is many
SCORED_AT_ONCE = 256  # tokens whose logits a language model holds at once
LOGIT_BYTES = 12  # float32 logit, its log-probability and gradient; shorter ones come on top
DEQUANTIZED_FORWARD = 1 / 2  # of the dequantization in a step: once before either product
WEIGHT_GRADIENT_SHARE = 1 / 2  # of a frozen weight's work in a step, which a trained weight takes beside
TAIL_SHARE = 2 / 3  # of a trained adapter's work in a step: no gradient of its own


@dataclass(frozen=True)
class Work:
    """What an edge is asked to do in one round; a module without a rank carries no adapter."""

    ranks: Mapping[str, int]
    batch_size: int
    local_steps: int
    base_bits: int
    checkpointing: bool = False

    def lowest_block(self, shape: ModelShape) -> int:
        """Lowest block that carries an adapter; one past the last when none does."""
        return min((shape.modules[name].layer for name in self.ranks), default=shape.num_blocks)


@dataclass(frozen=True)
class CostModel:
    """Prices work on one edge.

    `global_ranks` is the global adapter the edge downloads; what it holds beyond an edge's own rank is the frozen tail.
    With `frozen_a` edges train B alone, as rule `ffa` has it. With `whole` all parameters are trained and travel, which
    `shape` then counts as its head. `validations` is how often an edge judges its validation rows in a round.
    """

    shape: ModelShape
    profile: EdgeProfile
    global_ranks: Mapping[str, int] = field(default_factory=dict)
    wire_dtype: str = "bf16"
    global_dtype: str = "bf16"
    micro_batch_size: int | None = None
    frozen_a: bool = False
    whole: bool = False
    validations: int = 1

    def predict(self, work: Work) -> PredictedCost:
        """Price one round of `work`."""
        upload, download = self.upload_bytes(work.ranks), self.download_bytes(work.ranks)
        lowest = 0 if self.whole else work.lowest_block(self.shape)
        return PredictedCost(
            peak_memory_bytes=round(self.peak_memory_bytes(work, lowest)),
            round_seconds=self.idle_seconds(upload + download) + work.local_steps * self.step_seconds(work, lowest),
            upload_bytes=upload,
            download_bytes=download,
        )

    def peak_memory_bytes(self, work: Work, lowest_block: int) -> float:
        """base + 16·trained + 4·tail + activations + working space, or logits if they take more + fixed part."""
        ranks = work.ranks
        adapters = sum(self.adapter_bytes(name, ranks.get(name, 0)) for name in self.shape.modules)
        tokens = self.longest_tokens(work.batch_size)
        activations = self.backbone_activation_bytes(tokens, lowest_block, work.checkpointing)
        return self.resident_bytes(work.base_bits) + adapters + activations + tokens * self.adapter_activations(work)

    def step_seconds(self, work: Work, lowest_block: int) -> float:
        """fixed + dequantization + tokens·(per_token + Σ (per_token_feature + per_token_rank·rank)·(out+in)).

        Each term counts by the products that are made of those it was measured for: of a frozen weight forward and
        backward, and of a trained adapter a third; dequantization happens before every product of a frozen weight.
        """
        tokens = self.batch_examples(work.batch_size) * self.profile.tokens_per_example
        adapters = sum(
            self.adapter_seconds_per_token(name, work.ranks.get(name, 0), lowest_block, work.checkpointing)
            for name in self.shape.modules
        )
        backbone = self.backbone_seconds_per_token(lowest_block, work.checkpointing)
        return self.fixed_step_seconds(work.base_bits, lowest_block, work.checkpointing) + tokens * (
            backbone + adapters
        )

    def batch_examples(self, batch_size: int) -> int:
        """Examples a batch really holds: data smaller than a batch makes one short batch."""
        return min(batch_size, self.profile.num_examples)

    def longest_tokens(self, batch_size: int) -> float:
        """Tokens that go through the model at once at most, which sets the peak."""
        longest = self.profile.longest_example_tokens or self.profile.tokens_per_example
        return min(self.batch_examples(batch_size), self.micro_batch_size or batch_size) * longest

    def resident_bytes(self, bits: int) -> float:
        """Memory that neither batch nor adapters change: base, head, one dequantized matrix, fixed part."""
        return base_bytes(self.shape, bits, self.profile.value_bytes) + self.profile.fixed_bytes

    def adapter_bytes(self, module: str, rank: int) -> float:
        """Parameters, gradients and optimizer state of one adapter, and its frozen tail."""
        trained = self._trained_features(module)
        frozen = self._features(module) - trained
        tail = max(0, self.global_ranks.get(module, 0) - rank)
        return rank * (TRAINED_BYTES * trained + FROZEN_BYTES * frozen) + FROZEN_BYTES * tail * self._features(module)

    def adapter_activation_bytes(self, module: str, rank: int) -> float:
        """Per token: the module's input, kept because a trained A now needs it, and the adapter's inner values."""
        shape = self.shape.modules[module]
        inner = float(self.profile.value_bytes * rank * shape.inner_values)
        return inner if rank == 0 or self.frozen_a else inner + self._input_bytes(module, shape)

    def _input_bytes(self, module: str, shape: ModuleShape) -> float:
        """Per token what keeping a module's input takes, as far as nothing else keeps it."""
        whole = self.profile.value_bytes * shape.in_features
        return self.profile.activation_cost.per_token_module_bytes.get(module, whole)

    def adapter_activations(self, work: Work) -> float:
        """Per token what all adapters keep; with checkpointing only the widest block's at a time.

        Where all is trained every matrix keeps its input.
        """
        if self.whole:
            return sum(self._input_bytes(name, shape) for name, shape in self.shape.modules.items())
        blocks = [0.0] * self._num_blocks
        for name, rank in work.ranks.items():
            blocks[self.shape.modules[name].layer] += self.adapter_activation_bytes(name, rank)
        return max(blocks) if work.checkpointing else sum(blocks)

    def backbone_activation_bytes(self, tokens: float, lowest_block: int, checkpointing: bool) -> float:
        """What the frozen network keeps, and on top the larger of what scoring and the way back through a block take.

        Without checkpointing every reached block keeps its share; with it each keeps its input, and one is recomputed,
        whose values stay until its backward pass is done, where they otherwise make room for gradients one by one.
        Logits and their gradient are gone before the way back reaches a block.
        """
        cost, blocks, value = self.profile.activation_cost, self._num_blocks, self.profile.value_bytes
        reached = blocks - lowest_block
        in_flight = value * (GRADIENTS_IN_FLIGHT + RECOMPUTED_IN_FLIGHT * checkpointing) * self._widest_module
        if checkpointing:
            kept, recomputed = float(value * self.shape.hidden_features * reached), cost.per_token_bytes / blocks
        else:
            kept, recomputed = cost.per_token_bytes * reached / blocks, 0.0
        return cost.fixed_bytes + tokens * kept + max(tokens * (recomputed + in_flight), self._logits_bytes(tokens))

    def fixed_step_seconds(self, bits: int, lowest_block: int, checkpointing: bool) -> float:
        """What a step takes whatever its tokens: the optimizer, starting kernels, and dequantizing the base."""
        cost = self.profile.step_cost
        dequantization = cost.dequantization_seconds.get(bits, 0.0)
        optimizer = cost.per_parameter_seconds * self.shape.head_parameters if self.whole else 0.0
        dequantizations = self._work_done(DEQUANTIZED_FORWARD, lowest_block, checkpointing)
        return cost.fixed_seconds + optimizer + dequantization * dequantizations

    def backbone_seconds_per_token(self, lowest_block: int, checkpointing: bool) -> float:
        """Seconds per token in the base's weights."""
        cost = self.profile.step_cost
        products = self._work_done(cost.forward_share, lowest_block, checkpointing) + WEIGHT_GRADIENT_SHARE * self.whole
        return cost.per_token_seconds * products

    def adapter_seconds_per_token(self, module: str, rank: int, lowest_block: int, checkpointing: bool) -> float:
        """Three products for a trained rank, two for a rank of the tail, one below the reached blocks."""
        learning = self._trained_features(module) / self._features(module)
        trained = self._adapter_products(rank, module) * (TAIL_SHARE + (1 - TAIL_SHARE) * learning)
        tail = self._adapter_products(max(0, self.global_ranks.get(module, 0) - rank), module)
        if self.shape.modules[module].layer < lowest_block:
            return tail * (1 - TAIL_SHARE)
        recomputed = (1 - TAIL_SHARE) * checkpointing
        return trained * (1 + recomputed) + tail * (TAIL_SHARE + recomputed)

    def idle_seconds(self, transferred_bytes: float) -> float:
        """Seconds of a round outside its steps: transfer, and a forward pass over the validation rows."""
        tokens = self.profile.num_validation_examples * self.profile.tokens_per_example
        forward = self.profile.step_cost.per_token_seconds * self.profile.step_cost.forward_share
        return transferred_bytes / self.profile.bandwidth_bytes_per_second + self.validations * tokens * forward

    def upload_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes of the trained factors and the head."""
        return self._file_bytes((self.module_upload_bytes(name, r) for name, r in ranks.items()), self.wire_dtype)

    def module_upload_bytes(self, module: str, rank: int) -> float:
        """Bytes of what an edge trained of one module's B and A."""
        return _wire_bytes(module, rank * self._trained_features(module), self.wire_dtype)

    def download_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes of the global adapter and the head."""
        held = self.global_ranks or ranks
        modules = (_wire_bytes(name, r * self._features(name), self.global_dtype) for name, r in held.items())
        return self._file_bytes(modules, self.global_dtype)

    @cached_property
    def _num_blocks(self) -> int:
        return self.shape.num_blocks

    @cached_property
    def _widest_module(self) -> int:
        return max((module.features for module in (self.shape.matrices or self.shape.modules).values()), default=0)

    def _work_done(self, forward: float, lowest_block: int, checkpointing: bool) -> float:
        """Share of a whole step's work in frozen weights, of which the forward pass is `forward`.

        Forward everywhere; backward, and a second forward when checkpointing, in the reached blocks.
        """
        reached = (self._num_blocks - lowest_block) / self._num_blocks
        return forward + reached * (1 - forward + forward * checkpointing)

    def _adapter_products(self, rank: int, module: str) -> float:
        """Seconds per token of an adapter's three products."""
        cost = self.profile.step_cost
        each = cost.per_token_feature_seconds + cost.per_token_rank_seconds * rank if rank else 0.0
        return each * self._features(module)

    def _file_bytes(self, modules: Iterable[float], dtype: str) -> int:
        return round(self.shape.head_parameters * WIRE_BYTES[dtype] + sum(modules))

    def _trained_features(self, module: str) -> int:
        return self.shape.modules[module].out_features if self.frozen_a else self._features(module)

    def _features(self, module: str) -> int:
        return self.shape.modules[module].features

    def _logits_bytes(self, tokens: float) -> float:
        """Of a classifier logits and their gradient; of a language model all that scoring some tokens takes."""
        value, longest = (
            self.profile.value_bytes,
            self.profile.longest_example_tokens or self.profile.tokens_per_example,
        )
        if self.shape.scored_positions == "example":
            return 2 * value * self.shape.output_features * tokens / longest
        shorter = 2 * value if value < 4 else 0
        return (LOGIT_BYTES + shorter) * self.shape.output_features * min(tokens, SCORED_AT_ONCE)


def _wire_bytes(module: str, values: int, dtype: str) -> float:
    """Of a module's numbers in an encoded adapter, with its part of the header."""
    return values * WIRE_BYTES[dtype] + HEADER_BYTES[dtype] + HEADER_NAMES[dtype] * len(module)


def base_bytes(shape: ModelShape, bits: int, value_bytes: int) -> float:
    """A base at a bit width, with a matrix dequantized at a time where it is quantized, and its trained head."""
    quantized = bits < 16
    base = shape.linear_parameters * BASE_BYTES[bits]
    base += shape.other_parameters * (value_bytes if quantized else BASE_BYTES[bits])
    largest = max((m.out_features * m.in_features for m in (shape.matrices or shape.modules).values()), default=0)
    return base + TRAINED_BYTES * shape.head_parameters + (value_bytes * largest if quantized else 0)


def probed_bits(shape: ModelShape, menu: Sequence[int], probe_rank: int, value_bytes: int, memory_bytes: float) -> int:
    """The widest base of a menu beside which adapters of `probe_rank` on every module fit; the narrowest if none does.

    It is the base on which an edge is profiled, chosen before anything is loaded; activations are left to the batch.
    """
    probes = TRAINED_BYTES * probe_rank * sum(module.features for module in shape.modules.values())
    widths = sorted(menu, reverse=True)
    fitting = (bits for bits in widths if base_bytes(shape, bits, value_bytes) + probes <= memory_bytes)
    return next(fitting, widths[-1])


def predict(  # noqa: PLR0913  the six that make up a plan, and the setting
    shape: ModelShape,
    profile: EdgeProfile,
    ranks: Mapping[str, int],
    batch_size: int,
    local_steps: int,
    base_bits: int,
    *,
    checkpointing: bool = False,
    global_ranks: Mapping[str, int] | None = None,
    wire_dtype: str = "bf16",
) -> PredictedCost:
    """Predict peak memory, seconds and bytes of one round.

    `global_ranks` is the rank per module of the global adapter the edge starts from; left out, it has no frozen tail.
    """
    work = Work(ranks, batch_size, local_steps, base_bits, checkpointing)
    return CostModel(shape, profile, global_ranks or {}, wire_dtype).predict(work)
