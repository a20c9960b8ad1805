"""The adapter as the module that NVFlare's server keeps: a state dict of factors and nothing else."""

from equal_job import initial_tensors
from torch import nn


class Adapter(nn.Module):
    """Parameters named after the factors, with `/` where a parameter's name may hold no dot."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in initial_tensors().items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value))
