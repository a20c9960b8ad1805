"""A large language model on one GPU: speed beside a plain loop, prediction beside measurement, and the round's rest.

Trains a randomly initialised Llama of 8 B parameters at NF4, LoRA of rank 16 on every projection, sequences of 1,024
tokens, gradient checkpointing, bfloat16. The plain loop is what one writes with PEFT and bitsandbytes alone: the same
base, adapters, rows, optimizer, checkpointing and clipping. Both are timed in turns. The round decodes the global
adapter, trains, encodes the update and aggregates it. `--quick` does all of it with a small shape on any device.
Needs torch, transformers, peft, bitsandbytes and `fedpipe_core` alone.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes would start a compiler at import

import torch
from common import at_least, at_most, finish, markdown_table, parser
from profiles import measured_profile
from random_llama import EIGHT_B, SMALL, random_llama

from fedpipe_core.activation_cost import measured_activation_cost
from fedpipe_core.adapters import Adapter, initial_adapter, split_for_edge
from fedpipe_core.aggregation import Update, aggregate
from fedpipe_core.architecture import adaptable_modules, model_shape
from fedpipe_core.batches import Batch
from fedpipe_core.config import AggregationSpec, TrainingSpec
from fedpipe_core.costs import CostModel, Work
from fedpipe_core.edge_model import EdgeModel, build_edge_model, load_adapter, read_adapter
from fedpipe_core.memory import held_bytes
from fedpipe_core.model import share
from fedpipe_core.startup import quiet_transformers
from fedpipe_core.step_cost import measured_step_cost
from fedpipe_core.training import train
from fedpipe_core.wire import decode_adapter, encode_adapter
from fedpipe_core.wire_updates import decode_update, encode_update

RANK = 16
PROBED_ROWS = (1, 2)
SPEC = TrainingSpec(learning_rate=1e-4, warmup_steps=0)
LEAST_SPEED, MOST_MEMORY_ERROR, MOST_REST = 0.95, 0.15, 0.05
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """A model and the size of its batches."""

    model: Any
    batch_size: int
    tokens: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_input_embeddings().weight.device

    def batches(self, steps: int) -> Iterator[Batch]:
        """Rows of random tokens, all of them learned."""
        generator = torch.Generator().manual_seed(steps)
        for _ in range(steps):
            yield self.batch(self.batch_size, generator)

    def batch(self, rows: int, generator: torch.Generator | None = None) -> Batch:
        """One batch, on the CPU, as an edge makes it."""
        ids = torch.randint(self.model.config.vocab_size, (rows, self.tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def edge(self) -> EdgeModel:
        """An edge's model, with adapters on every projection."""
        ranks = dict.fromkeys(adaptable_modules(self.model), RANK)
        return build_edge_model(self.model, ranks, RANK, scaling=1.0, checkpointing=True)

    def adapter(self) -> Adapter:
        """The global adapter a federation starts from."""
        return initial_adapter(adaptable_modules(self.model), RANK, {}, seed=0)


def plain_loop(job: Job, steps: int) -> float:
    """Seconds of a loop with PEFT and bitsandbytes alone."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(share(job.model), config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=SPEC.learning_rate, weight_decay=0.0)
    started = now(job.device)
    for batch in job.batches(steps):
        moved = {name: value.to(job.device) for name, value in batch.items()}
        model(**moved, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, SPEC.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return now(job.device) - started


def our_loop(job: Job, steps: int) -> float:
    """Seconds of the loop of an edge."""
    edge, adapter = job.edge(), job.adapter()
    load_adapter(edge, *split_for_edge(adapter, edge.ranks, seed=0))
    return trained_seconds(edge, job, steps)


def trained_seconds(edge: EdgeModel, job: Job, steps: int) -> float:
    """Seconds of some steps."""
    started = now(job.device)
    train(edge, job.batches(steps), SPEC, rate=1.0)
    return now(job.device) - started


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measured_peak_bytes(job: Job) -> int:
    """What training holds at most, by the allocator's own count."""
    edge = job.edge()
    load_adapter(edge, *split_for_edge(job.adapter(), edge.ranks, seed=0))
    if job.device.type == "cpu":
        return held_bytes(edge.model) + largest_growth_bytes(lambda: train(edge, job.batches(2), SPEC, rate=1.0))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(job.device)
    train(edge, job.batches(2), SPEC, rate=1.0)
    return torch.cuda.max_memory_allocated(job.device)


def largest_growth_bytes(action: Callable[[], Any]) -> int:
    """By how much the tensors on the CPU outgrow those from before the action: PyTorch keeps no such peak there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def predicted(job: Job) -> tuple[int, float]:
    """Peak bytes and seconds of a step that the planner foresees, from what it measures on two small batches."""
    shape, batches = model_shape(job.model, None), [job.batch(rows) for rows in PROBED_ROWS]
    costs = measured_step_cost(job.model, *batches), measured_activation_cost(job.model, *batches)
    value_bytes = job.model.get_input_embeddings().weight.element_size()
    profile = measured_profile(*costs, job.batch_size, job.tokens, value_bytes)
    work = Work(dict.fromkeys(shape.modules, RANK), job.batch_size, 1, 4, checkpointing=True)
    model = CostModel(shape, profile)
    return model.predict(work).peak_memory_bytes, model.step_seconds(work, lowest_block=0)


def round_seconds(job: Job, steps: int) -> tuple[float, float]:
    """Seconds of a whole round at a warm edge and the coordinator, and of the training in it."""
    edge, sent = job.edge(), encode_adapter(job.adapter(), "bf16")
    started = now(job.device)
    received = decode_adapter(sent)
    start, tail = split_for_edge(received, edge.ranks, seed=0)
    load_adapter(edge, start, tail)
    training = trained_seconds(edge, job, steps)
    update, _ = encode_update(read_adapter(edge), start, "bf16")
    returned = Update("edge", start, decode_update(update, start), job.batch_size)
    encode_adapter(aggregate(received, [returned], AggregationSpec(rank_cap=RANK)).adapter, "bf16")
    return now(job.device) - started, training


def prepare(quick: bool, batch_size: int, tokens: int) -> Job:
    """The model on the GPU if there is one."""
    quiet_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Job(random_llama(SMALL if quick else EIGHT_B, tokens, device, torch.bfloat16), batch_size, tokens)


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="a small shape of the same proportions, on any device")
    arguments.add_argument("--batch-size", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=1024)
    arguments.add_argument("--steps", type=int, default=6, help="steps of a turn")
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--round-steps", type=int, default=50, help="steps of the whole round")
    options = arguments.parse_args()
    if not options.quick and not torch.cuda.is_available():
        arguments.error("there is no GPU here; --quick shows on a CPU that the benchmark works")
    job = prepare(options.quick, options.batch_size, options.tokens)
    (foreseen_bytes, foreseen_seconds), measured = predicted(job), measured_peak_bytes(job)
    plain_loop(job, 1)  # libraries warm up
    turns = [(our_loop(job, options.steps), plain_loop(job, options.steps)) for _ in range(options.turns)]
    round_seconds(job, 1)  # what follows is a warm edge's
    whole, training = round_seconds(job, options.round_steps)
    tokens = options.steps * job.batch_size * job.tokens
    ours, plain = (statistics.median(tokens / seconds for seconds in kind) for kind in zip(*turns, strict=True))
    result = {
        "device": torch.cuda.get_device_name() if job.device.type == "cuda" else "cpu",
        "tokens_per_second": ours,
        "plain_tokens_per_second": plain,
        "measured_peak_bytes": measured,
        "predicted_peak_bytes": foreseen_bytes,
        "step_seconds": job.batch_size * job.tokens / ours,
        "predicted_step_seconds": foreseen_seconds,
        "round_seconds": whole,
        "training_seconds": training,
    }
    checks = [
        at_least("tokens per second against a plain loop", statistics.median(b / a for a, b in turns), LEAST_SPEED),
        at_most("error of predicted peak memory", abs(foreseen_bytes / measured - 1), MOST_MEMORY_ERROR),
        at_most("share of the round that is not training", 1 - training / whole, MOST_REST),
    ]
    finish(options.json, result, checks, as_table(result))


def as_table(result: dict[str, Any]) -> str:
    """Everything measured, a line each."""
    memory = f"{result['measured_peak_bytes'] / GIB:.3f} GiB ({result['predicted_peak_bytes'] / GIB:.3f} predicted)"
    rows = [
        ("device", result["device"]),
        ("tokens per second", f"{result['tokens_per_second']:.0f} (plain {result['plain_tokens_per_second']:.0f})"),
        ("peak memory", memory),
        ("step", f"{result['step_seconds']:.3f} s ({result['predicted_step_seconds']:.3f} predicted)"),
        ("round", f"{result['round_seconds']:.2f} s, of which training {result['training_seconds']:.2f} s"),
    ]
    return markdown_table(("", ""), rows)


if __name__ == "__main__":
    main()
