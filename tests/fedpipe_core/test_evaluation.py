import numpy as np
import pytest
import torch
from tiny_models import tiny_examples
from torch.nn import functional

from fedpipe_core.batches import pad_batch
from fedpipe_core.evaluation import evaluation_sha256, metrics_of, predict
from fedpipe_core.tokenizing import TokenizedExamples

ROWS = tiny_examples(23)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_predictions_keep_the_order_of_the_examples(tiny_base, batch_size):
    model = tiny_base("bert").model
    found = predict(model, ROWS, batch_size)
    for row in range(len(ROWS)):
        batch = pad_batch(ROWS, [row])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert found.predicted[row] == logits.argmax()
        assert found.losses[row] == pytest.approx(float(functional.cross_entropy(logits, batch["labels"])), rel=1e-4)
    assert found.labels.tolist() == ROWS.labels


def test_metrics_are_accuracy_macro_f1_and_mean_loss(tiny_base):
    found = predict(tiny_base("bert").model, ROWS, 8)
    metrics = metrics_of(found)
    assert set(metrics) == {"accuracy", "macro_f1", "loss"}
    assert metrics["accuracy"] == pytest.approx(np.mean(found.predicted == np.array(ROWS.labels)))
    assert metrics["loss"] == pytest.approx(np.mean(found.losses))


def test_predicting_trains_nothing_and_keeps_no_graph(tiny_base):
    model = tiny_base("llama").model
    before = [value.clone() for value in model.parameters()]
    predict(model, ROWS, 8)
    assert all(torch.equal(value, old) for value, old in zip(model.parameters(), before, strict=True))
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())


def test_an_evaluation_set_is_named_by_its_tokens_and_labels_in_order():
    rows = TokenizedExamples([[5, 6], [7]], [0, 1], pad_token_id=0)
    assert evaluation_sha256(rows) == evaluation_sha256(TokenizedExamples([[5, 6], [7]], [0, 1], pad_token_id=4))
    others = [
        TokenizedExamples([[7], [5, 6]], [1, 0], 0),
        TokenizedExamples([[5, 6], [7]], [1, 1], 0),
        TokenizedExamples([[5], [6, 7]], [0, 1], 0),
    ]
    assert len({evaluation_sha256(other) for other in [rows, *others]}) == 4
