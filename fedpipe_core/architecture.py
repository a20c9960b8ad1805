"""What a model is made of, found by type and shape: blocks, the matrices inside that can carry an adapter, its head."""

from torch import nn

from fedpipe_core.errors import ModelError
from fedpipe_core.profile_schemas import ModelShape, ModuleShape


def adaptable_modules(model: nn.Module) -> dict[str, ModuleShape]:
    """Find the matrices that can carry an adapter: every linear map inside the repeated blocks, by type and shape.

    Names and shapes are in the model's own order, blocks are counted through the whole model. GPT-2's transposed
    `Conv1D` counts, with its shape turned to (out_features, in_features); embeddings and heads lie outside the blocks
    and do not count.

    Raises ModelError when there is none.
    """
    blocks = block_prefixes(model)
    found = {}
    for name, module in model.named_modules():
        size = linear_size(module)
        layer = next((index for index, block in enumerate(blocks) if size and f"{name}.".startswith(block)), None)
        if size is not None and layer is not None:
            found[name] = ModuleShape(out_features=size[0], in_features=size[1], layer=layer)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear map inside repeated blocks, so there is nothing to adapt"
        )
    return found


def dense_modules(model: nn.Module) -> list[str]:
    """Linear maps outside the blocks, which are never quantized."""
    blocks = tuple(block_prefixes(model))
    return [name for name, part in model.named_modules() if linear_size(part) and not f"{name}.".startswith(blocks)]


def head_modules(model: nn.Module) -> list[str]:
    """Modules of the head, trained in full: all that hold parameters from the first linear map behind the blocks on.

    That is a classifier with its pooler; a projection before the blocks or a norm right behind them is none of it. A
    model that predicts tokens has none: its output layer is pretrained, and stays as it is.
    """
    if predicts_tokens(model):
        return []
    blocks = tuple(block_prefixes(model))
    modules = list(model.named_modules())
    last = max((index for index, (name, _) in enumerate(modules) if f"{name}.".startswith(blocks)), default=-1)
    behind = modules[last + 1 :] if blocks else []
    first = next((index for index, (_, module) in enumerate(behind) if linear_size(module)), len(behind))
    return [name for name, module in behind[first:] if any(True for _ in module.parameters(recurse=False))]


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The head's parameters by full name."""
    return {
        f"{name}.{key}": parameter
        for name in head_modules(model)
        for key, parameter in model.get_submodule(name).named_parameters(recurse=False)
    }


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model scores the whole vocabulary at every token, as a causal language model does."""
    return output_layer(model) is not None


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that scores the vocabulary, None for a classifier."""
    find = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = find() if find is not None else None
    return found


def model_shape(model: nn.Module, labels: int | None) -> ModelShape:
    """Describe a model to the cost model; the answer is the same at every bit width, for matrices count by their shape.

    A dense parameter is one outside the adaptable weights and the head, also of a quantized model. A model that
    predicts tokens has as many logits as its vocabulary has tokens; `labels` is a classifier's.
    """
    output = output_layer(model)
    modules, head = adaptable_modules(model), head_parameters(model)
    counted = {f"{name}.weight" for name in modules} | head.keys()
    return ModelShape(
        modules=modules,
        linear_parameters=sum(shape.out_features * shape.in_features for shape in modules.values()),
        other_parameters=sum(value.numel() for name, value in model.named_parameters() if name not in counted),
        head_parameters=sum(parameter.numel() for parameter in head.values()),
        hidden_features=int(getattr(model.config, "hidden_size", 0)) if _checkpoints(model) else 0,
        output_features=(labels or 0) if output is None else output.get_parameter("weight").shape[0],
        scored_positions="example" if output is None else "token",
    )


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear map of any kind, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D":  # GPT-2's weight is (in_features, out_features)
        in_features, out_features = module.get_parameter("weight").shape
        return out_features, in_features
    return None


def bits_of(model: nn.Module) -> int:
    """Width of the matrices of a model's blocks, as bitsandbytes or their number format has it."""
    if getattr(model, "is_loaded_in_4bit", False):
        return 4
    if getattr(model, "is_loaded_in_8bit", False):
        return 8
    return 8 * next(model.parameters()).element_size()


def block_prefixes(model: nn.Module) -> list[str]:
    """Name prefixes of the repeated blocks, in order: the items of every outermost list that holds a linear map."""
    found: list[str] = []
    for name, module in model.named_modules():
        outermost = isinstance(module, nn.ModuleList) and not name.startswith(tuple(found))
        if outermost and any(linear_size(part) for part in module.modules()):
            found += [f"{name}.{index}." for index, _ in module.named_children()]
    return found


def _checkpoints(model: nn.Module) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", False))
