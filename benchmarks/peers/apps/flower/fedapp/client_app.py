"""What Flower runs at an edge."""

from equal_job import train_edge
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One edge's steps of one round."""
    number, round_index = context.node_config["partition-id"], message.content["config"]["server-round"]
    tensors = train_edge(int(number), int(round_index), message.content["arrays"].to_torch_state_dict())
    content = {"arrays": ArrayRecord(tensors), "metrics": MetricRecord({"num-examples": 256})}
    return Message(content=RecordDict(content), reply_to=message)
