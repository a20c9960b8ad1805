"""What NVFlare runs at an edge."""

import nvflare.client as flare
import torch
from equal_job import train_edge


def main() -> None:
    """Serve every round."""
    flare.init()
    number = int(flare.get_site_name().split("-")[1]) - 1
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        tensors = {name.replace("/", "."): torch.as_tensor(value) for name, value in received.params.items()}
        trained = train_edge(number, received.current_round + 1, tensors)
        params = {name.replace(".", "/"): value for name, value in trained.items()}
        flare.send(flare.FLModel(params=params, metrics={"loss": 0.0}, meta={"NUM_STEPS_CURRENT_ROUND": 20}))


if __name__ == "__main__":
    main()
