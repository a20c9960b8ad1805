"""What Flower runs at the server: FedAvg over four edges, and the same evaluation as everyone's."""

import os

from equal_job import held_out_loss, initial_tensors, mark
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

EDGES = int(os.environ["EQUAL_JOB_EDGES"])
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=EDGES, min_available_nodes=EDGES)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(initial_tensors()),
        num_rounds=int(context.run_config["num-rounds"]),
        evaluate_fn=_evaluate,
    )


def _evaluate(round_index: int, arrays: ArrayRecord) -> MetricRecord:
    tensors = dict(arrays.to_torch_state_dict())
    loss = held_out_loss(tensors)
    mark("evaluated", round=round_index, loss=loss)
    save_file(tensors, os.environ["EQUAL_JOB_RESULT"])
    return MetricRecord({"loss": loss})
