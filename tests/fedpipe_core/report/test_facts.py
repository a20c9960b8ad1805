import pytest

from fedpipe_core.report.facts import place_of


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("bert.encoder.layer.3.attention.self.query", ("bert.encoder.layer", 3, "attention.self.query")),
        ("model.layers.11.mlp.up_proj", ("model.layers", 11, "mlp.up_proj")),
        ("transformer.h.0.attn.c_attn", ("transformer.h", 0, "attn.c_attn")),
        ("projection", ("", 0, "projection")),
    ],
)
def test_module_has_a_stack_a_layer_and_a_kind(module: str, place: tuple[str, int, str]) -> None:
    assert place_of(module) == place
