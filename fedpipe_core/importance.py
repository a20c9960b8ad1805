"""Which weights are worth tuning: a falling list of scores per module, one for each further rank.

Every method returns scores that sum to 1 over an edge, since losses and bit widths differ between edges. How scores of
several edges are combined, and what they buy, is `planning`'s to decide.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe_core.architecture import adaptable_modules, head_parameters, linear_size
from fedpipe_core.config import PlanningSpec
from fedpipe_core.edge_model import move_batch, own_head
from fedpipe_core.errors import RunError
from fedpipe_core.losses import training_loss
from fedpipe_core.model import share
from fedpipe_core.seeding import derive_seed, random_generator

Scores = dict[str, list[float]]
Batches = Iterator[Mapping[str, Tensor]]

SMOOTHING = 0.85  # beta1 and beta2 of AdaLoRA
PROBE_RATE = 1e-3
PROBE_HEAD_RATE = 1e-2


def score_modules(base: nn.Module, batches: Batches, spec: PlanningSpec, seed: int) -> Scores:
    """Score every adaptable module by the configured method, on batches of the edge's own data.

    Returns, per module, `probe_rank` scores in falling order; all of them sum to 1, and are equal when none is above 0.

    Raises RunError when a score is no finite number.
    """
    scores = IMPORTANCE_METHODS[spec.importance](base, batches, spec.probe_rank, seed)
    return _normalised(scores)


def adalora_scores(base: nn.Module, batches: Batches, rank: int, seed: int) -> Scores:
    """Sensitivity times uncertainty of each triplet of P·Λ·Q (AdaLoRA, arXiv 2303.10512, section 3.2).

    Per scalar w, I = |w·∂L/∂w|; Ī and U are moving averages of I and |I - Ī| with bias correction; s = Ī·U. Triplet i
    scores S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij). Λ starts at zero, so all of it rests on a short training run
    over `batches`, in which the head trains too.
    """
    model, layers = _with_svd_adapters(base, rank, seed)
    head = list(head_parameters(model).values())
    trained = [part["default"] for layer in layers.values() for part in (layer.lora_E, layer.lora_B, layer.lora_A)]
    _require_grad(model, [*trained, *head])
    groups = [{"params": trained, "lr": PROBE_RATE}, {"params": head, "lr": PROBE_HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    averages = [_Average() for _ in trained]
    for batch in batches:
        training_loss(model, move_batch(batch, model)).backward()  # type: ignore[no-untyped-call]
        for average, parameter in zip(averages, trained, strict=True):
            average.update((parameter.detach() * parameter.grad).abs())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    values = iter(averages)
    return {name: _triplet_scores(next(values), next(values), next(values)) for name in layers}


def gradient_spectrum_scores(base: nn.Module, batches: Batches, rank: int, seed: int) -> Scores:
    """Singular values of each frozen weight's mean gradient G: to first order, what a change of norm 1 along i gains.

    Plain gradient descent would gain σ_i²; steps of AdamW are as large in a direction of small gradients.
    G (out, in) is never stored: two sketches Y = G·Ω and Z = Ψ·G of width 2·rank are summed over the batches, and
    G ≈ Y (ΨY)⁺ Z (single-pass range finder, Tropp et al., arXiv 1609.00048, algorithm 4).
    """
    model = share(base)
    own_head(model)
    head = list(head_parameters(model).values())
    _require_grad(model, head)
    model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_(True))  # type: ignore[operator]
    sketches = {
        name: _GradientSketch.of(model.get_submodule(name), 2 * rank, derive_seed(seed, name))
        for name in adaptable_modules(model)
    }
    optimizer = torch.optim.AdamW(head, lr=PROBE_HEAD_RATE, weight_decay=0.0) if head else None
    for batch in batches:
        training_loss(model, move_batch(batch, model)).backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {name: sketch.singular_values(rank) for name, sketch in sketches.items()}


def uniform_scores(base: nn.Module, batches: Batches, rank: int, seed: int) -> Scores:
    """The same for every module and rank: a control without any knowledge."""
    return {name: [1.0] * rank for name in adaptable_modules(base)}


def random_scores(base: nn.Module, batches: Batches, rank: int, seed: int) -> Scores:
    """A random value per module, the same on every edge of one seed: a control."""
    return {
        name: [float(random_generator("importance", seed, name).random())] * rank for name in adaptable_modules(base)
    }


def last_layers_scores(base: nn.Module, batches: Batches, rank: int, seed: int) -> Scores:
    """Each block counts ten times the one before it, so the planner fills the last blocks first: a control."""
    return {name: [10.0**shape.layer] * rank for name, shape in adaptable_modules(base).items()}


IMPORTANCE_METHODS: dict[str, Callable[[nn.Module, Batches, int, int], Scores]] = {
    "adalora": adalora_scores,
    "gradient_spectrum": gradient_spectrum_scores,
    "uniform": uniform_scores,
    "random": random_scores,
    "last_layers": last_layers_scores,
}


@dataclass
class _Average:
    """Moving averages of a sensitivity and of its deviation, with bias correction."""

    steps: int = 0
    sensitivity: Tensor = field(default_factory=lambda: torch.zeros(()))
    deviation: Tensor = field(default_factory=lambda: torch.zeros(()))

    def update(self, value: Tensor) -> None:
        self.steps += 1
        self.sensitivity = SMOOTHING * self.sensitivity + (1 - SMOOTHING) * value
        distance = (value - self._corrected(self.sensitivity)).abs()
        self.deviation = SMOOTHING * self.deviation + (1 - SMOOTHING) * distance

    def score(self) -> Tensor:
        return self._corrected(self.sensitivity) * self._corrected(self.deviation)

    def _corrected(self, average: Tensor) -> Tensor:
        return average / (1 - SMOOTHING**self.steps)


def _triplet_scores(diagonal: _Average, left: _Average, right: _Average) -> list[float]:
    """Λ is (rank, 1), P (out, rank), Q (rank, in); one score per triplet, falling."""
    scores = diagonal.score()[:, 0] + left.score().mean(dim=0) + right.score().mean(dim=1)
    return [float(score) for score in scores.sort(descending=True).values]


@dataclass
class _GradientSketch:
    """Sums of G·Ω and Ψ·G of one module, fed by hooks: the forward pass leaves x, the backward pass brings ∂L/∂y."""

    omega: Tensor  # (in, width)
    psi: Tensor  # (2·width, out)
    right: Tensor  # Y = G·Ω, (out, width)
    left: Tensor  # Z = Ψ·G, (2·width, in)
    inputs: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, width: int, seed: int) -> "_GradientSketch":
        out_features, in_features = linear_size(module) or (0, 0)
        generator = torch.Generator().manual_seed(seed)
        # The default dtype is the process's, and another edge's thread may be loading a model of half precision.
        device = next(module.parameters()).device
        omega = torch.randn(in_features, width, generator=generator, dtype=torch.float32).to(device)
        psi = torch.randn(2 * width, out_features, generator=generator, dtype=torch.float32).to(device)
        right = torch.zeros(out_features, width, device=device, dtype=torch.float32)
        left = torch.zeros(2 * width, in_features, device=device, dtype=torch.float32)
        sketch = cls(omega, psi, right, left)
        module.register_forward_pre_hook(sketch.remember)
        module.register_full_backward_hook(sketch.add)
        return sketch

    def remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs[0].detach().flatten(0, -2).float()

    def add(self, module: nn.Module, grad_inputs: object, grad_outputs: tuple[Tensor, ...]) -> None:
        outputs = grad_outputs[0].flatten(0, -2).float()  # (tokens, out); G = outputsᵀ · inputs
        if self.inputs is not None:
            self.right += outputs.T @ (self.inputs @ self.omega)
            self.left += (self.psi @ outputs.T) @ self.inputs
        self.inputs = None

    def singular_values(self, rank: int) -> list[float]:
        basis, _ = torch.linalg.qr(self.right)
        columns, triangle = torch.linalg.qr(self.psi @ basis)
        # (ΨQ)⁺ Z by its QR: `lstsq` answers the same question with other last bits every time.
        core = torch.linalg.solve_triangular(triangle, columns.T @ self.left, upper=True)
        values = torch.linalg.svdvals(core)[:rank]
        return [float(value) for value in values]


def _with_svd_adapters(base: nn.Module, rank: int, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    from peft import AdaLoraConfig, AdaLoraModel

    names = list(adaptable_modules(base))
    model = share(base)
    own_head(model)
    config = AdaLoraConfig(
        init_r=rank, target_r=rank, total_step=2, target_modules=names, lora_alpha=rank, lora_dropout=0.0
    )
    AdaLoraModel(model, config, "default")
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        _draw_small(layer, derive_seed(seed, name))
    return model, layers


def _draw_small(layer: Any, seed: int) -> None:
    """Draw P and Q from a seed of the module's own; Λ stays zero."""
    generator = torch.Generator().manual_seed(seed)
    for factor in (layer.lora_A, layer.lora_B):
        parameter = factor["default"]
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.02)


def _require_grad(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def _normalised(scores: Scores) -> Scores:
    total = sum(sum(values) for values in scores.values())
    if not math.isfinite(total):
        raise RunError(
            f"importance scores sum to {total}, so training on this edge's data diverged; "
            "check the data, or set planning.importance to uniform"
        )
    if total <= 0:
        count = sum(len(values) for values in scores.values())
        return {name: [1.0 / count] * len(values) for name, values in scores.items()}
    return {name: sorted((value / total for value in values), reverse=True) for name, values in scores.items()}
