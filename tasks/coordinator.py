"""The coordinator of a run: its config, store and keys, and what it keeps warm between rounds."""

import functools
import os

import torch
from torch import nn

from fedpipe_core.architecture import model_shape
from fedpipe_core.config import FederationConfig
from fedpipe_core.data import Examples, label_names, load_examples, load_examples_and_column
from fedpipe_core.dialogues import Dialogues
from fedpipe_core.errors import DataError
from fedpipe_core.evaluation import WritingTask, predict, writing_task
from fedpipe_core.forms import FORMS, FormFunctions
from fedpipe_core.methods import METHODS
from fedpipe_core.model import Base
from fedpipe_core.predictions import Answers
from fedpipe_core.profile_schemas import ModelShape
from fedpipe_core.signatures import SigningKey
from fedpipe_core.tokenizing import TokenizedExamples, tokenize
from tasks.edge import dense_base
from tasks.records import RunKeys
from tasks.signing import signing_key
from tasks.storage import ObjectStore


class Coordinator:
    """What the coordinator keeps warm: the dense base and the held-out set.

    A plain class, since Prefect walks through every dataclass it is handed.
    """

    def __init__(self, config: FederationConfig, store: ObjectStore, keys: RunKeys):
        self.config, self.store, self.keys = config, store, keys

    @property
    def base(self) -> Base:
        """The base at full precision, on which the global adapter is judged and into which it is merged."""
        return dense_base(self.config)

    @functools.cached_property
    def shape(self) -> ModelShape:
        """What the cost model needs to know of the base."""
        return model_shape(self.base.model, self.config.data.labels)

    @property
    def form(self) -> FormFunctions:
        """How what is trained becomes a model."""
        return FORMS[METHODS[self.config.method].form]

    @functools.cached_property
    def _examples(self) -> Examples | Dialogues:
        return load_examples(self.config.data.test, self.config.data)

    @functools.cached_property
    def signing_key(self) -> SigningKey | None:
        """The key that signs what the coordinator says; None where nobody signs."""
        return signing_key(self.config)

    @functools.cached_property
    def held_out(self) -> TokenizedExamples:
        """The held-out set. Raises DataError when a row's answer does not fit: all versions are judged on all rows."""
        base, longest = self.base, self.config.model.max_tokens
        found = tokenize(self._examples, base.tokenizer, longest, base.vocabulary)
        if found.dropped:
            raise DataError(
                f"{found.dropped} rows of {self.config.data.test} have an answer that does not fit into "
                f"model.max_tokens (now {longest}); raise it, or take these rows out"
            )
        return found

    @functools.cached_property
    def writing(self) -> WritingTask | None:
        """The prompts that a judged model continues, where the config asks for it."""
        return writing_task(self._examples, self.config, self.base.tokenizer)

    @functools.cached_property
    def label_names(self) -> list[str] | None:
        """The name of every label, where the config says which column has them."""
        return label_names(self.config.data.test, self.config.data)

    @functools.cached_property
    def slices(self) -> list[str] | None:
        """The slice of every held-out example, where the config says which column has them."""
        column = self.config.release.slice_column
        if column is None:
            return None
        _, values = load_examples_and_column(self.config.data.test, self.config.data, column)
        return [str(value) for value in values]

    def judge(self, model: nn.Module, examples: TokenizedExamples | None = None) -> Answers:
        """A model's answers on the held-out set, or on the given part of it, with all of the machine's cores.

        Text is written only where the whole set is judged.
        """
        writing = self.writing if examples is None else None
        size = self.config.evaluation.batch_size
        return predict(model, examples or self.held_out, size, batches_at_once(), writing)


def batches_at_once() -> int:
    """Batches that are judged side by side: one per core, or on a GPU one after another."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1
