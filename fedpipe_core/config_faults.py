"""What of a federation's config does not go together, told all at once."""

from typing import TYPE_CHECKING

from fedpipe_core.config_methods import method_faults

if TYPE_CHECKING:
    from fedpipe_core.config import FederationConfig


def config_faults(config: "FederationConfig") -> list[str]:
    """A sentence for everything that contradicts another part of the config."""
    return [
        *_edge_faults(config),
        *_partition_faults(config),
        *_rule_faults(config),
        *_task_faults(config),
        *_evaluation_faults(config),
        *_signing_faults(config),
        *method_faults(config),
    ]


def _edge_faults(config: "FederationConfig") -> list[str]:
    ids = [edge.edge_id for edge in config.edges]
    faults = [
        f"edge_id {edge_id!r} is used {ids.count(edge_id)} times"
        for edge_id in sorted({i for i in ids if ids.count(i) > 1})
    ]
    if config.min_edges > len(ids):
        faults.append(f"min_edges is {config.min_edges} but only {len(ids)} edges are listed")
    if config.local_edges and not config.data.train:
        faults.append(f"data.train is missing, the rows of edge {config.local_edges[0].edge_id!r}; name the file")
    faults += [
        f"edge {edge.edge_id!r} names work_queue {edge.work_queue!r} but no work_pool; name the pool it belongs to"
        for edge in config.local_edges
        if edge.work_queue is not None
    ]
    return faults


def _signing_faults(config: "FederationConfig") -> list[str]:
    mode, faults = config.signing.mode, []
    if mode is None and config.remote_edges:
        faults.append(
            "signing.mode is missing, which edges with a work_pool need: `required`, or `off` to trust everyone who "
            "can write to the store"
        )
    if mode == "required" and config.signing.coordinator_key is None:
        faults.append("signing.coordinator_key is missing; `fedpipe edge keygen FILE` makes one and prints it")
    if mode == "required":
        faults += [
            f"edge {edge.edge_id!r} has no public_key to check its signatures with; have it run `fedpipe edge keygen`"
            for edge in config.remote_edges
            if edge.public_key is None
        ]
    return faults


def _partition_faults(config: "FederationConfig") -> list[str]:
    partition, faults = config.data.partition, []
    if partition is None and len(config.local_edges) > 1 and "{edge_id}" not in config.data.train:
        faults.append("data.train is one file for all edges: add data.partition, or put {edge_id} in the path")
    by_column = partition is not None and partition.by == "column"
    for edge in config.local_edges:
        if by_column and not edge.values:
            faults.append(f"edge {edge.edge_id!r} names no `values` of the partition column")
        if edge.values and not by_column:
            faults.append(f"edge {edge.edge_id!r} names `values` but data.partition is not `by: column`")
    return faults


def _rule_faults(config: "FederationConfig") -> list[str]:
    rule = config.aggregation.rule
    if config.exchange.energy < 1 and rule not in ("delta_svd", "flexlora", "flora_stack"):
        return [
            f"exchange.energy below 1 sends directions of the change, which rule {rule} cannot combine; set it to 1"
        ]
    return []


def _task_faults(config: "FederationConfig") -> list[str]:
    classifies, data = config.model.task == "sequence-classification", config.data
    faults = []
    if classifies != (data.format == "label"):
        needed = "label" if classifies else "completion, messages, instruction or text"
        faults.append(f"data.format is {data.format}, but model.task {config.model.task} reads rows of format {needed}")
    if data.format == "text" and config.evaluation.generate is not None:
        faults.append("evaluation.generate needs prompts, which data.format text has not")
    if classifies and data.labels is None:
        faults.append("data.labels, the number of labels, is missing")
    if classifies and config.training.packing:
        faults.append("training.packing is for model.task causal-lm; a classifier reads one text per row")
    gguf = [scheme for scheme in config.release.exports if scheme.startswith("gguf")]
    if classifies and gguf:
        faults.append(f"release.exports has {gguf[0]}, which holds language models alone; name int8 or nf4 instead")
    metrics = _metrics(config)
    if config.release.metric not in (None, *metrics):
        faults.append(f"release.metric is {config.release.metric}, which is not measured: {', '.join(metrics)} are")
    return faults


def _evaluation_faults(config: "FederationConfig") -> list[str]:
    at, data, faults = config.evaluation.at, config.data, []
    if at in ("coordinator", "both") and not data.test:
        faults.append(
            f"evaluation.at is {at}, but data.test, the coordinator's rows, is missing; name the file, or say `edges`"
        )
    if at == "edges" and data.test:
        faults.append(
            "evaluation.at is edges, but data.test names rows at the coordinator, which nobody would judge on; leave "
            "it out, or say `both`"
        )
    if config.edges_judge and not data.validation_fraction and not data.validation:
        faults.append(
            "the edges judge on their validation rows, of which data.validation_fraction 0 keeps none; raise it, or "
            "name data.validation"
        )
    columns = {
        "data.label_name_column": data.label_name_column,
        "release.slice_column": config.release.slice_column,
    }
    faults += [
        f"{key} is a column of data.test, which is missing; leave it out, or name data.test"
        for key, column in columns.items()
        if column and not data.test
    ]
    return faults


def _metrics(config: "FederationConfig") -> tuple[str, ...]:
    """What is measured on the held-out set."""
    if config.model.task == "sequence-classification":
        return ("accuracy", "macro_f1", "loss")
    written = config.evaluation.generate.metrics if config.evaluation.generate else ()
    return ("loss", "perplexity", "token_accuracy", *written)
