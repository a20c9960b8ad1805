"""A federation's local steps as one writes them with transformers and PEFT alone: what overhead is measured against.

Nothing but the steps: no exchange, aggregation, validation, records, frozen tail or checks; an edge goes on with its
own adapter. Modules, ranks, batches and learning rates are those of the federation's plan.
"""

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from fedpipe_core.architecture import head_modules
from fedpipe_core.batches import training_batches
from fedpipe_core.training import rate_factor
from tasks.edge import EdgeSession


@dataclass(frozen=True)
class PlainRun:
    """What the steps of all rounds cost; `thread_seconds` adds up what every edge took for itself."""

    wall_seconds: float
    cpu_seconds: float
    thread_seconds: float
    first_round_loss: float


class PlainEdge:
    """One edge's model and its steps."""

    def __init__(self, session: EdgeSession):
        self.session, self.model = session, _plain_model(session)
        self.losses: list[float] = []

    def train(self, round_index: int) -> None:
        """The local steps of one round."""
        config, plan = self.session.config, self.session.plan
        parts = (config.seed, round_index, self.session.edge_id)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer, warmup = self._optimizer(round_index)
        for batch in training_batches(self.session.data.train, plan.batch_size, plan.local_steps, parts):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.training.max_gradient_norm)
            optimizer.step()
            warmup.step()
            optimizer.zero_grad(set_to_none=True)

    def _optimizer(self, round_index: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
        spec, rounds = self.session.config.training, self.session.config.rounds
        rate, steps = spec.learning_rate * rate_factor(spec, round_index, rounds), spec.warmup_steps + 1
        trained = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        groups = [
            {"params": [value for name, value in trained if "lora_" in name], "lr": rate},
            {"params": [value for name, value in trained if "lora_" not in name], "lr": rate * spec.head_rate_factor},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=spec.weight_decay)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))


def run_plainly(sessions: Sequence[EdgeSession], at_once: int, threads: int) -> PlainRun:
    """Do every edge's steps of all rounds, `at_once` edges at a time with `threads` of torch's threads each."""
    edges, spent = [PlainEdge(session) for session in sessions], []

    def work(edge: PlainEdge, round_index: int) -> None:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        edge.train(round_index)
        spent.append(time.perf_counter() - started)

    started, cpu_before = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(at_once) as pool:
        for round_index in range(1, sessions[0].config.rounds + 1):
            list(pool.map(work, edges, itertools.repeat(round_index)))
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_before
    losses = [loss for edge in edges for loss in edge.losses[: edge.session.plan.local_steps]]
    return PlainRun(wall, cpu, sum(spent), sum(losses) / len(losses))


def _plain_model(session: EdgeSession) -> nn.Module:
    """The base with a new head and PEFT's adapters; in evaluation mode, as the federation has no dropout either."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    config, ranks, scaling = session.config, session.plan.ranks, session.config.training.adapter_scaling
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        session.profile_base.folder, num_labels=config.data.labels
    )
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=scaling * max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern={name: scaling * rank for name, rank in ranks.items()},
        modules_to_save=head_modules(model),
    )
    made: nn.Module = get_peft_model(model, lora).eval()
    return made
