import pytest
from tiny_models import ARCHITECTURES, CONFIGS
from torch import nn
from transformers import ElectraConfig, ModernBertConfig, T5Config
from transformers.models.auto import AutoModelForSequenceClassification

from fedpipe_core.architecture import adaptable_modules, bits_of, head_modules, head_parameters, model_shape
from fedpipe_core.errors import ModelError

MODULES = {
    "bert": (
        "bert.encoder.layer",
        {
            "attention.self.query": (32, 32),
            "attention.self.key": (32, 32),
            "attention.self.value": (32, 32),
            "attention.output.dense": (32, 32),
            "intermediate.dense": (48, 32),
            "output.dense": (32, 48),
        },
    ),
    "distilbert": (
        "distilbert.transformer.layer",
        {
            "attention.q_lin": (32, 32),
            "attention.k_lin": (32, 32),
            "attention.v_lin": (32, 32),
            "attention.out_lin": (32, 32),
            "ffn.lin1": (48, 32),
            "ffn.lin2": (32, 48),
        },
    ),
    "gpt2": (
        "transformer.h",
        {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)},
    ),
    "llama": (
        "model.layers",
        {
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (48, 32),
            "mlp.up_proj": (48, 32),
            "mlp.down_proj": (32, 48),
        },
    ),
}
HEADS = {
    "bert": ["bert.pooler.dense", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "gpt2": ["score"],
    "llama": ["score"],
}


def classifier(config) -> nn.Module:
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("architecture", MODULES)
def test_adaptable_modules_are_the_linear_maps_of_the_blocks(architecture):
    prefix, sizes = MODULES[architecture]
    found = adaptable_modules(classifier(CONFIGS[architecture]()))
    assert {name: (m.out_features, m.in_features, m.layer) for name, m in found.items()} == {
        f"{prefix}.{layer}.{name}": (*size, layer) for layer in (0, 1) for name, size in sizes.items()
    }


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_modules_head_and_shape_are_the_same_at_every_bit_width(tiny_base, architecture, bits):
    dense, other = tiny_base(architecture).model, tiny_base(architecture, bits).model
    assert adaptable_modules(other) == adaptable_modules(dense)
    assert head_modules(other) == head_modules(dense)
    assert model_shape(other, 4) == model_shape(dense, 4)
    assert (bits_of(dense), bits_of(other)) == (32, bits)


def test_blocks_are_counted_through_encoder_and_decoder():
    config = T5Config(vocab_size=10, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    layers = [shape.layer for shape in adaptable_modules(classifier(config)).values()]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1, 2, 3}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_the_classifier_with_its_pooler(architecture):
    model = classifier(CONFIGS[architecture]())
    assert head_modules(model) == HEADS[architecture]
    assert {name.rpartition(".")[0] for name in head_parameters(model)} == set(HEADS[architecture])


def test_the_head_leaves_out_a_projection_before_the_blocks():
    config = ElectraConfig(
        vocab_size=10,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = classifier(config)
    assert model.get_submodule("electra.embeddings_project").weight.shape == (16, 8)
    assert head_modules(model) == ["classifier.dense", "classifier.out_proj"]


def test_the_head_takes_in_a_norm_between_its_linear_maps():
    config = ModernBertConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )
    assert head_modules(classifier(config)) == ["head.dense", "head.norm", "classifier"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_shape_counts_every_parameter_once(architecture):
    model = classifier(CONFIGS[architecture]())
    shape = model_shape(model, labels=2)
    counted = shape.linear_parameters + shape.other_parameters + shape.head_parameters
    assert counted == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.num_blocks, shape.hidden_features, shape.output_features) == (2, 32, 2)


def test_a_model_without_blocks_has_nothing_to_adapt():
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 2))
    with pytest.raises(ModelError, match="Sequential has no linear map inside repeated blocks"):
        adaptable_modules(model)
    assert head_modules(model) == []


def test_a_list_inside_a_block_is_part_of_that_block():
    experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(4), "experts": experts}), nn.Linear(4, 3)])
    assert {name: shape.layer for name, shape in adaptable_modules(model).items()} == {
        "blocks.0.experts.0": 0,
        "blocks.0.experts.1": 0,
        "blocks.1": 1,
    }
