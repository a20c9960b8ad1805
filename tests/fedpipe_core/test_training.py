from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import random_adapter, tiny_examples
from torch.nn import functional

from fedpipe_core.adapters import Adapter, initial_adapter, split_for_edge
from fedpipe_core.architecture import adaptable_modules, head_parameters
from fedpipe_core.batches import pad_batch, training_batches
from fedpipe_core.config import TrainingSpec
from fedpipe_core.edge_model import EdgeModel, build_edge_model, load_adapter, read_adapter
from fedpipe_core.errors import UpdateRefusedError
from fedpipe_core.losses import training_loss
from fedpipe_core.training import TrainingReport, rate_factor, steps_rate_factor, train

ROWS = tiny_examples(64)
SPEC = TrainingSpec(learning_rate=5e-3, warmup_steps=2)


def first_round(base, ranks: dict[str, int] | None = None, checkpointing: bool = False) -> EdgeModel:
    """An edge that starts where every federation starts: B = 0 and the base's head."""
    shapes = adaptable_modules(base)
    ranks = ranks or dict.fromkeys(shapes, 4)
    head = {name: value.detach().float() for name, value in head_parameters(base).items()}
    edge = build_edge_model(base, ranks, 8, scaling=1.0, checkpointing=checkpointing)
    load_adapter(edge, *split_for_edge(initial_adapter(shapes, 8, head, seed=0), ranks, seed=0))
    return edge


def train_some(edge: EdgeModel, steps: int, seed: int = 0, spec: TrainingSpec = SPEC) -> TrainingReport:
    return train(edge, training_batches(ROWS, 8, steps, [seed]), spec, rate=1.0)


def same(first: Adapter, second: Adapter) -> bool:
    pairs = [(first.factors[name], second.factors[name]) for name in first.factors]
    factors = all(torch.equal(a.B, b.B) and torch.equal(a.A, b.A) for a, b in pairs)
    return factors and all(torch.equal(value, second.head[name]) for name, value in first.head.items())


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_training_lowers_the_loss_at_every_bit_width(tiny_base, architecture, bits):
    edge = first_round(tiny_base(architecture, bits).model)
    before = train_some(edge, steps=4)
    train_some(edge, steps=16)
    after = train_some(edge, steps=4)
    assert after.loss < 0.7 * before.loss


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_twice_gives_the_same_bits(tiny_base, bits, checkpointing):
    base = tiny_base("bert", bits).model
    found = []
    for _ in range(2):
        edge = first_round(base, checkpointing=checkpointing)
        report = train_some(edge, steps=6)
        found.append((report.loss, read_adapter(edge)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_a_round_starts_fresh_whatever_was_trained_before(tiny_base):
    base = tiny_base("bert").model
    edge, ranks = first_round(base), dict.fromkeys(adaptable_modules(base), 4)
    start = split_for_edge(random_adapter(base, dict.fromkeys(ranks, 8)), ranks, seed=0)
    found = []
    for _ in range(2):
        load_adapter(edge, *start)
        train_some(edge, steps=3)
        found.append(read_adapter(edge))
    assert same(*found)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_edges_that_train_at_once_on_one_base_find_what_they_find_alone(tiny_base, bits):
    base = tiny_base("bert", bits).model
    plans = [dict.fromkeys(adaptable_modules(base), 2), dict.fromkeys(list(adaptable_modules(base))[3:], 4)]

    def result(number: int) -> Adapter:
        edge = first_round(base, plans[number % 2], checkpointing=number >= 2)
        train_some(edge, steps=4, seed=number)
        return read_adapter(edge)

    alone = [result(number) for number in range(4)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(result, range(4)))
    assert all(same(first, second) for first, second in zip(alone, together, strict=True))
    assert not same(alone[0], alone[2])


def test_training_moves_what_is_trained_and_nothing_else(tiny_base):
    base = tiny_base("bert").model
    names = list(adaptable_modules(base))
    ranks = dict.fromkeys(names[::2], 2)
    edge = build_edge_model(base, ranks, 4, 1.0)
    load_adapter(edge, *split_for_edge(random_adapter(base, dict.fromkeys(names, 4)), ranks, seed=0))
    before = {name: value.clone() for name, value in edge.model.named_parameters()}
    train_some(edge, steps=2)
    moved = {name for name, value in edge.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in edge.model.named_parameters() if value.requires_grad}
    assert all(".default." in name or name in head_parameters(edge.model) for name in moved)


def test_the_report_counts_steps_examples_and_the_mean_loss(tiny_base):
    base = tiny_base("bert").model
    still = TrainingSpec(learning_rate=1e-30)
    report = train_some(first_round(base), steps=5, spec=still)
    losses = [float(training_loss(base, batch)) for batch in training_batches(ROWS, 8, 5, [0])]
    assert (report.steps, report.examples_processed) == (5, 40)
    assert report.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert report.seconds > 0


def test_the_first_step_goes_as_far_as_warm_up_rate_and_head_factor_say(tiny_base):
    base = tiny_base("bert").model
    spec = TrainingSpec(learning_rate=1e-3, head_rate_factor=3.0, warmup_steps=4)
    edge = first_round(base)
    before = [value.detach().clone() for value in (*edge.adapter_parameters(), *edge.head_parameters())]
    train(edge, training_batches(ROWS, 8, 1, [0]), spec, rate=0.5)
    after = (*edge.adapter_parameters(), *edge.head_parameters())
    steps = [float((new - old).detach().abs().max()) for new, old in zip(after, before, strict=True)]
    # AdamW's first step is its rate for every scalar with a gradient
    assert max(steps[: len(edge.adapter_parameters())]) == pytest.approx(0.5 * 1e-3 / 5, rel=1e-2)
    assert max(steps[len(edge.adapter_parameters()) :]) == pytest.approx(3 * 0.5 * 1e-3 / 5, rel=1e-2)


def test_a_loss_that_is_no_number_refuses_the_update(tiny_base):
    edge = first_round(tiny_base("bert").model)
    with torch.no_grad():
        edge.head_parameters()[0].fill_(float("nan"))
    with pytest.raises(UpdateRefusedError, match=r"loss became nan at step 1; .* lower training\.learning_rate"):
        train_some(edge, steps=3)


def test_a_gradient_that_is_no_number_refuses_the_update_even_in_the_last_step(tiny_base):
    edge = first_round(tiny_base("bert").model)
    edge.head_parameters()[0].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UpdateRefusedError, match=r"gradient norm became (nan|inf) at step 1"):
        train_some(edge, steps=1)
    assert all(torch.isfinite(value).all() for value in edge.adapter_parameters())


def test_the_rate_falls_in_a_line_from_the_first_round_to_the_last():
    spec = TrainingSpec(final_rate_fraction=0.2)
    assert [rate_factor(spec, index, 5) for index in range(1, 6)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rate_factor(spec, 1, 1) == 1.0


def test_edges_that_make_few_steps_train_at_a_higher_rate_where_the_config_says_what_number_rates_are_for():
    assert steps_rate_factor(TrainingSpec(), 80) == 1.0
    spec = TrainingSpec(rate_steps=40)
    assert [steps_rate_factor(spec, steps) for steps in (160, 40, 10, 1)] == [0.5, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("bits", [32, 16])
def test_the_loss_is_mean_cross_entropy_in_float32(tiny_base, bits):
    base = tiny_base("bert", bits).model
    batch = pad_batch(ROWS, range(5))
    with torch.no_grad():
        logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = training_loss(base, batch)
    assert loss.dtype == torch.float32
    assert loss == functional.cross_entropy(logits.float(), batch["labels"])
