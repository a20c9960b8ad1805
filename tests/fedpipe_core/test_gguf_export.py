"""GGUF files, read again by programs that share no code with the writer: transformers' reader, and llama.cpp."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import random_adapter, save_tiny_writer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, set_seed
from transformers.models.auto import AutoModelForCausalLM

from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.config import ModelSpec
from fedpipe_core.errors import ModelError
from fedpipe_core.export import TunedModel, merge
from fedpipe_core.gguf_export import FILE, GGUF_SCHEMES, check_gguf
from fedpipe_core.gguf_tokenizer import tokenizer_kind
from fedpipe_core.model import Base, load_base

E2E = Path(__file__).parents[2] / "examples" / "e2e" / "model"
TEXT = "The Rice Boat, a family-friendly place near the river,\n doesn't cost £20; rated 3 out of 5!  "
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Separate and tied output layers, biased and normed queries, fewer keys than queries, fused transposed matrices.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 128},
    "gpt2": {"max_position_embeddings": 1024},  # the one length that the reader of transformers knows
}


def bytes_tokenizer(splitting: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose only merges make "the"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *alphabet, "th", "the"]
    model = models.BPE({word: index for index, word in enumerate(words)}, [("t", "h"), ("th", "e")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = splitting, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def plain_bytes() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tiny_writer(folder: Path, kind: str) -> Base:
    set_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | CHANGES[kind])).save_pretrained(folder)
    bytes_tokenizer(plain_bytes()).save_pretrained(folder)
    return load_base(ModelSpec(base=str(folder), task="causal-lm"), None, 32, seed=0)


def tuned_for(base: Base, size: float = 0.1) -> TunedModel:
    adapter = random_adapter(base.model, dict.fromkeys(adaptable_modules(base.model), 2), size=size)
    return TunedModel(base, adapter, "fp32", None, TEMPLATE)


@torch.inference_mode()
def logits(model: torch.nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return found


@pytest.mark.parametrize("kind", CHANGES)
def test_file_computes_what_the_merged_model_computes(tmp_path: Path, kind: str) -> None:
    tuned = tuned_for(tiny_writer(tmp_path / "base", kind))
    expected = logits(merge(tuned.base.model, tuned.adapter), range(40))
    apart = {}
    for scheme, described in GGUF_SCHEMES.items():
        described.write(tuned, tmp_path / scheme)
        found = logits(described.load(tuned, tmp_path / scheme), range(40))
        apart[scheme] = float((found - expected).norm() / expected.norm())
    assert apart["gguf-f16"] < 2e-3
    assert apart["gguf-f16"] < apart["gguf-q8_0"] < 1e-1


def test_matrices_are_as_short_as_the_scheme_says_and_vectors_stay_whole(tmp_path: Path) -> None:
    tuned = tuned_for(tiny_writer(tmp_path / "base", "gpt2"))
    kinds: dict[str, set[str]] = {}
    for scheme, described in GGUF_SCHEMES.items():
        described.write(tuned, tmp_path / scheme)
        tensors = gguf.GGUFReader(tmp_path / scheme / FILE).tensors
        kinds[scheme] = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
        assert {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) == 1} == {"F32"}
    assert kinds == {"gguf-f16": {"F16", "F32"}, "gguf-q8_0": {"Q8_0", "F32"}}  # F32: the positions of GPT-2


def test_file_carries_the_tokenizer_and_how_a_prompt_is_rendered(tmp_path: Path) -> None:
    base = load_base(ModelSpec(base=str(E2E), task="causal-lm"), None, 32, seed=0)
    GGUF_SCHEMES["gguf-q8_0"].write(tuned_for(base), tmp_path)
    read: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    assert read(TEXT, add_special_tokens=False)["input_ids"] == base.tokenizer(TEXT)["input_ids"]
    fields = gguf.GGUFReader(tmp_path / FILE).fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == base.tokenizer.eos_token_id


def llama_cpp_reads(file: Path) -> Any:
    """The file in llama.cpp; skips where it is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra llama-cpp)")
    return llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, verbose=False, n_threads=1)


@pytest.mark.parametrize("kind", CHANGES)
def test_llama_cpp_computes_the_same_from_the_same_text(tmp_path: Path, kind: str) -> None:
    tuned = tuned_for(tiny_writer(tmp_path / "base", kind))
    GGUF_SCHEMES["gguf-f16"].write(tuned, tmp_path)
    reader, ids = llama_cpp_reads(tmp_path / FILE), tuned.base.tokenizer(TEXT)["input_ids"]
    assert reader.tokenize(TEXT.encode(), add_bos=False) == ids
    reader.eval(ids)
    expected = logits(merge(tuned.base.model, tuned.adapter), ids).numpy()
    found = np.array(reader.scores[: len(ids)])
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-2
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9


def test_llama_cpp_tokenizes_a_sentencepiece_vocabulary_alike(tmp_path: Path) -> None:
    base = tiny_writer(tmp_path / "base", "llama")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"there", "he", "▁t", "▁the"]
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he")]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    raw = Tokenizer(model)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert tokenizer_kind(tokenizer) == "spm"
    sentencepiece = Base(base.model, tokenizer, base.folder, base.sha256, 32)
    GGUF_SCHEMES["gguf-f16"].write(tuned_for(sentencepiece), tmp_path)
    reader = llama_cpp_reads(tmp_path / FILE)
    assert reader.tokenize(TEXT.encode(), add_bos=True) == tokenizer(TEXT)["input_ids"]


WORDS_OR = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OR_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTINGS = {
    "gpt-2": plain_bytes(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain_bytes()]),
    "qwen2": split_bytes(WORDS_OR + r"\p{N}" + OR_REST),
    "llama-bpe": split_bytes(WORDS_OR + r"\p{N}{1,3}" + OR_REST),
}


@pytest.mark.parametrize("name", SPLITTINGS)
def test_known_splittings_of_text_are_recognized_and_read_alike(tmp_path: Path, name: str) -> None:
    tokenizer = bytes_tokenizer(SPLITTINGS[name])
    assert tokenizer_kind(tokenizer) == name
    base = tiny_writer(tmp_path / "base", "llama")
    GGUF_SCHEMES["gguf-f16"].write(tuned_for(Base(base.model, tokenizer, base.folder, base.sha256, 32)), tmp_path)
    reader = llama_cpp_reads(tmp_path / FILE)
    assert reader.tokenize(TEXT.encode(), add_bos=False) == tokenizer(TEXT)["input_ids"]


def test_base_that_gguf_cannot_hold_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(ModelError) as refused:
            check_gguf(load_base(ModelSpec(base=str(folder), task="causal-lm"), None, 32, seed=0))
        return str(refused.value)

    assert "is of type gpt_neox, which cannot be written as GGUF" in refusal(
        save_tiny_writer(tmp_path / "a", "gpt_neox")
    )
    assert "the tokenizer (WordLevel + WhitespaceSplit) is none that GGUF can hold" in refusal(
        save_tiny_writer(tmp_path / "b", "llama")
    )
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    folder = save_tiny_writer(tmp_path / "c", "llama", rope_parameters=scaled)
    assert "scales its positions by linear" in refusal(folder)
