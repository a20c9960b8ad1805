"""The job that every system runs: its local training and its evaluation, by the same functions on the same rows.

Runs in the peers' environment as well, so it imports nothing but `fedpipe_core`. The environment variable EQUAL_JOB
names the folder that `make_job` wrote; EQUAL_JOB_MARKS a file to which every process appends what it did when.
`python equal_job.py FILE` prints the loss of an adapter kept as safetensors.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpipe_core.adapters import Adapter, initial_adapter
from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.batches import training_batches
from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import load_config
from fedpipe_core.data import load_examples
from fedpipe_core.edge_model import EdgeModel, build_edge_model, load_adapter, read_adapter
from fedpipe_core.evaluation import metrics_of, predict
from fedpipe_core.export import merge
from fedpipe_core.low_rank import LowRank
from fedpipe_core.partition import load_edge_examples
from fedpipe_core.tokenizing import TokenizedExamples, tokenize
from fedpipe_core.training import rate_factor, train

Tensors = dict[str, Tensor]
FOLDER = Path(os.environ.get("EQUAL_JOB", "."))


def mark(event: str, **values: Any) -> None:
    """Append what happened now; one short write, which other processes' writes do not part."""
    line = json.dumps({"event": event, "at": time.time(), **values}) + "\n"
    with Path(os.environ["EQUAL_JOB_MARKS"]).open("a", encoding="utf-8") as file:
        file.write(line)


def initial_tensors() -> Tensors:
    """What round 1 starts from: B = 0, and A as FedPipe draws it."""
    config = _config()
    shapes = adaptable_modules(_base())
    return _tensors(initial_adapter(shapes, _pin(config).ranks[next(iter(shapes))], {}, config.seed))


def train_edge(number: int, round_index: int, tensors: Tensors) -> Tensors:
    """One edge's steps of one round, from the given adapter; `number` counts edges from 0, rounds count from 1."""
    config, model = _config(), _edge_model()
    edge, pin = config.edges[number], _pin(config)
    rows, started = _rows(number), time.time()
    load_adapter(model, _adapter(tensors), {})
    batches = training_batches(rows, pin.batch_size, pin.local_steps, (config.seed, round_index, edge.edge_id))
    report = train(model, batches, config.training, rate_factor(config.training, round_index, config.rounds))
    found = _tensors(read_adapter(model))
    mark("trained", edge=number, round=round_index, seconds=report.seconds, started=started)
    return found


def held_out_loss(tensors: Tensors) -> float:
    """Loss per token of base and adapter on the held-out set, with all cores as FedPipe evaluates."""
    size = _config().evaluation.batch_size
    return metrics_of(predict(merge(_base(), _adapter(tensors)), _held_out(), size, os.cpu_count() or 1))["loss"]


@functools.cache
def _config() -> FederationConfig:
    torch.set_num_threads(1)
    return load_config(FOLDER / "federation.yaml")


def _pin(config: FederationConfig) -> Any:
    return config.edges[0].pin


@functools.cache
def _base() -> nn.Module:
    from transformers import AutoModelForCausalLM

    _config()
    made: nn.Module = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32, local_files_only=True)
    return made.eval().requires_grad_(False)


@functools.cache
def _edge_model() -> EdgeModel:
    return build_edge_model(_base(), _pin(_config()).ranks, 0, _config().training.adapter_scaling)


@functools.cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / "model", local_files_only=True)


@functools.cache
def _rows(number: int) -> TokenizedExamples:
    config = _config()
    return tokenize(load_edge_examples(config, config.edges[number]), _tokenizer(), config.model.max_tokens)


@functools.cache
def _held_out() -> TokenizedExamples:
    config = _config()
    return tokenize(load_examples(config.data.test, config.data), _tokenizer(), config.model.max_tokens)


def _tensors(adapter: Adapter) -> Tensors:
    pairs = [
        (f"{module}.{side}", getattr(factors, side)) for module, factors in adapter.factors.items() for side in "BA"
    ]
    return {name: value.clone().contiguous() for name, value in pairs}


def _adapter(tensors: Tensors) -> Adapter:
    modules = [name[:-2] for name in tensors if name.endswith(".B")]
    return Adapter({m: LowRank(tensors[f"{m}.B"].float(), tensors[f"{m}.A"].float()) for m in modules}, {})


if __name__ == "__main__":
    print(held_out_loss(load_file(sys.argv[1])))
