"""A federation small enough to run in seconds: three edges, rows of made-up words, a model of two tiny blocks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tiny_models import LABELS, WORDS, save_tiny_model, save_tiny_writer

EDGES = ("east", "north", "west")
ROUNDS = 2
RESOURCES = {"memory_gib": 0.5, "tokens_per_second": 20000, "bandwidth_mbit": 100}


def write_federation(folder: Path, **changes: Any) -> Path:
    """Write model, rows and config into a folder and return the config's path.

    `changes` are merged into the config; a key with dots reaches into a section: `{"training.learning_rate": 0.01}`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_model(folder / "model", "bert")
    for number, edge_id in enumerate(EDGES):
        write_rows(folder / f"{edge_id}.jsonl", rows(60, seed=number + 1))
    write_rows(folder / "test.jsonl", rows(120, seed=0))
    return write_config(folder, **changes)


def write_writers_federation(folder: Path, **changes: Any) -> Path:
    """Like `write_federation`, with a causal language model that learns what to say to the words of each share."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_writer(folder / "model")
    for number, edge_id in enumerate(EDGES):
        write_rows(folder / f"{edge_id}.jsonl", prompts(60, seed=number + 1))
    write_rows(folder / "test.jsonl", prompts(60, seed=0))
    task = {
        "model.task": "causal-lm",
        "data": {"train": "{edge_id}.jsonl", "test": "test.jsonl", "format": "completion"},
        "evaluation.generate": {"metrics": ["bleu", "exact_match"], "max_new_tokens": 6, "examples": 20},
    }
    return write_config(folder, **(task | changes))


def prompts(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts whose words come from one share of the vocabulary, to which the answer is always the same four words."""
    share = len(WORDS) // LABELS
    return [
        {"prompt": row["text"], "completion": " ".join(WORDS[row["label"] * share :][:4]), "name": row["name"]}
        for row in rows(count, seed)
    ]


def write_config(folder: Path, **changes: Any) -> Path:
    """Write the config alone, for model and rows that are there."""
    document: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "rounds": ROUNDS,
        "min_edges": 2,
        "store": str(folder / "out" / "store"),
        "model": {"base": "model", "max_tokens": 16, "bits": [32]},
        "data": {"train": "{edge_id}.jsonl", "test": "test.jsonl", "labels": LABELS, "label_name_column": "name"},
        "edges": [{"edge_id": edge_id, "resources": dict(RESOURCES)} for edge_id in EDGES],
        "training": {"learning_rate": 0.01, "head_rate_factor": 2, "examples_per_round": 160},
        "planning": {"profile_steps": 5, "ranks": [2, 4], "batch_sizes": [8], "probe_rank": 4, "solver": "greedy"},
    }
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        target = document
        for part in parents:
            target = target.setdefault(part, {})
        target[leaf] = value
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose words come from one share of the vocabulary, which is their label."""
    generator, share = np.random.default_rng(seed), len(WORDS) // LABELS
    found = []
    for label in generator.integers(LABELS, size=count):
        words = generator.choice(WORDS[label * share : (label + 1) * share], size=generator.integers(3, 9))
        found.append({"text": " ".join(words), "label": int(label), "name": f"share {label}"})
    return found


def write_rows(path: Path, content: list[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
