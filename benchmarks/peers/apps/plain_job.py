"""The equal job as a plain loop: one process, one thread, edge after edge; the floor of what a framework can take."""

import os

from equal_job import held_out_loss, initial_tensors, mark, train_edge
from safetensors.torch import save_file

EDGES, ROUNDS = int(os.environ["EQUAL_JOB_EDGES"]), int(os.environ["EQUAL_JOB_ROUNDS"])


def main() -> None:
    """Train, average, evaluate."""
    tensors = initial_tensors()
    mark("evaluated", round=0, loss=held_out_loss(tensors))
    for round_index in range(1, ROUNDS + 1):
        updates = [train_edge(number, round_index, tensors) for number in range(EDGES)]
        tensors = {name: sum(update[name] for update in updates) / EDGES for name in tensors}
        mark("evaluated", round=round_index, loss=held_out_loss(tensors))
    save_file(tensors, os.environ["EQUAL_JOB_RESULT"])


if __name__ == "__main__":
    main()
