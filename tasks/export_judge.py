"""Exports judged in a fresh process, as who receives them would load them; the process outlives one export.

The parent starts it before anything is written, so that its imports cost no time of their own, and sends a line of
JSON per export; each is answered by a line. Run as `python -m tasks.export_judge`; what libraries print goes to stderr.
"""

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any, Self

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from fedpipe_core.adapters import Adapter
from fedpipe_core.batches import Batch, pad_batch
from fedpipe_core.config import FederationConfig
from fedpipe_core.errors import ReleaseError
from fedpipe_core.export import EXPORT_SCHEMES, TunedModel
from fedpipe_core.export_proof import agreement, answers, measure_latency
from fedpipe_core.gguf_export import GGUF_SCHEMES
from fedpipe_core.quantized_export import QUANTIZED_SCHEMES
from fedpipe_core.result_schemas import Latency
from fedpipe_core.seeding import random_generator
from fedpipe_core.tokenizing import TokenizedExamples
from fedpipe_core.wire import decode_adapter
from tasks.coordinator import Coordinator, batches_at_once
from tasks.local_store import LocalStore
from tasks.records import RunKeys

SCHEMES = EXPORT_SCHEMES | QUANTIZED_SCHEMES | GGUF_SCHEMES
COMPARED_EXAMPLES = 512  # on which answers are compared one by one
COMPARED_BATCH = 32  # at most, so that every core has some
COMPARED_TEXTS = 128  # of a language model, each with as many answers as tokens
TIMED_EXAMPLES = 8
MADE_UP_ROWS = 128


class Verdict(BaseModel):
    """What a fresh process found; `answers` is the JSON of the export's answers on the held-out set, if any."""

    answers: str = ""
    agreement: float | None = None
    load_seconds: float = 0.0
    latency: Latency | None = None
    error: str = ""


class ExportJudge:
    """The parent's end: starts the process, asks it about one export after the other, ends it."""

    def __init__(self, config: FederationConfig, adapter: Path):
        self.setup = {"config": config.model_dump(mode="json"), "adapter": str(adapter)}

    def __enter__(self) -> Self:
        """Start the process; it begins to import at once."""
        self._log: IO[bytes] = TemporaryFile()
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tasks.export_judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._say(self.setup)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process, killing it when the release failed."""
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._log.close()

    def judge(self, scheme: str, folder: Path) -> Verdict:
        """What the process makes of an export's folder. Raises ReleaseError when the process died."""
        self._say({"scheme": scheme, "folder": str(folder)})
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            said = " ".join(self._log.read().decode(errors="replace").split())[-300:]
            raise ReleaseError(
                f"the process that judges export {scheme} ended with {self._process.wait()} ({said}); "
                "give the machine more memory, or leave that export out of release.exports"
            )
        return Verdict.model_validate_json(line)

    def _say(self, document: dict[str, Any]) -> None:
        try:
            if self._process.stdin:
                print(json.dumps(document), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # `judge` tells why it ended


@dataclass(frozen=True, eq=False)
class _Bench:
    """What every export is compared with: the base, and the unquantized merged model's answers."""

    coordinator: Coordinator
    compared: list[Batch]
    timed: Batch
    reference: Tensor


def main() -> None:
    """Answer one line per request until there is no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.readline())
    bench = _prepare(FederationConfig.model_validate(setup["config"]), Path(setup["adapter"]))
    for line in sys.stdin:
        request = json.loads(line)
        print(_judge(bench, request["scheme"], Path(request["folder"])).model_dump_json(), file=out, flush=True)


def _prepare(config: FederationConfig, adapter: Path) -> _Bench:
    coordinator = Coordinator(config, LocalStore(str(adapter.parent)), RunKeys("judged"))
    torch.set_num_threads(1)
    held_out = coordinator.held_out if config.coordinator_judges else made_up_rows(coordinator)
    by_length = sorted(range(len(held_out)), key=lambda row: len(held_out.token_ids[row]))
    middle = max(0, len(by_length) // 2 - TIMED_EXAMPLES // 2)
    most = COMPARED_TEXTS if held_out.per_token else COMPARED_EXAMPLES
    step, size = max(1, len(by_length) // most), min(config.evaluation.batch_size, COMPARED_BATCH)
    rows = by_length[::step][:most]
    compared = [pad_batch(held_out, rows[start : start + size]) for start in range(0, len(rows), size)]
    merged = coordinator.form.judged(coordinator.base.model, decode_adapter(adapter.read_bytes()))
    timed = pad_batch(held_out, by_length[middle : middle + TIMED_EXAMPLES])
    return _Bench(coordinator, compared, timed, answers(merged, compared, batches_at_once()))


def made_up_rows(coordinator: Coordinator) -> TokenizedExamples:
    """Rows of random tokens, for a coordinator without rows: answers to them can be compared, though not judged."""
    generator, longest = random_generator("made-up rows"), coordinator.config.model.max_tokens
    lengths = generator.integers(1, longest, size=MADE_UP_ROWS, endpoint=True)
    ids = [generator.integers(coordinator.base.vocabulary, size=length).tolist() for length in lengths]
    per_token = coordinator.config.model.task == "causal-lm"
    return TokenizedExamples(ids, ids if per_token else [0] * len(ids), coordinator.base.tokenizer.pad_token_id)


def _judge(bench: _Bench, scheme: str, folder: Path) -> Verdict:
    base = bench.coordinator.base
    try:
        started = time.perf_counter()
        model = SCHEMES[scheme].load(TunedModel(base, Adapter({}, {}), "fp32", None), folder)
        load_seconds = time.perf_counter() - started
        return Verdict(
            answers=bench.coordinator.judge(model).to_json() if bench.coordinator.config.coordinator_judges else "",
            agreement=agreement(answers(model, bench.compared, batches_at_once()), bench.reference),
            load_seconds=load_seconds,
            latency=measure_latency(model, _beside(base.model, model, scheme), bench.timed),
        )
    except Exception as error:  # one export that cannot be used leaves the others
        return Verdict(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _beside(base: nn.Module, model: nn.Module, scheme: str) -> nn.Module:
    """The base that an export's latency is told beside: in the merged model's number format, else as it is."""
    dtype = next(model.parameters()).dtype
    same = scheme != "merged" or dtype == next(base.parameters()).dtype
    return base if same else copy.deepcopy(base).to(dtype)


if __name__ == "__main__":
    main()
