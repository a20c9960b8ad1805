"""One configuration of benchmarks/costs.py, trained in a process of its own.

What a process holds before it loads the base is its baseline: the libraries, warmed up on a small model. The peak is
the kernel's (VmHWM), of loading, building and training alike. Only then is the edge profiled, as `fedpipe` profiles it:
on the dense base with two small batches. Time is the thread's CPU time, since other work shares the machine; the
fastest step counts.
"""

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  imported before the baseline is taken, like peft
import peft  # noqa: F401
import torch
from profiles import measured_profile
from transformers import BertConfig, BertForSequenceClassification

from fedpipe_core.activation_cost import measured_activation_cost
from fedpipe_core.adapters import initial_adapter, split_for_edge
from fedpipe_core.architecture import adaptable_modules, head_parameters, model_shape
from fedpipe_core.batches import Batch
from fedpipe_core.config import ModelSpec, TrainingSpec
from fedpipe_core.costs import CostModel, Work
from fedpipe_core.edge_model import EdgeModel, build_edge_model, load_adapter
from fedpipe_core.memory import training_memory_bytes
from fedpipe_core.model import load_base
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape
from fedpipe_core.profiling import COUNTED_EXAMPLES, probe_sizes
from fedpipe_core.step_cost import measured_step_cost
from fedpipe_core.training import train

LABELS = 150
BATCH_SIZES = (8, 16, 32, 64)  # the menu that a plan would choose from
SPECIAL_IDS = 1000  # ids above are words of every tokenizer here


@dataclass(frozen=True)
class Configuration:
    """What is trained. `modules` are "all", "attention" or "upper" (blocks of the upper half).

    `global_rank` is the rank of the global adapter, which every module carries; 0 stands for no frozen tail.
    """

    base: str
    modules: str
    rank: int
    batch_size: int
    tokens: int
    bits: int
    checkpointing: bool = False
    global_rank: int = 0
    steps: int = 3
    folder: str = ""

    @property
    def global_adapter_rank(self) -> int:
        """Rank of the global adapter: the edge's own when there is no tail."""
        return self.global_rank or self.rank


def ranks_of(configuration: Configuration, shape: ModelShape) -> dict[str, int]:
    """The modules that the configuration adapts, with its rank."""
    chosen = {
        "all": lambda name, module: True,
        "attention": lambda name, module: "att" in name,
        "upper": lambda name, module: module.layer >= shape.num_blocks // 2,
    }[configuration.modules]
    return {name: configuration.rank for name, module in shape.modules.items() if chosen(name, module)}


def random_batch(model: Any, rows: int, tokens: int) -> Batch:
    """Rows of random words of the whole vocabulary, none padded; embeddings that no row uses would not be in memory."""
    generator = torch.Generator().manual_seed(rows)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(SPECIAL_IDS, vocabulary, (rows, tokens), generator=generator)
    labels = torch.randint(LABELS, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def built_edge(configuration: Configuration) -> EdgeModel:
    """The edge's model as a round begins with it; a tail is random, for one of zeros would be left out."""
    base = load_base(ModelSpec(base=configuration.folder), LABELS, configuration.bits, seed=0)
    shape, shapes, rank = (
        model_shape(base.model, LABELS),
        adaptable_modules(base.model),
        configuration.global_adapter_rank,
    )
    ranks = ranks_of(configuration, shape)
    modules = shapes if configuration.global_rank else ranks
    edge = build_edge_model(base.model, ranks, rank, 1.0, configuration.checkpointing, modules)
    head = {name: value.detach().float() for name, value in head_parameters(edge.model).items()}
    adapter = initial_adapter({name: shapes[name] for name in modules}, rank, head, seed=0)
    if configuration.global_rank:
        for factors in adapter.factors.values():
            factors.B.normal_(std=1e-3)
    load_adapter(edge, *split_for_edge(adapter, ranks, seed=0))
    return edge


def train_and_time(edge: EdgeModel, batch: Batch, steps: int) -> list[float]:
    """Seconds of CPU time of every step but the first, which also creates the optimizer's state."""
    asked: list[float] = []

    def batches() -> Iterator[Mapping[str, Any]]:
        for _ in range(steps):
            asked.append(time.thread_time())
            yield batch

    train(edge, batches(), TrainingSpec(), 1.0)
    asked.append(time.thread_time())
    return [end - begin for begin, end in pairwise(asked[1:])]


def profiled(configuration: Configuration) -> tuple[ModelShape, EdgeProfile]:
    """What `fedpipe` would know of this edge, importance aside."""
    base = load_base(ModelSpec(base=configuration.folder), LABELS, 16 if configuration.bits == 16 else 32, seed=0)
    small, large = (random_batch(base.model, rows, configuration.tokens) for rows in probe_sizes(BATCH_SIZES))
    counted = (random_batch(base.model, rows, configuration.tokens) for rows in COUNTED_EXAMPLES)
    step_cost = measured_step_cost(base.model, small, large, (configuration.bits,), time.thread_time)
    activation_cost = measured_activation_cost(base.model, *counted)
    value_bytes = 2 if configuration.bits == 16 else 4
    return model_shape(base.model, LABELS), measured_profile(
        step_cost, activation_cost, configuration.batch_size, configuration.tokens, value_bytes
    )


def memory_of_process(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def warm_up() -> None:
    """Let every library make what it makes once: a first step of a tiny model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model: Any = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(2, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()


def measure_one(configuration: Configuration) -> dict[str, Any]:
    """Train, then profile and predict."""
    torch.set_num_threads(1)
    warm_up()
    gc.collect()
    baseline = memory_of_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    edge = built_edge(configuration)
    loaded = memory_of_process("VmHWM") - baseline
    batch = random_batch(edge.model, configuration.batch_size, configuration.tokens)
    seconds = train_and_time(edge, batch, configuration.steps)
    peak = memory_of_process("VmHWM") - baseline
    counted = training_memory_bytes(edge, batch)
    shape, profile = profiled(configuration)
    ranks = dict(edge.ranks)
    tails = dict.fromkeys(shape.modules, configuration.global_rank) if configuration.global_rank else {}
    costs = CostModel(shape, profile, tails)
    work = Work(ranks, configuration.batch_size, configuration.steps, configuration.bits, configuration.checkpointing)
    return {
        **asdict(configuration),
        "parameters": shape.linear_parameters + shape.other_parameters,
        "loading_peak_bytes": loaded,
        "measured_peak_bytes": peak,
        "counted_bytes": counted,
        "predicted_peak_bytes": costs.predict(work).peak_memory_bytes,
        "measured_step_seconds": min(seconds),
        "measured_steps_seconds": seconds,
        "predicted_step_seconds": costs.step_seconds(work, work.lowest_block(shape)),
        "step_cost": profile.step_cost.model_dump(),
        "activation_cost": profile.activation_cost.model_dump(exclude={"per_token_module_bytes"}),
    }
