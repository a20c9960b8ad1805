from collections.abc import Callable

import pytest
import torch
from tiny_models import WRITERS, tiny_dialogues

from fedpipe_core.config import GenerationSpec
from fedpipe_core.generation import write_texts
from fedpipe_core.model import Base, share
from fedpipe_core.tokenizing import Prompts

TOKENS = tiny_dialogues(9).token_ids
PROMPTS = Prompts(TOKENS, [("unused",)] * len(TOKENS))
SPEC = GenerationSpec(max_new_tokens=5)


def texts(base: Base, **changes: object) -> list[str]:
    return write_texts(base.model, base.tokenizer, PROMPTS, SPEC.model_copy(update=changes))


@pytest.mark.parametrize("architecture", WRITERS)
def test_a_prompt_gets_the_same_text_in_a_batch_as_alone(tiny_writer: Callable[..., Base], architecture: str) -> None:
    base = tiny_writer(architecture)
    assert texts(base, batch_size=4) == texts(base, batch_size=1)


def test_text_is_what_the_model_finds_most_likely_step_by_step(tiny_writer: Callable[..., Base]) -> None:
    base = tiny_writer("llama")
    ids = list(TOKENS[0])
    with torch.inference_mode():
        for _ in range(SPEC.max_new_tokens):
            ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == base.tokenizer.eos_token_id:
                break
    expected = base.tokenizer.decode(ids[len(TOKENS[0]) :], skip_special_tokens=True)
    assert texts(base)[0] == expected.strip()


def test_text_is_never_longer_than_asked(tiny_writer: Callable[..., Base]) -> None:
    assert max(len(text.split()) for text in texts(tiny_writer("llama"), max_new_tokens=2)) == 2


def test_padding_side_of_the_tokenizer_changes_nothing(tiny_writer: Callable[..., Base]) -> None:
    base = tiny_writer("gpt2")
    written = []
    for side in ("left", "right"):
        base.tokenizer.padding_side = side
        written.append(texts(base))
    assert written[0] == written[1]


def test_the_base_s_own_wish_to_sample_is_not_heard(tiny_writer: Callable[..., Base]) -> None:
    base = tiny_writer("llama")
    expected, model = texts(base), share(base.model)
    model.generation_config.update(do_sample=True, temperature=9.0, max_length=3)
    assert write_texts(model, base.tokenizer, PROMPTS, SPEC) == expected


def test_threads_that_share_the_batches_write_the_same(tiny_writer: Callable[..., Base]) -> None:
    base, spec = tiny_writer("llama"), SPEC.model_copy(update={"batch_size": 2})
    expected = write_texts(base.model, base.tokenizer, PROMPTS, spec)
    assert write_texts(base.model, base.tokenizer, PROMPTS, spec, batches_at_once=2) == expected
