"""Forms of training on cases whose answer is known."""

import pytest
import torch
from default_dtype import half_precision
from tiny_models import tiny_dialogues, tiny_examples

from fedpipe_core.adapters import Adapter, truncated_for_edge
from fedpipe_core.aggregation import Update, aggregate
from fedpipe_core.architecture import head_parameters, model_shape
from fedpipe_core.batches import pad_batch, training_batches
from fedpipe_core.config import AggregationSpec, TrainingSpec
from fedpipe_core.edge_model import EdgeModel, load_adapter, read_adapter
from fedpipe_core.forms import FORMS, InstanceSpec
from fedpipe_core.low_rank import LowRank
from fedpipe_core.memory import training_memory_bytes
from fedpipe_core.methods import METHODS, bottleneck_places, bottlenecks
from fedpipe_core.model import share
from fedpipe_core.training import train

ROWS = tiny_examples(48)
SPEC = TrainingSpec(learning_rate=5e-3, head_rate_factor=2.0, warmup_steps=0)
WHOLE, BOTTLENECK = FORMS["whole"], FORMS["bottleneck"]
NOTHING = InstanceSpec({}, (), 0, 1.0)


def batches(seed: int, steps: int = 5):
    return training_batches(ROWS, 8, steps, [seed])


def logits(model) -> torch.Tensor:
    batch = pad_batch(ROWS, range(12))
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def whole_edge(base, seed: int) -> tuple[EdgeModel, Update]:
    """An edge that trained every parameter on its own batches."""
    first = WHOLE.first(base, {}, {}, 0)
    edge = WHOLE.build(base, NOTHING)
    load_adapter(edge, first, {})
    train(edge, batches(seed), SPEC, rate=1.0)
    return edge, Update(f"edge-{seed}", first, read_adapter(edge), 10 * (seed + 1))


def bottleneck_edge(base, ranks: dict[str, int], adapter: Adapter, seed: int = 7) -> EdgeModel:
    edge = BOTTLENECK.build(base, InstanceSpec(ranks, (), 0, 1.0))
    load_adapter(edge, *truncated_for_edge(adapter, ranks, seed))
    return edge


def places(base):
    return bottleneck_places(model_shape(base, 4))


def first_bottlenecks(base, depth: int = 1, width: int = 4) -> tuple[dict[str, int], Adapter]:
    ranks = bottlenecks(places(base), depth, width)
    return ranks, BOTTLENECK.first(base, places(base).modules, ranks, 0)


def test_one_edge_that_trains_everything_is_plain_central_training(tiny_base):
    base = tiny_base("bert").model
    _, update = whole_edge(base, seed=0)
    found = aggregate(update.start, [update], AggregationSpec()).adapter
    central = share(base)
    for name, parameter in list(central.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(central.get_submodule(module), leaf, torch.nn.Parameter(parameter.detach().clone()))
    head = {id(value) for value in head_parameters(central).values()}
    backbone = [value for value in central.parameters() if id(value) not in head]
    groups = [{"params": backbone, "lr": 5e-3}, {"params": list(head_parameters(central).values()), "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for batch in batches(seed=0):
        optimizer.zero_grad()
        central(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(central.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(logits(WHOLE.judged(base, found)), logits(central), atol=2e-4, rtol=1e-3)
    assert not torch.allclose(logits(central), logits(base), atol=0.1)


def test_everything_averages_to_the_weighted_mean_of_the_edges_parameters(tiny_base):
    base = tiny_base("bert").model
    edges, updates = zip(*(whole_edge(base, seed) for seed in (0, 1)), strict=True)
    judged = WHOLE.judged(base, aggregate(updates[0].start, updates, AggregationSpec()).adapter)
    parts = [dict(edge.model.named_parameters()) for edge in edges]
    for name, value in judged.named_parameters():
        mean = (10 * parts[0][name] + 20 * parts[1][name]) / 30
        torch.testing.assert_close(value, mean, atol=1e-6, rtol=1e-5)


def test_training_everything_leaves_the_base_and_other_edges_alone(tiny_base):
    base = tiny_base("bert").model
    before = {name: value.clone() for name, value in base.named_parameters()}
    whole_edge(base, seed=3)
    assert all(torch.equal(value, before[name]) for name, value in base.named_parameters())


def test_embeddings_tied_to_the_output_stay_one_parameter(tiny_writer):
    base = tiny_writer("tied").model
    edge = WHOLE.build(base, NOTHING)
    load_adapter(edge, WHOLE.first(base, {}, {}, 0), {})
    rows = tiny_dialogues(16)
    train(edge, training_batches(rows, 4, 3, [0]), SPEC, rate=1.0)
    judged = WHOLE.judged(base, read_adapter(edge))
    assert judged.lm_head.weight is judged.model.embed_tokens.weight
    assert not torch.equal(judged.lm_head.weight, base.lm_head.weight)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "llama"])
def test_bottlenecks_start_as_the_identity_and_grow_as_the_identity(tiny_base, architecture):
    base = tiny_base(architecture).model
    ranks, adapter = first_bottlenecks(base)
    edge = bottleneck_edge(base, ranks, adapter)
    assert torch.equal(logits(edge.model), logits(base))
    report = train(edge, batches(0, steps=12), SPEC, rate=1.0)
    later = train(edge, batches(1), SPEC, rate=1.0)
    assert later.loss < report.loss
    trained = Adapter({**adapter.factors, **read_adapter(edge).factors}, read_adapter(edge).head)
    now = logits(BOTTLENECK.judged(base, trained))
    torch.testing.assert_close(now, logits(edge.model), atol=1e-5, rtol=1e-5)
    for depth, width in ((2, 4), (1, 8)):
        grown = bottleneck_edge(base, bottlenecks(places(base), depth, width), trained)
        assert sum(A.shape[0] for _, A in grown.factors.values()) == 2 * sum(ranks.values())
        torch.testing.assert_close(logits(grown.model), now, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [32, 4])
def test_only_bottlenecks_and_head_are_trained(tiny_base, bits):
    base = tiny_base("bert", bits).model
    ranks, adapter = first_bottlenecks(base)
    edge = bottleneck_edge(base, ranks, adapter)
    trained = [name for name, value in edge.model.named_parameters() if value.requires_grad]
    assert all(".bottleneck." in name or name in head_parameters(edge.model) for name in trained)
    assert sum(".bottleneck." in name for name in trained) == 4
    train(edge, batches(0), SPEC, rate=1.0)
    assert all(bool(factors.B.any()) for factors in read_adapter(edge).factors.values())


def test_a_place_lies_behind_the_projection_that_closes_attention_and_block(tiny_base, tiny_writer):
    found = [list(places(tiny_base(name).model).modules) for name in ("bert", "gpt2")]
    assert found[0][2:] == [
        "bert.encoder.layer.1.attention.output.dense.bottleneck",
        "bert.encoder.layer.1.output.dense.bottleneck",
    ]
    assert found[1][:2] == ["transformer.h.0.attn.c_proj.bottleneck", "transformer.h.0.mlp.c_proj.bottleneck"]
    phi = list(bottleneck_places(model_shape(tiny_writer("phi3").model, None)).modules)
    assert phi[:2] == ["model.layers.0.self_attn.o_proj.bottleneck", "model.layers.0.mlp.down_proj.bottleneck"]


def test_memory_of_training_everything_is_weights_gradients_moments_and_inputs(tiny_base):
    base = tiny_base("bert").model
    parameters = sum(value.numel() for value in base.parameters())
    measured = training_memory_bytes(WHOLE.build(base, NOTHING), pad_batch(ROWS, range(8)))
    assert 16 * parameters < measured < 16 * parameters + 2_000_000


def test_a_component_that_several_edges_have_is_averaged_over_them():
    start = Adapter({"place": LowRank(torch.zeros(3, 0), torch.zeros(0, 3))}, {})
    narrow, wide = (
        Adapter({"place": LowRank(torch.full((3, r), v), torch.full((r, 3), v))}, {}) for r, v in ((1, 1.0), (2, 3.0))
    )
    updates = [Update("a", start, narrow, 1), Update("b", start, wide, 1)]
    found = aggregate(start, updates, AggregationSpec(rule="rankwise")).adapter.factors["place"]
    assert found.B[0].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("form", FORMS)
def test_what_a_form_trains_is_float32_while_another_thread_loads_a_model_of_half_precision(tiny_base, form):
    base = tiny_base("bert").model
    shapes = places(base).modules if form == "bottleneck" else model_shape(base, 4).modules
    ranks = {} if form == "whole" else dict.fromkeys(list(shapes)[:2], 2)
    with half_precision():
        first = FORMS[form].first(base, shapes, ranks, 0)
        edge = FORMS[form].build(base, InstanceSpec(ranks, (), 0, 1.0))
    factors = [side for product in first.factors.values() for side in (product.B, product.A)]
    trained = [*edge.adapter_parameters(), *edge.head_parameters()]
    assert {value.dtype for value in (*factors, *first.head.values(), *trained)} == {torch.float32}


def test_every_method_names_a_form_there_is():
    assert {traits.form for traits in METHODS.values()} == set(FORMS)
