"""FedPipe's planner with one decision taken away at a time, and uniform federated LoRA, as dotted config keys."""

from typing import Any

FEDPIPE, FEDLORA = "fedpipe", "fedlora"
UNIFORM = {"method": "fedlora", "aggregation.rule": "fedavg", "planning.importance": "uniform"}
# The shortest profile whose scores agree with a long one's (40 steps of 16 rows): correlation over modules 0.92 and up.
SPECTRUM = {"planning.importance": "gradient_spectrum", "planning.profile_steps": 3, "planning.profile_batch_size": 2}
ADALORA = {"planning.importance": "adalora", "planning.profile_steps": 20, "planning.profile_batch_size": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    FEDPIPE: SPECTRUM,
    FEDLORA: UNIFORM,
    "adalora importance": ADALORA,
    "random weights": {"planning.importance": "random"},
    "last layers": {"planning.importance": "last_layers"},
    "uniform importance": {"planning.importance": "uniform"},
    "parameters for nothing": {**SPECTRUM, "planning.parameter_price": 0.0},
    "one rank": {**SPECTRUM, "planning.ranks": [8]},
    "one batch size": {**SPECTRUM, "planning.batch_sizes": [16]},
    "32-bit bases only": {**SPECTRUM, "model.bits": [32]},
}
