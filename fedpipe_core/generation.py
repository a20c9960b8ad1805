"""Text that a causal language model writes behind prompts: in batches, greedy, never longer than asked.

Greedy decoding has no chance in it. Rows are padded on the left here, whatever the tokenizer's own padding side:
padding on the right would put it between prompt and answer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedpipe_core.config_inputs import GenerationSpec
from fedpipe_core.model import device_of
from fedpipe_core.side_by_side import side_by_side
from fedpipe_core.tokenizing import Prompts


def write_texts(
    model: nn.Module, tokenizer: Any, prompts: Prompts, spec: GenerationSpec, batches_at_once: int = 1
) -> list[str]:
    """Continue every prompt until the model ends it or `max_new_tokens` are written; without special tokens and blanks.

    `batches_at_once` threads of one core each share the batches, as in `evaluation.predict`.
    """
    texts = [""] * len(prompts)
    settings = _settings(model, tokenizer, spec)

    def answer(indices: list[int]) -> None:
        rows = [prompts.token_ids[index] for index in indices]
        for index, ids in zip(indices, _continued(model, rows, settings), strict=True):
            texts[index] = tokenizer.decode(ids, skip_special_tokens=True).strip()

    side_by_side(answer, _batches(prompts, spec.batch_size), batches_at_once)
    return texts


def _batches(prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
    """Prompts of like length together, the longest first, so that memory runs out at once or never."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts.token_ids[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _settings(model: Any, tokenizer: Any, spec: GenerationSpec) -> Any:
    """Greedy, whatever the base's own generation_config.json asks for; its end tokens count beside the tokenizer's."""
    from transformers import GenerationConfig

    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return GenerationConfig(
        max_new_tokens=spec.max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends) or None,
    )


@torch.inference_mode()
def _continued(model: Any, rows: Sequence[list[int]], settings: Any) -> list[list[int]]:
    """The new tokens of every row."""
    width = max(map(len, rows))
    ids = torch.tensor([[settings.pad_token_id] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    device = device_of(model)
    # A PEFT wrapper's own `generate` changes the model under it, which threads share.
    writer = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = writer.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings, max_length=None
    )
    new: list[list[int]] = found[:, width:].tolist()
    return new
