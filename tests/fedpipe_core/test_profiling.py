from typing import Any

import pytest
from tiny_models import LABELS, tiny_examples

from fedpipe_core.architecture import adaptable_modules, model_shape
from fedpipe_core.batches import longest_example_tokens, tokens_per_example
from fedpipe_core.config import FederationConfig
from fedpipe_core.config_file import parse_config
from fedpipe_core.costs import base_bytes
from fedpipe_core.errors import DataError
from fedpipe_core.model import Base
from fedpipe_core.profile_schemas import EdgeProfile
from fedpipe_core.profiling import EdgeData, Limits, declared_limits, most_examples, probe_sizes, profile_edge
from fedpipe_core.tokenizing import TokenizedExamples

DECLARED = {"memory_gib": 2, "tokens_per_second": 400, "bandwidth_mbit": 80}
DATA = EdgeData(train=tiny_examples(40), validation=tiny_examples(5, seed=1), fingerprint="f" * 64)


def config_of(resources: dict[str, Any] | None, **planning: Any) -> FederationConfig:
    return parse_config(
        {
            "name": "tiny",
            "model": {"base": "tiny"},
            "data": {"train": "{edge_id}.jsonl", "test": "test.jsonl", "labels": LABELS},
            "edges": [{"edge_id": "edge-00"}, {"edge_id": "edge-01", "resources": resources}],
            "planning": {"profile_steps": 5, "batch_sizes": [4, 16], **planning},
        }
    )


def profile(
    base: Base, config: FederationConfig, data: EdgeData = DATA, memory_bytes: int = 2**31, bandwidth: float = 1e6
) -> EdgeProfile:
    declared = config.edges[1].resources
    limits = declared_limits(declared) if declared else Limits(memory_bytes, bandwidth)
    return profile_edge("edge-01", base, model_shape(base.model, LABELS), data, config, limits)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_declared_profile_follows_from_config_and_data_alone(tiny_base, architecture):
    base, config = tiny_base(architecture), config_of(DECLARED)
    first, second = (profile(base, config) for _ in range(2))
    assert first.model_copy(update={"profile_seconds": 0.0}) == second.model_copy(update={"profile_seconds": 0.0})
    assert first.declared
    assert (first.memory_bytes, first.bandwidth_bytes_per_second) == (2 * 2**30, 1e7)
    assert first.step_cost.per_token_seconds == 1 / 400


def test_a_profile_without_declared_resources_measures_them(tiny_base):
    found = profile(tiny_base("bert"), config_of(None), bandwidth=12345.0)
    assert not found.declared
    assert found.bandwidth_bytes_per_second == 12345.0
    assert found.memory_bytes > 2**20
    assert 0 < found.step_cost.per_token_seconds < 1
    assert found.profile_seconds > 0


def test_a_profile_tells_sizes_of_the_data_and_no_row(tiny_base):
    found = profile(tiny_base("bert"), config_of(DECLARED))
    assert (found.num_examples, found.num_validation_examples) == (40, 5)
    assert found.tokens_per_example == tokens_per_example(DATA.train, 16)
    assert found.longest_example_tokens == longest_example_tokens(DATA.train)
    assert found.data_fingerprint == DATA.fingerprint
    assert EdgeProfile.model_validate_json(found.model_dump_json()) == found


def test_a_profile_scores_every_module_to_the_probe_rank(tiny_base):
    base = tiny_base("llama")
    found = profile(base, config_of(DECLARED, probe_rank=3))
    assert (
        list(found.scores) == list(found.activation_cost.per_token_module_bytes) == list(adaptable_modules(base.model))
    )
    assert {len(values) for values in found.scores.values()} == {3}


@pytest.mark.parametrize(("bits", "value_bytes"), [(32, 4), (16, 2)])
def test_a_profile_tells_the_bytes_of_an_activation(tiny_base, bits, value_bytes):
    assert profile(tiny_base("bert", bits), config_of(DECLARED)).value_bytes == value_bytes


def test_an_edge_with_a_single_row_is_profiled_on_that_row(tiny_base):
    data = EdgeData(tiny_examples(1), tiny_examples(0), "f" * 64)
    assert profile(tiny_base("bert"), config_of(DECLARED), data).num_examples == 1


def test_an_edge_without_rows_cannot_be_profiled(tiny_base):
    data = EdgeData(TokenizedExamples([], [], 0), tiny_examples(5), "f" * 64)
    with pytest.raises(DataError, match="0 rows to train on"):
        profile(tiny_base("bert"), config_of(DECLARED), data)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_an_edge_too_small_for_the_dense_base_is_profiled_on_a_quantized_one(tiny_base, architecture, bits):
    found = profile(tiny_base(architecture, bits), config_of(None, profile_batch_size=4))
    assert sum(sum(values) for values in found.scores.values()) == pytest.approx(1)
    assert bits in found.step_cost.dequantization_seconds
    assert found.step_cost.per_token_seconds > 0


def test_a_profiles_batches_are_halved_until_they_fit_the_memory(tiny_base):
    base = tiny_base("bert")
    shape, sketch = model_shape(base.model, LABELS), profile(base, config_of(DECLARED))
    sizes = [most_examples(sketch.model_copy(update={"memory_bytes": n}), shape, 32, 4, 16) for n in (1, 10**6, 10**9)]
    assert sizes[0] == 1
    assert sizes[-1] == 16
    assert sizes == sorted(sizes)
    roomy, tight = 2**31, round(base_bytes(shape, 32, 4)) + 2**18
    assert (
        profile(base, config_of(None), memory_bytes=tight).scores
        != profile(base, config_of(None), memory_bytes=roomy).scores
    )


@pytest.mark.parametrize(("menu", "sizes"), [((8, 16, 64), (4, 32)), ((4, 8), (1, 8)), ((1,), (1, 1))])
def test_a_probe_is_no_larger_than_the_largest_batch_a_plan_may_have(menu, sizes):
    assert probe_sizes(menu) == sizes
