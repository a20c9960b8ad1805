from dataclasses import replace

import pytest
import torch
from tiny_models import save_tiny_model

from fedpipe_core.config import ModelSpec
from fedpipe_core.forms import InstanceSpec
from fedpipe_core.model import Base, load_base
from tasks import edge_models
from tasks.edge_models import MOST_IDLE, ModelDesign, lent_model

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances of other tests are out of sight."""
    monkeypatch.setattr(edge_models, "_idle", [])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny classifier."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "bert")
    return load_base(ModelSpec(base=str(folder), bits=(32,)), 4, 32, 0)


def design(base: Base, rank: int = 2) -> ModelDesign:
    return ModelDesign(base, "lora", InstanceSpec({QUERY: rank}, (QUERY,), tail_cap=0, scaling=1.0))


def test_edges_that_train_one_after_another_share_an_instance(base: Base) -> None:
    with lent_model(design(base)) as first:
        pass
    with lent_model(design(base)) as second:
        assert second is first


def test_edges_that_train_at_once_have_an_instance_each(base: Base) -> None:
    with lent_model(design(base)) as first, lent_model(design(base)) as second:
        assert second is not first
        assert first.adapter_parameters()[0] is not second.adapter_parameters()[0]


def test_edges_of_unequal_plans_share_none(base: Base) -> None:
    with lent_model(design(base)) as first:
        pass
    with lent_model(design(base, rank=4)) as second:
        assert second is not first


def test_methods_that_train_otherwise_share_none(base: Base) -> None:
    whole = replace(design(base), form="whole")
    with lent_model(design(base)) as adapted:
        pass
    with lent_model(whole) as trained:
        assert trained is not adapted
        assert len(trained.dense) == len(list(base.model.parameters()))


def test_an_instance_in_which_training_failed_is_not_used_again(base: Base) -> None:
    with pytest.raises(RuntimeError, match="diverged"), lent_model(design(base)) as failed, torch.no_grad():
        raise RuntimeError("diverged")
    with lent_model(design(base)) as other:
        assert other is not failed


def test_few_idle_instances_are_kept_however_many_plans_there_are(base: Base) -> None:
    for rank in range(1, MOST_IDLE + 4):
        with lent_model(design(base, rank)):
            pass
    assert [kept.spec.ranks[QUERY] for kept, _ in edge_models._idle] == list(range(4, MOST_IDLE + 4))
