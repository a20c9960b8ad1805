"""A causal language model in two parts: what computes its states, and its own code that scores the vocabulary.

Over a large vocabulary the logits of all tokens take more memory than the rest of a step, so whoever needs them asks
for the states once and has some of them scored at a time.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """What makes logits (n, vocabulary) of states (n, features), and the parameters in it that are trained."""

    logits: Callable[[Tensor], Tensor]
    trained: tuple[nn.Parameter, ...] = ()

    def __call__(self, states: Tensor) -> Tensor:
        return self.logits(states)


_parted: dict[type, bool] = {}  # by class: whether its blocks can be taken out


def states_and_score(model: Any, inputs: Mapping[str, Tensor], columns: Tensor) -> tuple[Tensor, Score]:
    """States of the tokens at `columns`, (batch, columns, features), and what makes (n, vocabulary) of n of them.

    Scoring runs the model's own code behind its blocks, with whatever that scales or caps. A model whose blocks cannot
    be taken out gives its logits as states, which scoring leaves as they are.
    """
    if not _can_be_parted(model):
        return model(**inputs, logits_to_keep=columns, use_cache=False).logits, Score(lambda logits: logits)
    return model.base_model(**inputs, use_cache=False).last_hidden_state[:, columns], _score(model)


class _GivenStates(nn.Module):
    """Stands where a model has its blocks, and answers with the states it is given."""

    def forward(self, *ignored: Any, inputs_embeds: Tensor, **also_ignored: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def _score(model: Any) -> Score:
    behind = copy.copy(model)  # of the module alone: its parts are the same
    behind._modules = {**model._modules, model.base_model_prefix: _GivenStates()}

    def score(states: Tensor) -> Tensor:
        logits: Tensor = behind(inputs_embeds=states[None], use_cache=False).logits[0]
        return logits

    return Score(score, tuple(value for value in behind.parameters() if value.requires_grad))


@torch.no_grad()
def _can_be_parted(model: Any) -> bool:
    """Whether the two parts compute what the model does, tried once for every class on two tokens."""
    kind = type(model)
    if kind not in _parted:
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
        try:
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            expected = model(input_ids=ids, use_cache=False).logits[0]
            _parted[kind] = torch.allclose(_score(model)(states).float(), expected.float(), rtol=1e-3, atol=1e-3)
        except (AttributeError, TypeError, RuntimeError):  # blocks that lie deeper, or are called in another way
            _parted[kind] = False
    return _parted[kind]
