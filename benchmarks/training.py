"""How fast an edge trains a causal language model, against `transformers.Trainer`, and what grouping and packing gain.

The model and rows are those of `examples/e2e`: 3.4 M parameters, LoRA of rank 16 on every projection, float32. Trainer
gets the same adapter layers, rows, order, batch size, learning rate and clipping. Useful tokens are those of the rows,
without padding. All kinds are timed in turns in one process with one thread, a few steps each, so that what else the
machine does hits all of them; a kind counts with the median of its turns, a comparison with the median of its pairs.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import at_least, finish, markdown_table, parser

from fedpipe_core.adapters import initial_adapter, split_for_edge
from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.batches import Batch, pad_batch, training_batches
from fedpipe_core.config import TrainingSpec
from fedpipe_core.config_file import load_config
from fedpipe_core.data import load_examples
from fedpipe_core.edge_model import EdgeModel, build_edge_model, load_adapter
from fedpipe_core.model import Base, load_base
from fedpipe_core.packing import pack_batch
from fedpipe_core.tokenizing import TokenizedExamples, tokenize
from fedpipe_core.training import train

CONFIG = Path(__file__).parent.parent / "examples" / "e2e" / "federation.yaml"
RANK, BATCH_SIZE, RATE = 16, 16, 1e-4
ROWS = 2048
GROUPED_STEPS = 64  # over which padding is counted: groups are made within windows of 16 batches


@dataclass(frozen=True)
class Workload:
    """Rows in three orders, and the model they train."""

    base: Base
    rows: TokenizedExamples
    steps: int
    max_tokens: int

    def shuffled(self, turn: int) -> list[list[int]]:
        """The rows of each step, in random order."""
        generator = torch.Generator().manual_seed(turn)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        return [order[k * BATCH_SIZE : (k + 1) * BATCH_SIZE] for k in range(self.steps)]

    def padded(self, steps: Sequence[list[int]]) -> list[Batch]:
        """The rows of each step, padded to the longest."""
        return [pad_batch(self.rows, step) for step in steps]

    def grouped(self, turn: int, steps: int, packed_width: int | None = None) -> list[Batch]:
        """Batches in the order of an edge, whose rows are grouped by length; the same rows when packed."""
        return list(training_batches(self.rows, BATCH_SIZE, steps, [turn], packed_width))

    def edge(self) -> EdgeModel:
        """A fresh model with adapters on every projection."""
        shapes = adaptable_modules(self.base.model)
        ranks = dict.fromkeys(shapes, RANK)
        edge = build_edge_model(self.base.model, ranks, RANK, scaling=1.0)
        load_adapter(edge, *split_for_edge(initial_adapter(shapes, RANK, {}, seed=0), ranks, seed=0))
        return edge


def ours(work: Workload, batches: Sequence[Batch], tokens: int) -> float:
    """Useful tokens per second of our loop."""
    report = train(work.edge(), iter(batches), TrainingSpec(learning_rate=RATE), rate=1.0)
    return tokens / report.seconds


def trainers(work: Workload, steps: Sequence[list[int]]) -> float:
    """Useful tokens per second of `transformers.Trainer`, from its first step to its last."""
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]  # the library is untyped
        started = ended = 0.0

        def on_train_begin(self, *call: Any, **state: Any) -> None:
            self.started = time.perf_counter()

        def on_train_end(self, *call: Any, **state: Any) -> None:
            self.ended = time.perf_counter()

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *dataset: Any) -> Any:
            return SequentialSampler(chosen)

    chosen, clock = [index for step in steps for index in step], Clock()
    with TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=len(steps),
            learning_rate=RATE,
            warmup_steps=4,
            lr_scheduler_type="constant_with_warmup",
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        model = work.edge().model
        trainer = InOrder(
            model,
            options,
            train_dataset=chosen,
            data_collator=lambda indices: pad_batch(work.rows, indices),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)  # it writes to stdout
        trainer.train()
    return useful_tokens(work.padded(steps)) / (clock.ended - clock.started)


def useful_tokens(batches: Sequence[Batch]) -> int:
    """Tokens of the rows of padded batches: all that is not padding, which packing does not change."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def kinds(work: Workload, turn: int) -> dict[str, Callable[[], float]]:
    """What is timed in a turn, by name."""
    steps = work.shuffled(turn)
    padded, packed = work.padded(steps), [pack_batch(work.rows, step, work.max_tokens) for step in steps]
    grouped, grouped_and_packed = work.grouped(turn, work.steps), work.grouped(turn, work.steps, work.max_tokens)
    in_random_order, in_groups = useful_tokens(padded), useful_tokens(grouped)
    return {
        "transformers.Trainer": lambda: trainers(work, steps),
        "ours, random order": lambda: ours(work, padded, in_random_order),
        "ours, packed": lambda: ours(work, packed, in_random_order),
        "ours, length-grouped": lambda: ours(work, grouped, in_groups),
        "ours, length-grouped and packed": lambda: ours(work, grouped_and_packed, in_groups),
    }


def padding_shares(work: Workload) -> dict[str, float]:
    """Share of the tokens computed that are padding, by the order of rows."""
    padded, grouped = work.padded(work.shuffled(0)), work.grouped(0, GROUPED_STEPS)
    packed = work.grouped(0, GROUPED_STEPS, work.max_tokens)
    useful = {"random order": padded, "length-grouped": grouped, "length-grouped and packed": grouped}
    computed = dict(zip(useful, (padded, grouped, packed), strict=True))
    return {
        name: 1 - useful_tokens(useful[name]) / sum(batch["input_ids"].numel() for batch in batches)
        for name, batches in computed.items()
    }


def prepare(steps: int) -> Workload:
    """Load the example's model and its first rows."""
    config = load_config(CONFIG)
    base = load_base(config.model, None, 16 if torch.cuda.is_available() else 32, seed=0)
    examples = load_examples(config.data.train, config.data).select(range(ROWS))
    rows = tokenize(examples, base.tokenizer, config.model.max_tokens, base.vocabulary)
    return Workload(base, rows, steps, config.model.max_tokens)


def main() -> None:
    """Time all kinds in turns and print what they reach."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=12, help="optimizer steps per turn")
    arguments.add_argument("--turns", type=int, default=5)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    work = prepare(options.steps)
    speeds: dict[str, list[float]] = {}
    for turn in range(options.turns):
        for name, run in kinds(work, turn).items():
            speeds.setdefault(name, []).append(run())
    baseline, plain = speeds["transformers.Trainer"], speeds["ours, random order"]
    rows = {
        name: {
            "useful_tokens_per_second": statistics.median(found),
            "against_trainer": _ratio(found, baseline),
            "against_random_order": _ratio(found, plain),
        }
        for name, found in speeds.items()
    }
    padding = padding_shares(work)
    head = ("kind", "useful tokens/s", "× Trainer", "× random order")
    lines = [
        (name, *(f"{value:.2f}" if value < 100 else f"{value:.0f}" for value in row.values()))
        for name, row in rows.items()
    ]
    shares = "; ".join(f"{name} {share:.1%}" for name, share in padding.items())
    checks = [at_least("tokens per second against Trainer", rows["ours, random order"]["against_trainer"], 1.0)]
    text = f"{markdown_table(head, lines)}\n\npadding: {shares}"
    finish(options.json, {"speeds": rows, "padding": padding, "turns": options.turns}, checks, text)


def _ratio(found: Sequence[float], other: Sequence[float]) -> float:
    """Median over the turns of how much faster one was than the other."""
    return statistics.median(mine / theirs for mine, theirs in zip(found, other, strict=True))


if __name__ == "__main__":
    main()
