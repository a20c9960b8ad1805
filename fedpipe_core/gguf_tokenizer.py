"""A tokenizer as GGUF keeps it: tokens, merges, and which of the known splittings of text comes before them.

llama.cpp tokenizes with code of its own and knows a pre-tokenizer by name alone, so one that it does not know is
refused: the model would read other tokens than it was trained on.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedpipe_core.errors import ModelError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITTERS = {rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe", rf"{_WORDS}\p{{N}}{_REST}": "qwen2"}
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}


def tokenizer_kind(tokenizer: Any) -> str:
    """The name under which llama.cpp knows how text is split before the merges; "spm" for merges over whole texts.

    Raises ModelError when it knows none such.
    """
    described = _described(tokenizer)
    model, splitting = described["model"], list(_steps(described["pre_tokenizer"], "pretokenizers"))
    if model["type"] == "BPE":
        if model.get("byte_fallback") and all(step["type"] == "Metaspace" for step in splitting):
            return "spm"
        if name := _byte_level_name(splitting):
            return name
    kinds = " + ".join([model["type"], *(step["type"] for step in splitting)])
    raise ModelError(
        f"the tokenizer ({kinds}) is none that GGUF can hold: needed byte-level BPE as of GPT-2, SmolLM, Llama 3 or "
        "Qwen2, or SentencePiece BPE; leave gguf out of release.exports"
    )


def write_tokenizer_fields(writer: Any, tokenizer: Any, rows: int, chat_template: str | None) -> None:
    """Add the tokenizer to a `GGUFWriter`; the list of tokens is filled up to the `rows` of the embeddings."""
    import gguf

    kind, model = tokenizer_kind(tokenizer), _described(tokenizer)["model"]
    tokens, types = _tokens(tokenizer, rows)
    writer.add_tokenizer_model("llama" if kind == "spm" else "gpt2")
    writer.add_tokenizer_pre("default" if kind == "spm" else kind)
    writer.add_token_list(tokens)
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if kind == "spm":
        writer.add_token_scores(_scores(tokens, pairs))
        byte = [gguf.TokenType.BYTE if _is_byte(text) else kept for text, kept in zip(tokens, types, strict=True)]
        writer.add_token_types(byte)
        writer.add_add_space_prefix(_adds_space(_described(tokenizer)))
    else:
        writer.add_token_types(types)
        writer.add_token_merges(pairs)
    for name, attribute in _SPECIAL.items():
        if (token_id := getattr(tokenizer, attribute)) is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _described(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer has no tokenizer.json, from which GGUF is written; save it as a fast tokenizer")
    described: dict[str, Any] = json.loads(backend.to_str())
    return described


def _steps(step: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer's or pre-tokenizer's parts in order."""
    if step is not None and step["type"] == "Sequence":
        yield from step[inner]
    elif step is not None:
        yield step


def _byte_level_name(splitting: list[Mapping[str, Any]]) -> str | None:
    match splitting:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]:
            return "smollm"
        case [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "add_prefix_space": False}]:
            return _SPLITTERS.get(pattern)
        case _:
            return None


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embeddings."""
    import gguf

    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for token_id in range(rows):
        tokens.append(texts.get(token_id, f"[PAD{token_id}]"))
        if token_id not in texts:
            types.append(gguf.TokenType.UNUSED)
        elif token_id == tokenizer.unk_token_id:
            types.append(gguf.TokenType.UNKNOWN)
        elif token_id in special or (token_id in added and added[token_id].special):
            types.append(gguf.TokenType.CONTROL)
        else:
            types.append(gguf.TokenType.USER_DEFINED if token_id in added else gguf.TokenType.NORMAL)
    return tokens, types


def _scores(tokens: list[str], pairs: list[str]) -> list[float]:
    """SentencePiece joins the pair whose result scores best: minus the place of its merge. Others are never joined."""
    place: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        place.setdefault(pair.replace(" ", ""), index)
    return [-float(place.get(token, len(pairs))) for token in tokens]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space before it is cut: by Llama 2's normalizer, or by a Metaspace."""
    normalizers = list(_steps(described["normalizer"], "normalizers"))
    splitting = list(_steps(described["pre_tokenizer"], "pretokenizers"))
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        step.get("prepend_scheme", "never") != "never" for step in splitting
    )
