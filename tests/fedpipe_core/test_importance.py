import pytest
import torch
from default_dtype import half_precision
from tiny_models import tiny_examples
from torch import nn

from fedpipe_core.architecture import adaptable_modules, head_parameters
from fedpipe_core.batches import training_batches
from fedpipe_core.config import PlanningSpec
from fedpipe_core.edge_model import own_head
from fedpipe_core.errors import RunError
from fedpipe_core.importance import IMPORTANCE_METHODS, PROBE_HEAD_RATE, Scores, score_modules
from fedpipe_core.losses import training_loss
from fedpipe_core.model import share
from fedpipe_core.tokenizing import TokenizedExamples

ROWS = tiny_examples(64)
LEARNED = ["adalora", "gradient_spectrum"]


def scores_of(base: nn.Module, method: str, steps: int = 10, seed: int = 0, rows=ROWS, rank: int = 4) -> Scores:
    batches = training_batches(rows, 8, steps, ["profile", seed])
    return score_modules(base, batches, PlanningSpec(importance=method, probe_rank=rank), seed)


@pytest.mark.parametrize("method", IMPORTANCE_METHODS)
@pytest.mark.parametrize(
    ("architecture", "bits"), [("bert", 32), ("gpt2", 32), ("llama", 32), ("bert", 4), ("gpt2", 4)]
)
def test_scores_of_every_method_fall_and_sum_to_one(tiny_base, method, architecture, bits):
    base = tiny_base(architecture, bits).model
    scores = scores_of(base, method)
    assert list(scores) == list(adaptable_modules(base))
    assert sum(sum(values) for values in scores.values()) == pytest.approx(1.0)
    for values in scores.values():
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert min(values) >= 0


@pytest.mark.parametrize("method", IMPORTANCE_METHODS)
def test_scores_follow_from_base_data_and_seed(tiny_base, method):
    base = tiny_base("bert").model
    first = scores_of(base, method)
    assert all(scores_of(base, method) == first for _ in range(3))


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_scoring_leaves_the_base_as_it_was(tiny_base, method, bits):
    base = tiny_base("bert", bits).model
    before = [value.clone() for value in base.parameters()]
    scores_of(base, method, steps=5)
    assert all(torch.equal(value, old) for value, old in zip(base.parameters(), before, strict=True))
    assert not any(value.requires_grad for value in base.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_module_that_cannot_matter_scores_below_every_other(tiny_base, method, architecture):
    rows = TokenizedExamples([[5 + index] for index in range(60)], [index // 15 for index in range(60)], 0)
    scores = {name: sum(values) for name, values in scores_of(tiny_base(architecture).model, method, rows=rows).items()}
    # A token alone attends to itself whatever query and key say.
    idle = {name for name in scores if name.endswith(("query", "key", "q_proj", "k_proj"))}
    assert len(idle) == 4
    assert max(scores[name] for name in idle) < 1e-4 * min(scores[name] for name in scores.keys() - idle)


@pytest.mark.parametrize("method", LEARNED)
def test_a_module_whose_output_is_multiplied_scores_higher(tiny_base, method):
    base = tiny_base("llama").model
    louder = share(base)
    name, reader = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
    weight = louder.get_submodule(reader).weight
    louder.get_submodule(reader).weight = nn.Parameter(weight * 10, requires_grad=False)
    before, after = (sum(scores_of(model, method)[name]) for model in (base, louder))
    assert after > 1.2 * before


@pytest.mark.parametrize("method", LEARNED)
def test_scores_are_equal_when_nothing_shows_any_importance(tiny_base, method):
    deaf = share(tiny_base("bert").model)
    deaf.classifier.weight = nn.Parameter(torch.zeros_like(deaf.classifier.weight), requires_grad=False)
    scores = scores_of(deaf, method, steps=1)  # a head of zeros passes no gradient on in its first step
    assert {value for values in scores.values() for value in values} == {1 / (len(scores) * 4)}


def test_scores_that_are_no_numbers_are_refused(tiny_base):
    broken = share(tiny_base("bert").model)
    broken.classifier.weight = nn.Parameter(torch.full_like(broken.classifier.weight, torch.nan), requires_grad=False)
    with pytest.raises(RunError, match=r"importance scores sum to nan.*planning\.importance to uniform"):
        scores_of(broken, "adalora")


def accumulated_gradients(base: nn.Module, steps: int) -> dict[str, torch.Tensor]:
    """The sums of the frozen weights' gradients while the head trains, kept dense as (out, in)."""
    model = share(base)
    own_head(model)
    names, total = list(adaptable_modules(model)), {}
    for name in names:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(module.weight.detach().clone())
    head = list(head_parameters(model).values())
    optimizer = torch.optim.AdamW(head, lr=PROBE_HEAD_RATE, weight_decay=0.0)
    for batch in training_batches(ROWS, 8, steps, ["profile", 0]):
        training_loss(model, batch).backward()
        for name in names:
            module = model.get_submodule(name)
            gradient = module.weight.grad if isinstance(module, nn.Linear) else module.weight.grad.T
            total[name] = total.get(name, 0) + gradient
            module.weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return total


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("rank", "error"), [(16, 1e-3), (8, 0.1)])
def test_the_gradient_spectrum_is_that_of_the_dense_gradient(tiny_base, architecture, rank, error):
    base = tiny_base(architecture).model
    exact = {name: torch.linalg.svdvals(gradient)[:rank] for name, gradient in accumulated_gradients(base, 5).items()}
    total = float(sum(values.sum() for values in exact.values()))
    found = scores_of(base, "gradient_spectrum", steps=5, rank=rank)
    for name, values in exact.items():
        assert sum(found[name]) == pytest.approx(float(values.sum()) / total, rel=error)
        assert found[name][0] == pytest.approx(float(values[0]) / total, rel=error)


def test_random_scores_differ_between_modules_and_agree_between_edges(tiny_base):
    base = tiny_base("bert").model
    scores = scores_of(base, "random")
    assert len({values[0] for values in scores.values()}) == len(scores)
    assert scores_of(base, "random", rows=tiny_examples(20, seed=9)) == scores
    assert scores_of(base, "random", seed=1) != scores


def test_last_layers_scores_put_every_block_before_the_ones_below(tiny_base):
    scores = scores_of(tiny_base("bert").model, "last_layers")
    blocks = [sum(sum(values) for name, values in scores.items() if f"layer.{layer}." in name) for layer in (0, 1)]
    assert blocks[1] == pytest.approx(10 * blocks[0])


@pytest.mark.parametrize("method", LEARNED)
def test_scores_are_the_same_while_another_thread_loads_a_model_of_half_precision(tiny_base, method):
    base = tiny_base("bert").model
    usual = scores_of(base, method)
    with half_precision():
        assert scores_of(base, method) == usual
