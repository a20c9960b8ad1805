"""Tiny real models with random weights, as folders in Hugging Face format, and rows they can learn."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    set_seed,
)
from transformers.models.auto import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpipe_core.adapters import Adapter
from fedpipe_core.architecture import adaptable_modules, head_parameters
from fedpipe_core.batches import Batch
from fedpipe_core.low_rank import LowRank
from fedpipe_core.tokenizing import IGNORED, TokenizedExamples

WORDS = [f"word{index}" for index in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>"]
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
HIDDEN = 32
LABELS = 4

_COMMON = {"vocab_size": len(VOCABULARY), "initializer_range": 0.1}
_LAYERS = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(**_COMMON, **_LAYERS, max_position_embeddings=64),
    "distilbert": lambda: DistilBertConfig(
        **_COMMON, dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
    ),
    "roberta": lambda: RobertaConfig(**_COMMON, **_LAYERS, max_position_embeddings=66, pad_token_id=0),
    "gpt2": lambda: GPT2Config(
        **_COMMON, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, bos_token_id=4, eos_token_id=4
    ),
    "llama": lambda: LlamaConfig(
        **_COMMON, **_LAYERS, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=4, eos_token_id=4
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **_COMMON, **_LAYERS, max_position_embeddings=64, bos_token_id=4, eos_token_id=4, tie_word_embeddings=False
    ),
    "phi3": lambda: Phi3Config(
        **_COMMON, **_LAYERS, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=4
    ),
    "tied": lambda: LlamaConfig(
        **_COMMON, **_LAYERS, max_position_embeddings=64, bos_token_id=4, eos_token_id=4, tie_word_embeddings=True
    ),
}
ENCODERS = ["bert", "distilbert", "roberta"]
DECODERS = ["gpt2", "llama"]
ARCHITECTURES = [*ENCODERS, *DECODERS]
# Queries, keys and values apart (llama, tied), fused (gpt_neox, phi3), fused and transposed (gpt2); fewer keys than
# queries (llama, phi3); output layer tied to the embeddings (gpt2, tied).
WRITERS = ["llama", "gpt2", "gpt_neox", "phi3", "tied"]


def save_tiny_model(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write config, weights and tokenizer; `changes` overrides fields of the config."""
    config = CONFIGS[architecture]()
    for key, value in {"num_labels": LABELS, **changes}.items():
        setattr(config, key, value)
    set_seed(0)
    AutoModelForSequenceClassification.from_config(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer(decoder=architecture in DECODERS).save_pretrained(folder)
    return folder


def save_tiny_writer(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A causal language model in a folder like `save_tiny_model`'s."""
    config = CONFIGS[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(decoder=True).save_pretrained(folder)
    return folder


def tiny_tokenizer(decoder: bool = False) -> PreTrainedTokenizerFast:
    """Words as tokens; an encoder's adds its special tokens, a decoder's has, like GPT-2's, no padding token."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def tiny_examples(count: int, pad_token_id: int = 0, seed: int = 0) -> TokenizedExamples:
    """Rows of 3 to 12 tokens, each of one quarter of the words, which is its label."""
    generator = np.random.default_rng(seed)
    labels = [int(label) for label in generator.integers(LABELS, size=count)]
    share = len(WORDS) // LABELS
    rows = [
        (len(SPECIAL) + label * share + generator.integers(share, size=generator.integers(3, 13))).tolist()
        for label in labels
    ]
    return TokenizedExamples(rows, labels, pad_token_id)


def tiny_dialogues(count: int, pad_token_id: int = 4, seed: int = 0) -> TokenizedExamples:
    """Prompts of 2 to 8 tokens with an answer of 2 to 5 tokens, which alone is learned."""
    generator = np.random.default_rng(seed)
    rows, labels = [], []
    for _ in range(count):
        prompt, answer = (
            (len(SPECIAL) + generator.integers(len(WORDS), size=generator.integers(*sizes))).tolist()
            for sizes in ((2, 9), (2, 6))
        )
        rows.append([*prompt, *answer])
        labels.append([*[IGNORED] * len(prompt), *answer])
    return TokenizedExamples(rows, labels, pad_token_id)


def random_batch(rows: int, tokens: int) -> Batch:
    """A batch of made-up tokens without padding, and a label a row."""
    generator = torch.Generator().manual_seed(rows * 100 + tokens)
    return {
        "input_ids": torch.randint(5, 65, (rows, tokens), generator=generator),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.int64),
        "labels": torch.randint(LABELS, (rows,), generator=generator),
    }


def random_adapter(model: torch.nn.Module, ranks: dict[str, int], seed: int = 0, size: float = 0.3) -> Adapter:
    """An adapter with random factors, and the model's head moved a little."""
    generator = torch.Generator().manual_seed(seed)
    shapes = adaptable_modules(model)
    factors = {
        name: LowRank(
            torch.randn(shapes[name].out_features, rank, generator=generator) * size,
            torch.randn(rank, shapes[name].in_features, generator=generator) * size,
        )
        for name, rank in ranks.items()
    }
    head = {
        name: value.detach().float().cpu() + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in head_parameters(model).items()
    }
    return Adapter(factors, head)
