"""An edge's other turn: what a global adapter is worth on the edge's own rows, beside the base that the edge holds.

Every adapter is judged before it is trained on, and the last one although nobody trains on it. What is published are
metrics and counts; that the answer is there means that the turn is done.
"""

import hashlib
import math
import time
from dataclasses import replace

import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from fedpipe_core.adapters import Adapter, split_for_edge
from fedpipe_core.edge_model import load_adapter
from fedpipe_core.errors import DataError, UpdateRefusedError
from fedpipe_core.evaluation import metrics_of, predict, share_of
from fedpipe_core.evaluation_schemas import EdgeEvaluation, EvaluationRecord
from fedpipe_core.methods import METHODS
from fedpipe_core.predictions import Answers
from fedpipe_core.schemas import FailureRecord
from fedpipe_core.tokenizing import TokenizedExamples
from tasks import progress
from tasks.bases import shared_base
from tasks.edge import read_global, reason_of
from tasks.edge_models import ModelDesign, lent_model
from tasks.edge_session import EdgeSession
from tasks.records import offer_record, put_record


@task(task_run_name="round {round_index} judge at {session.edge_id}", cache_policy=NO_CACHE)
def judge(session: EdgeSession, round_index: int) -> None:
    """Judge what a round starts from and publish the answer; publish the reason instead when the edge cannot.

    An answer that is in the store is left as it is, and once the judging is closed nobody judges any more.
    """
    keys, edge_id = session.keys, session.edge_id
    if any(map(session.store.exists, (keys.evaluation(round_index, edge_id), keys.judged(round_index)))):
        return
    try:
        found = _judge(session, round_index)
        put_record(session.store, keys.evaluation(round_index, edge_id), found, session.machine.signing_key)
    except Exception as error:
        reason = reason_of(error)
        get_run_logger().warning("%s: round %d not judged: %s", edge_id, round_index, reason, exc_info=True)
        failure = FailureRecord(run=keys.run, round=round_index, edge_id=edge_id, reason=reason)
        offer_record(session.store, keys.evaluation_failure(round_index, edge_id), failure)
        progress.note(f"{edge_id} does not judge what round {round_index} starts from: {reason}")


def _judge(session: EdgeSession, round_index: int) -> EvaluationRecord:
    torch.set_num_threads(session.machine.threads)
    config, started = session.config, time.perf_counter()
    record, adapter = read_global(session.store, session.keys, round_index, config.coordinator_signs)
    whole = config.judges_whole(round_index)
    rows, writing = _rows(session, whole), session.writing if whole else None
    design = judging_design(session, adapter)
    with lent_model(design) as model, progress.working(session.edge_id, "judge"):
        # What is not trained lies in the tail: together they are the global adapter, under every rule.
        load_adapter(model, *split_for_edge(adapter, design.spec.ranks, config.seed))
        answers = predict(model.model, rows, config.evaluation.batch_size, writing=writing)
    return EvaluationRecord(
        run=session.keys.run,
        round=round_index,
        edge_id=session.edge_id,
        base_sha256=shared_base(config, session.plan.base_bits).sha256,
        global_sha256=record.adapter.sha256,
        evaluation=_evaluation(session, answers, len(rows)),
        seconds=time.perf_counter() - started,
    )


def judging_design(session: EdgeSession, adapter: Adapter) -> ModelDesign:
    """The instance that holds all of a global adapter: the one the edge trains in, wherever that one does."""
    own, method = session.design, METHODS[session.config.method]
    if method.trials:  # whose sizes change, the last time after the last plan
        return replace(own, spec=replace(own.spec, ranks={name: rank for name, rank in adapter.ranks.items() if rank}))
    if method.form != "lora":
        return own
    room = max(own.spec.tail_cap, session.config.aggregation.rank_cap)
    return replace(own, spec=replace(own.spec, tail_cap=room))


def _rows(session: EdgeSession, whole: bool) -> TokenizedExamples:
    """The edge's rows that judge, or the configured share of them. Raises DataError where there are none."""
    rows = session.data.validation
    if not len(rows):
        raise DataError(
            f"{session.edge_id} keeps no row to judge on, of {len(session.data.train)}; give it more rows, or raise "
            "data.validation_fraction"
        )
    return rows if whole else share_of(rows, session.config)


def _evaluation(session: EdgeSession, answers: Answers, rows: int) -> EdgeEvaluation:
    """Raises UpdateRefusedError when the loss is no finite number; a perplexity that is none is left out."""
    found = {name: value for name, value in metrics_of(answers).items() if math.isfinite(value)}
    if "loss" not in found:
        raise UpdateRefusedError(f"the loss on {rows} rows of {session.edge_id} is no finite number")
    salted = f"{session.config.name}/{session.edge_id}/{answers.evaluation_sha256}"
    return EdgeEvaluation(
        rows=rows,
        rows_sha256=hashlib.sha256(salted.encode()).hexdigest(),
        metrics=found,
        counted={name: answers.weight_of(name) for name in found},
    )
