"""The `fedpipe` command: results on stdout, progress on stderr; exit codes 0 done, 1 run failed, 2 input wrong.

Everything heavy is imported inside the commands, so that help answers at once.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpipe_core.startup import quick_imports
from flows.cli_common import AsJson, explained, print_result, showing
from flows.edge_cli import edge_app
from flows.interrupts import keep_interrupts

if TYPE_CHECKING:
    from fedpipe_core.config import FederationConfig
    from fedpipe_core.plan_schemas import SavedPlan
    from fedpipe_core.result_schemas import RunResult
    from tasks.registry import ModelVersion

app = typer.Typer(
    help="Automated federated fine-tuning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(edge_app, name="edge")

ConfigPath = Annotated[Path, typer.Argument(help="Federation config, a YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the config; repeatable")
]
StoreRoot = Annotated[str, typer.Option(help="Object store that holds the run", envvar="FEDPIPE_STORE")]
DEFAULT_STORE = ".fedpipe/store"
Version = Annotated[
    str, typer.Argument(metavar="MODEL@ALIAS", help="A registered version, such as intents@champion or intents@3")
]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow tracking URI; MLFLOW_TRACKING_URI or a file beside the store if left out")
]
MovedStore = Annotated[
    str | None, typer.Option("--store", help="Object store that holds the run, where it was moved since its release")
]

# What the command sets for the libraries under it, unless the user did.
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes would start a compiler at import
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@app.command()
def run(
    config: ConfigPath,
    name: Annotated[str | None, typer.Option("--run", help="Name of the run; from name and time if left out")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run; finished work is not repeated")] = False,
    plan: Annotated[Path | None, typer.Option("--plan", help="Use a plan kept by `fedpipe plan --save`")] = None,
    release: Annotated[bool, typer.Option(help="Export, register and perhaps promote the model at the end")] = True,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune one model on the data of all edges, and release it."""
    from fedpipe_core.errors import ConfigError

    with explained(as_json):
        loaded = _load(config, overrides)
        if resume and name is None:
            raise ConfigError("--resume needs --run NAME, the run to continue; `fedpipe status` lists the runs")
        with showing():
            result = _run_flow(loaded, name, resume, plan, release)
        print_result(result.model_dump(mode="json"), as_json, lambda document: _summary(result, loaded))


@app.command("plan")
def plan_command(
    config: ConfigPath,
    save: Annotated[
        Path | None, typer.Option("--save", help="Keep the plan in a file for `fedpipe run --plan`")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Profile every edge and print what each would do; nothing is trained."""
    with explained(as_json):
        loaded = _load(config, overrides)
        with showing():
            document, infeasible = _plan_flow(loaded, save)
        print_result(document, as_json, _plan_table)
    if infeasible:
        raise typer.Exit(2)


@app.command()
def status(
    run_name: Annotated[str | None, typer.Argument(metavar="RUN", help="Name of the run; all runs if left out")] = None,
    store: StoreRoot = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Say how far a run is, from the store alone."""
    with explained(as_json):
        from tasks.status import describe_run, list_runs

        document = describe_run(store, run_name) if run_name else {"store": store, "runs": list_runs(store)}
        print_result(document, as_json, lambda found: json.dumps(found, indent=2))


@app.command()
def report(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, finished or not")],
    store: StoreRoot = DEFAULT_STORE,
    out: Annotated[Path | None, typer.Option(help="Page to write; RUN.html if left out", dir_okay=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's report: one HTML page that opens from disk without a network."""
    with explained(as_json):
        from tasks.report import write_report

        path = write_report(store, run_name, out or Path(f"{run_name}.html"))
        print_result({"run": run_name, "report": str(path)}, as_json, lambda document: str(path))


@app.command()
def release(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run whose rounds are done")],
    store: StoreRoot = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Export, register and perhaps promote the model of a run whose rounds are done."""
    with explained(as_json), showing():
        with _api_starting():
            from flows.release import release_model

        report = release_model(run_name, store)
        print_result(
            report.model_dump(mode="json") if report else {}, as_json, lambda found: json.dumps(found, indent=2)
        )


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="Registered model")],
    tracking_uri: TrackingUri = None,
    store: StoreRoot = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Make the version that the champion replaced champion again."""
    with explained(as_json):
        from fedpipe_core.config import TrackingSpec
        from tasks import registry, tracking

        restored = registry.rollback(tracking.tracking_uri(TrackingSpec(uri=tracking_uri), store), model)
        document = {"model": restored.name, "version": restored.version, "alias": registry.CHAMPION}
        print_result(document, as_json, lambda found: f"{restored.name} version {restored.version} is champion again")


@app.command()
def lineage(
    version: Version, tracking_uri: TrackingUri = None, store: MovedStore = None, as_json: AsJson = False
) -> None:
    """Tell where a registered model comes from: config, code, base, data fingerprints, every update by its hash."""
    with explained(as_json):
        from flows.lineage_text import lineage_text
        from tasks.lineage import read_lineage

        found = read_lineage(_registered(version, tracking_uri, store), store)
        print_result(found.model_dump(mode="json"), as_json, lambda document: lineage_text(found))


@app.command()
def verify(
    version: Version,
    tracking_uri: TrackingUri = None,
    store: MovedStore = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Look at this many of the last rounds only")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute a registered model's adapter again from the stored updates, and compare every hash on the way."""
    with explained(as_json):
        from flows.lineage_text import verification_text
        from tasks.verification import verify_version

        found = verify_version(_registered(version, tracking_uri, store), store, rounds)
        print_result(found.model_dump(mode="json"), as_json, lambda document: verification_text(found))
    if not found.verified:
        raise typer.Exit(1)


@app.command()
def schema(
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print a commented config with every key instead")] = False,
) -> None:
    """Print the JSON Schema of the config."""
    from fedpipe_core.config import FederationConfig
    from fedpipe_core.reference import render_reference

    text = render_reference() if as_yaml else json.dumps(FederationConfig.model_json_schema(), indent=2) + "\n"
    print(text, end="")


def main() -> None:
    """Entry point of the `fedpipe` command."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if home := os.environ.get("PREFECT_HOME"):
        Path(home).mkdir(parents=True, exist_ok=True)  # Prefect makes the folder itself, but not those above it
    _keep_stdout_for_results()
    keep_interrupts()
    app()


def _keep_stdout_for_results() -> None:
    """Send what libraries below Python print, as the solver does at times, to stderr."""
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(results, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def _load(path: Path, overrides: list[str] | None) -> "FederationConfig":
    from fedpipe_core.config_file import load_config

    return load_config(path, overrides)


def _load_base(config: "FederationConfig") -> None:
    """Load the base into this process's cache, where the flow finds it."""
    from tasks.edge import dense_base

    dense_base(config)


@contextmanager
def _api_starting() -> Iterator[None]:
    """Start Prefect's own API, if no server is configured, while the block imports torch; wait for it at the end."""
    from flows.local_api import start_api
    from tasks import progress

    with progress.working("coordinator", "start Prefect and load the base"):
        wait = start_api()
        yield
        wait()


def _run_flow(
    config: "FederationConfig", name: str | None, resume: bool, plan: Path | None, release: bool
) -> "RunResult":
    with _api_starting():
        from flows.federation import federated_finetune

        if not config.remote_edges:  # else the flow calls the edges first, and loads while they do
            with quick_imports():
                import flows.pipeline  # noqa: F401
            _load_base(config)

    saved = None if plan is None else _read_saved_plan(plan)
    return federated_finetune(config, name, resume, saved, release)


def _read_saved_plan(path: Path) -> "SavedPlan":
    from flows.planning import read_saved_plan

    return read_saved_plan(path)


def _plan_flow(config: "FederationConfig", save: Path | None) -> tuple[dict[str, Any], bool]:
    with _api_starting():
        from flows.planning import plan_federation

        _load_base(config)
    return plan_federation(config, None if save is None else str(save))


def _registered(version: str, uri: str | None, store: str | None) -> "ModelVersion":
    from fedpipe_core.config import TrackingSpec
    from tasks import registry, tracking

    root = store or os.environ.get("FEDPIPE_STORE", DEFAULT_STORE)
    return registry.find_version(tracking.tracking_uri(TrackingSpec(uri=uri), root), version)


def _plan_table(document: dict[str, Any]) -> str:
    from flows.tables import plan_table

    return plan_table(document)


def _summary(result: "RunResult", config: "FederationConfig") -> str:
    from fedpipe_core.methods import METHODS
    from flows.tables import result_summary

    return result_summary(result, METHODS[config.method].unreleased)
