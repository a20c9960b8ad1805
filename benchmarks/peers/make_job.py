"""Writes the equal job: a random tiny Llama, briefly pretrained, rows of a bigram language, and FedPipe's config."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from peers.environment import CACHE
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EDGES, ROUNDS, STEPS, BATCH = 4, 3, 20, 8
ROWS, HELD_OUT_ROWS, TOKENS, VOCABULARY = 256, 256, 64, 512
RANK, ALPHA = 8, 16
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
WORDS = VOCABULARY - len(SPECIAL)
SUCCESSORS, HABIT = 8, 0.7  # every word has likely successors, one of which follows with this probability
PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_RATE = 150, 16, 2e-3
EDGE_IDS = tuple(f"site-{number + 1}" for number in range(EDGES))
Words = NDArray[np.int64]


def job_folder() -> Path:
    """The job, written once for what this file says."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = CACHE / f"job-{digest}"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(unfinished)
        unfinished.rename(folder)
    return folder


def _write(folder: Path) -> None:
    torch.set_num_threads(1)
    languages = [_language(seed) for seed in range(EDGES + 1)]  # the first is what the base knows
    _tokenizer().save_pretrained(folder / "model")
    model = _pretrained(languages[0])
    model.save_pretrained(folder / "model")
    held_out = []
    for number, edge_id in enumerate(EDGE_IDS):
        rows = _sentences(languages[number + 1], ROWS + HELD_OUT_ROWS // EDGES, seed=100 + number)
        _write_rows(folder / f"{edge_id}.jsonl", rows[:ROWS])
        held_out += [*rows[ROWS:]]
    _write_rows(folder / "held-out.jsonl", held_out)
    (folder / "federation.yaml").write_text(yaml.safe_dump(federation(model)), encoding="utf-8")


def federation(model: nn.Module) -> dict[str, Any]:
    """FedPipe's config of the job: every choice that its planner would make is pinned, and nothing is released."""
    modules = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]
    pin = {"ranks": dict.fromkeys(modules, RANK), "batch_size": BATCH, "local_steps": STEPS, "base_bits": 32}
    resources = {"memory_gib": 4.0, "tokens_per_second": 5000, "bandwidth_mbit": 1000}
    return {
        "name": "equal-job",
        "rounds": ROUNDS,
        "min_edges": EDGES,
        "model": {"base": "model", "task": "causal-lm", "max_tokens": TOKENS, "bits": [32]},
        "data": {
            **{"format": "text", "train": "{edge_id}.jsonl", "test": "held-out.jsonl"},
            "validation_fraction": 0.0,  # the peers' edges do not validate
        },
        "edges": [{"edge_id": edge_id, "resources": resources, "pin": pin} for edge_id in EDGE_IDS],
        "training": {
            **{"learning_rate": 2e-3, "adapter_scaling": ALPHA / RANK, "warmup_steps": 0, "final_rate_fraction": 1.0},
            "examples_per_round": STEPS * BATCH,
        },
        "planning": {"importance": "uniform", "ranks": [RANK], "batch_sizes": [BATCH], "probe_rank": RANK},
        "aggregation": {"rule": "fedavg"},
        "exchange": {"dtype": "fp32"},
    }


def _language(seed: int) -> Words:
    """Likely successors of every word, (words, successors); a site shares half of them with the base's language."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    likely = shared.integers(WORDS, size=(WORDS, SUCCESSORS))
    likely[:, SUCCESSORS // 2 :] = own.integers(WORDS, size=(WORDS, SUCCESSORS - SUCCESSORS // 2))
    return likely


def _sentences(likely: Words, count: int, seed: int) -> Words:
    """Word numbers, (count, words of a row); with begin and end token a row fills the model's context."""
    generator, length = np.random.default_rng(seed), TOKENS - 2
    rows = np.empty((count, length), dtype=np.int64)
    rows[:, 0] = generator.integers(WORDS, size=count)
    for position in range(1, length):
        follows = likely[rows[:, position - 1], generator.integers(SUCCESSORS, size=count)]
        free = generator.integers(WORDS, size=count)
        rows[:, position] = np.where(generator.random(count) < HABIT, follows, free)
    return rows


def _write_rows(path: Path, rows: Any) -> None:
    lines = (json.dumps({"text": " ".join(f"w{word}" for word in row)}) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *(f"w{word}" for word in range(WORDS))))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _pretrained(likely: Words) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = LlamaConfig(**sizes, **special, intermediate_size=352, max_position_embeddings=TOKENS)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE)
    for step in range(PRETRAINING_STEPS):
        words = torch.from_numpy(_sentences(likely, PRETRAINING_BATCH, seed=1000 + step)) + len(SPECIAL)
        ids = nn.functional.pad(nn.functional.pad(words, (1, 0), value=2), (0, 1), value=3)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()
