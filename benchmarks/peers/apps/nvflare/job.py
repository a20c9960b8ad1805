"""The equal job for NVFlare: `python job.py simulator|poc WORKSPACE`, in this folder."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from equal_job import mark
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import PocEnv, SimEnv
from safetensors.torch import save_file

EDGES, ROUNDS = int(os.environ["EQUAL_JOB_EDGES"]), int(os.environ["EQUAL_JOB_ROUNDS"])


class MarkedPocEnv(PocEnv):
    """NVFlare's own environment, which notes when its services are up, and when the job's result is at hand."""

    def _get_session_manager(self) -> Any:
        if self._session_manager is None:
            mark("ready")
        return super()._get_session_manager()

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str | None:
        result = super().get_job_result(job_id, timeout)
        mark("done")
        return result


def main() -> None:
    """Run the job, and keep the adapter."""
    mode, workspace = sys.argv[1:]
    recipe = FedAvgRecipe(
        name="lora",
        model={"class_path": "model.Adapter", "args": {}},
        min_clients=EDGES,
        num_rounds=ROUNDS,
        train_script="client.py",
        server_expected_format=ExchangeFormat.PYTORCH,
        key_metric="",
    )
    recipe.add_server_file("model.py")
    recipe.add_client_file("model.py")
    if mode == "simulator":
        environment: Any = SimEnv(num_clients=EDGES, num_threads=EDGES, workspace_root=workspace)
    else:
        environment = MarkedPocEnv(num_clients=EDGES)
    run = recipe.execute(environment)
    result = Path(run.get_result(clean_up=False))
    (found,) = result.rglob("FL_global_model.pt")
    model = torch.load(found, weights_only=False)["model"]
    save_file({name.replace("/", "."): torch.as_tensor(v) for name, v in model.items()}, os.environ["EQUAL_JOB_RESULT"])


if __name__ == "__main__":
    main()
