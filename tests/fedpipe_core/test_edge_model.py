import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, random_adapter, tiny_examples
from torch import nn
from transformers import ModernBertConfig
from transformers.models.auto import AutoModelForSequenceClassification

from fedpipe_core.adapters import Adapter, fresh_for_edge, initial_adapter, split_for_edge
from fedpipe_core.architecture import adaptable_modules, head_parameters
from fedpipe_core.batches import pad_batch
from fedpipe_core.config import TrainingSpec
from fedpipe_core.edge_model import (
    EdgeModel,
    build_edge_model,
    build_global_model,
    count_parameters,
    load_adapter,
    load_global_adapter,
    own_head,
    read_adapter,
    with_frozen_right_factors,
)
from fedpipe_core.evaluation import predict
from fedpipe_core.losses import training_loss
from fedpipe_core.low_rank import LowRank
from fedpipe_core.model import share
from fedpipe_core.training import train

BATCH = pad_batch(tiny_examples(6), range(6))


def logits(edge: EdgeModel) -> torch.Tensor:
    with torch.no_grad():
        return edge.model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits


def gradients(edge: EdgeModel) -> list[torch.Tensor]:
    edge.model.zero_grad()
    training_loss(edge.model, BATCH).backward()
    return [parameter.grad.clone() for parameter in (*edge.adapter_parameters(), *edge.head_parameters())]


def rank_maps(names: list[str]) -> dict[str, dict[str, int]]:
    return {
        "equal": dict.fromkeys(names, 2),
        "mixed": {name: 1 + index % 4 for index, name in enumerate(names)},
        "one module": {names[-1]: 3},
        "every other module, some at the cap": {name: (4, 1)[index % 2] for index, name in enumerate(names[::2])},
        "all at the cap": dict.fromkeys(names, 4),
    }


def started(base: nn.Module, ranks: dict[str, int], cap: int = 4, scaling: float = 1.0, seed: int = 0) -> EdgeModel:
    """An edge model that starts from a random global adapter."""
    edge = build_edge_model(base, ranks, cap, scaling)
    whole = random_adapter(base, dict.fromkeys(adaptable_modules(base), cap), seed)
    load_adapter(edge, *split_for_edge(whole, ranks, seed=0))
    return edge


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize(
    "kind", ["equal", "mixed", "one module", "every other module, some at the cap", "all at the cap"]
)
def test_trained_part_and_frozen_tail_are_the_whole_global_adapter(tiny_base, architecture, bits, kind):
    base = tiny_base(architecture, bits).model
    names = list(adaptable_modules(base))
    adapter = random_adapter(base, {name: 1 + index % 4 for index, name in enumerate(names)})
    whole = build_global_model(base, rank_cap=4)
    load_global_adapter(whole, adapter)
    ranks = rank_maps(names)[kind]
    edge = build_edge_model(base, ranks, rank_cap=4, scaling=0.5)
    load_adapter(edge, *split_for_edge(adapter, ranks, seed=0))
    torch.testing.assert_close(logits(edge), logits(whole), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(whole), logits(build_global_model(base, 4)), atol=0.1)


def test_the_global_model_computes_what_merged_weights_compute(tiny_base):
    base = tiny_base("gpt2").model  # its Conv1D keeps weights transposed
    adapter = random_adapter(base, dict.fromkeys(adaptable_modules(base), 3))
    whole = build_global_model(base, rank_cap=3)
    load_global_adapter(whole, adapter)
    merged = share(base)
    for name, factors in adapter.factors.items():
        module = merged.get_submodule(name)
        module.weight = nn.Parameter(module.weight + factors.dense().T)
    merged.score.weight = nn.Parameter(adapter.head["score.weight"])
    inputs = {key: value for key, value in BATCH.items() if key != "labels"}
    torch.testing.assert_close(logits(whole), merged(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 64), st.integers(0, 100))
def test_what_is_read_is_what_was_loaded_whatever_the_scaling(tiny_base, scaling, seed):
    base = tiny_base("bert").model
    names = list(adaptable_modules(base))
    ranks = {name: 1 + index % 3 for index, name in enumerate(names[2:])}
    edge = build_edge_model(base, ranks, 3, scaling)
    trained, tail = split_for_edge(random_adapter(base, dict.fromkeys(names, 3), seed), ranks, seed)
    load_adapter(edge, trained, tail)
    found = read_adapter(edge)
    assert list(found.factors) == list(trained.factors)
    for name, factors in trained.factors.items():
        torch.testing.assert_close(found.factors[name].B, factors.B, rtol=3e-7, atol=0)
        assert torch.equal(found.factors[name].A, factors.A)
    assert all(torch.equal(found.head[name], value) for name, value in trained.head.items())


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0, 16.0])
def test_scalings_that_are_powers_of_two_round_nothing(tiny_base, scaling):
    base = tiny_base("bert").model
    adapter = random_adapter(base, dict.fromkeys(adaptable_modules(base), 2))
    edge = build_edge_model(base, adapter.ranks, 2, scaling)
    load_adapter(edge, adapter, {})
    assert all(torch.equal(found.B, adapter.factors[name].B) for name, found in read_adapter(edge).factors.items())


def test_what_is_read_stays_when_the_edge_goes_on(tiny_base):
    base = tiny_base("bert").model
    edge = started(base, dict.fromkeys(adaptable_modules(base), 2))
    found = read_adapter(edge)
    before = [value.clone() for value in (*found.head.values(), *(factors.B for factors in found.factors.values()))]
    with torch.no_grad():
        for parameter in (*edge.adapter_parameters(), *edge.head_parameters()):
            parameter.add_(1.0)
    after = [*found.head.values(), *(factors.B for factors in found.factors.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_loading_again_forgets_what_was_loaded_before(tiny_base):
    base = tiny_base("llama").model
    names = list(adaptable_modules(base))
    edge, ranks = started(base, dict.fromkeys(names, 2)), dict.fromkeys(names, 2)
    adapter = random_adapter(base, dict.fromkeys(names[:3], 1), seed=7)
    start = Adapter({**_empty(base, names, 1), **adapter.factors}, adapter.head)
    load_adapter(edge, *split_for_edge(start, ranks, seed=0))
    fresh = build_edge_model(base, ranks, 4, 1.0)
    load_adapter(fresh, *split_for_edge(start, ranks, seed=0))
    assert torch.equal(logits(edge), logits(fresh))
    whole = build_global_model(base, 4)
    load_global_adapter(whole, random_adapter(base, dict.fromkeys(names, 4), seed=1))
    load_global_adapter(whole, adapter)
    torch.testing.assert_close(logits(whole), logits(edge), rtol=1e-4, atol=1e-4)


def _empty(base: nn.Module, names: list[str], rank: int) -> dict[str, LowRank]:
    shapes = adaptable_modules(base)
    return {
        name: LowRank(torch.zeros(shapes[name].out_features, rank), torch.ones(rank, shapes[name].in_features))
        for name in names
    }


def test_the_first_round_starts_from_the_base_itself(tiny_base):
    base = tiny_base("bert").model
    shapes, head = adaptable_modules(base), {name: value.clone() for name, value in head_parameters(base).items()}
    ranks = dict.fromkeys(shapes, 2)
    edge = build_edge_model(base, ranks, 4, 1.0)
    load_adapter(edge, *split_for_edge(initial_adapter(shapes, 4, head, seed=0), ranks, seed=0))
    with torch.no_grad():
        exact = base(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    assert torch.equal(logits(edge), exact)


def test_only_the_planned_factors_and_the_head_are_trained(tiny_base):
    base = tiny_base("llama").model
    shapes = adaptable_modules(base)
    ranks = dict.fromkeys(list(shapes)[::3], 2)
    edge = started(base, ranks)
    features = sum(shapes[name].out_features + shapes[name].in_features for name in ranks)
    assert count_parameters(edge.adapter_parameters()) == 2 * features
    trained = [name for name, value in edge.model.named_parameters() if value.requires_grad]
    assert len(trained) == 2 * len(ranks) + len(edge.head_parameters())
    assert not [name for name in trained if re.search(r"\.tail\.", name)]


def test_a_frozen_right_factor_takes_part_and_is_not_trained(tiny_base):
    base = tiny_base("bert").model
    ranks = dict.fromkeys(adaptable_modules(base), 2)
    edge = with_frozen_right_factors(started(base, ranks))
    whole = random_adapter(base, dict.fromkeys(ranks, 4))
    load_adapter(edge, *split_for_edge(whole, ranks, seed=0))
    train(edge, iter([BATCH] * 3), TrainingSpec(learning_rate=0.01), rate=1.0)
    found = read_adapter(edge)
    assert count_parameters(edge.adapter_parameters()) == 2 * sum(
        s.out_features for s in adaptable_modules(base).values()
    )
    for name, factors in found.factors.items():
        assert torch.equal(factors.A, whole.factors[name].A[:2])
        assert not torch.equal(factors.B, whole.factors[name].B[:, :2])


def test_names_that_are_no_plain_words_find_their_own_rank(tiny_base):
    base = tiny_base("bert").model
    names = list(adaptable_modules(base))
    ranks = {name: index + 1 for index, name in enumerate(names)}
    edge = build_edge_model(base, ranks, len(names), scaling=3.0)
    for name, rank in ranks.items():
        layer = edge.model.get_submodule(name)
        assert layer.lora_A["default"].weight.shape[0] == rank
        assert layer.scaling["default"] == pytest.approx(3.0)
        assert layer.scaling.get("tail", 1.0) == 1.0


def test_a_tail_has_room_in_the_named_modules_alone(tiny_base):
    base = tiny_base("bert").model
    names = list(adaptable_modules(base))
    edge = build_edge_model(base, {names[0]: 2}, 4, 1.0, modules=names[:2])
    assert edge.tail_ranks == {names[0]: 2, names[1]: 4}
    assert not hasattr(edge.model.get_submodule(names[2]), "lora_A")


def test_a_tail_that_is_never_truncated_finds_room(tiny_base):
    base = tiny_base("bert").model
    ranks = dict.fromkeys(adaptable_modules(base), 2)
    edge = build_edge_model(base, ranks, 3, 1.0)
    for rank in (1, 9, 4):
        adapter = random_adapter(base, dict.fromkeys(ranks, rank))
        load_adapter(edge, *fresh_for_edge(adapter, ranks, seed=0))
        whole = build_global_model(base, rank)
        load_global_adapter(whole, adapter)
        torch.testing.assert_close(logits(edge), logits(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_evaluating_before_training_leaves_gradients_as_they_are(tiny_base, architecture, bits):
    base = tiny_base(architecture, bits).model
    edge = started(base, dict.fromkeys(adaptable_modules(base), 2))
    expected = gradients(edge)
    predict(edge.model, tiny_examples(20), batch_size=7)
    logits(edge)
    for found, value in zip(gradients(edge), expected, strict=True):
        assert torch.equal(found, value)
        assert value.any()


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "llama"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_checkpointing_computes_the_same_gradients(tiny_base, architecture, bits):
    base = tiny_base(architecture, bits).model
    ranks = dict.fromkeys(list(adaptable_modules(base))[1::2], 2)
    plain = started(base, ranks)
    saving = build_edge_model(base, ranks, 4, 1.0, checkpointing=True)
    load_adapter(
        saving, *split_for_edge(random_adapter(base, dict.fromkeys(adaptable_modules(base), 4)), ranks, seed=0)
    )
    for found, value in zip(gradients(saving), gradients(plain), strict=True):
        assert torch.equal(found, value)


def test_checkpointing_computes_every_block_twice(tiny_base):
    base = tiny_base("llama").model
    edge = build_edge_model(base, dict.fromkeys(adaptable_modules(base), 2), 4, 1.0, checkpointing=True)
    calls: Counter[int] = Counter()
    for layer in (0, 1):
        first = edge.model.get_submodule(f"model.layers.{layer}.self_attn.q_proj")
        first.register_forward_hook(lambda *_, layer=layer: calls.update([layer]))
    gradients(edge)
    assert calls == {0: 2, 1: 2}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointing_computes_blocks_below_the_lowest_adapter_once(tiny_base, architecture):
    base = tiny_base(architecture).model
    upper = {name: 2 for name, shape in adaptable_modules(base).items() if shape.layer == 1}
    edge = build_edge_model(base, upper, 4, 1.0, checkpointing=True, modules=upper)
    calls: Counter[int] = Counter()
    for name, shape in adaptable_modules(base).items():
        module = edge.model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, layer=shape.layer: calls.update([layer]))
    gradients(edge)
    assert calls == {0: len(upper), 1: 2 * len(upper)}


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_edges_hold_one_base_and_leave_each_other_alone(tiny_base, bits):
    base = tiny_base("bert", bits).model
    names = list(adaptable_modules(base))
    first, second = started(base, dict.fromkeys(names, 2)), started(base, dict.fromkeys(names[:4], 4))
    answer = logits(second)
    for name in names:
        shared = {edge.model.get_submodule(name).base_layer.weight.data_ptr() for edge in (first, second)}
        assert shared == {base.get_submodule(name).weight.data_ptr()}
    with torch.no_grad():
        for parameter in (*first.adapter_parameters(), *first.head_parameters()):
            parameter.mul_(3.0)
    assert torch.equal(logits(second), answer)
    assert not torch.equal(logits(first), logits(second))


def test_a_head_with_a_norm_computes_in_float32_on_a_base_of_16_bits():
    config = ModernBertConfig(
        vocab_size=70, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )
    model = AutoModelForSequenceClassification.from_config(config).to(torch.bfloat16).eval()
    own_head(model)
    assert {value.dtype for value in head_parameters(model).values()} == {torch.float32}
    assert model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits.dtype == torch.float32


@pytest.mark.parametrize("bits", [16, 4])
def test_factors_stay_float32_whatever_the_base_computes_in(tiny_base, bits):
    base = tiny_base("llama", bits).model
    name = next(iter(adaptable_modules(base)))
    edge = build_edge_model(base, {name: 2}, 4, scaling=1.0)
    parameters = [value for key, value in edge.model.named_parameters() if "lora_" in key]
    assert {value.dtype for value in parameters} == {torch.float32}
    assert all(torch.isfinite(gradient).all() for gradient in gradients(edge))
