"""What `make evidence` runs is what the code accepts today."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TASKS = sorted(path.stem for path in (BENCHMARKS / "evidence_tasks").glob("*.yaml"))


@pytest.mark.parametrize("name", TASKS)
def test_every_case_of_a_task_is_a_config_that_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence_cases import ABLATIONS, METHODS, SETTINGS, Case, make_config, read_task

    task = read_task(name)
    names = set()
    for setting in SETTINGS:
        for partition in task.partitions:
            for method in [*METHODS, *ABLATIONS]:
                case = Case(setting, partition, method, task.rates[0])
                config = make_config(task, case)
                assert len(config.edges) == 5
                assert config.planning.unfit_edges == "drop"
                names.add(case.name)
    assert len(names) == len(SETTINGS) * len(task.partitions) * (len(METHODS) + len(ABLATIONS))
    assert len(make_config(task, Case("heterogeneous", "iid", "fedpipe", 0.001, edges=20)).edges) == 20


def test_the_task_that_the_page_shows_is_one_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence_cases import ABLATIONS, METHODS, SETTINGS, Case, make_config, read_task
    from evidence_page import PAGE

    shown = re.search(r"```yaml\n(# mine\.yaml\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown
    (tmp_path / "mine.yaml").write_text(shown[1], encoding="utf-8")
    (tmp_path / "examples").symlink_to(BENCHMARKS.parent / "examples")
    task = read_task(str(tmp_path / "mine.yaml"))
    for setting in SETTINGS:
        for partition in task.partitions:
            for method in [*METHODS, *ABLATIONS]:
                assert len(make_config(task, Case(setting, partition, method, task.rates[0])).edges) == 5


def test_equal_edges_get_a_quarter_of_the_time_but_not_where_the_target_comes_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence_cases import Case, make_config, read_task

    task = read_task("snips")
    assert [task.budget(name) for name in ("homogeneous", "heterogeneous", "reference")] == [15.0, 60.0, 60.0]
    equal, reference = (make_config(task, Case(name, "iid", "full", 0.001)) for name in ("homogeneous", "reference"))
    assert equal.edges == reference.edges


def test_a_task_without_the_partition_that_chooses_rates_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence_cases import read_task

    mine = tmp_path / "mine.yaml"
    mine.write_text("partitions:\n  iid: { by: iid }\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml: partitions lacks `domain`"):
        read_task(str(mine))


def test_a_target_is_a_share_of_what_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence_cases import read_task

    accuracy, loss = read_task("clinc150"), read_task("e2e")
    assert accuracy.target(0.9) == pytest.approx(0.855)
    assert accuracy.reached(0.86, 0.855)
    assert loss.target(1.9) == pytest.approx(2.0)
    assert loss.reached(1.99, 2.0)
    assert not loss.reached(2.01, 2.0)


def test_a_value_is_reached_when_every_seed_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence_cases import Case, read_task
    from evidence_rows import Bench
    from federations import Results

    kept = json.loads((BENCHMARKS / "results" / "evidence-snips.json").read_text(encoding="utf-8"))
    case = Case("heterogeneous", "iid", "fedlora", 0.004)
    runs = [kept[case.name], kept[case.name]]
    monkeypatch.setattr(Bench, "run", lambda _, case: runs[case.seed])
    bench = Bench(read_task("snips"), Results(None))
    last, uniform = runs[0]["rounds"][-1], bench.worst_end(case, 2)
    assert uniform == last["accuracy"]
    row = bench.row("here", case, 2, uniform, uniform)
    assert row.seconds_to_target == row.seconds_to_uniform <= last["clock"]
    runs[1] = {**runs[1], "rounds": [{**found, "accuracy": 0.1} for found in runs[1]["rounds"]]}
    assert bench.worst_end(case, 2) == 0.1
    row = bench.row("here", case, 2, uniform, bench.worst_end(case, 2))
    assert (row.seconds_to_target, row.mib_to_target) == (None, None)
    assert row.seconds_to_uniform == runs[0]["rounds"][0]["clock"]


def test_the_overview_tells_a_lead_over_who_never_reached_the_target_as_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from dataclasses import replace

    from evidence_cases import METHODS, Case, read_task
    from evidence_rows import Bench
    from evidence_table import overview
    from federations import Results

    task = read_task("clinc150")
    kept = json.loads((BENCHMARKS / "results" / "evidence-clinc150.json").read_text(encoding="utf-8"))
    run = kept[Case("heterogeneous", "domain", "fedlora", 0.004).name]
    monkeypatch.setattr(Bench, "run", lambda _, case: run)
    row = Bench(task, Results(None)).row("here", Case("heterogeneous", "domain", "fedpipe", 0.002), 1, None)

    def lead(ours: float | None, uniform: float | None) -> str:
        seconds = {"fedpipe": ours, "fedlora": uniform}
        rows = [replace(row, method=m, seconds_to_target=seconds.get(m)) for m in METHODS]
        verdicts = [{"name": "here: a", "ok": True}, {"name": "here: b", "ok": False}, {"name": "there: a", "ok": True}]
        cells = [cell.strip() for cell in overview([(task, rows, verdicts)]).splitlines()[-1].split("|")]
        assert cells[-2] == "1 of 2"
        return cells[7]

    assert [lead(10.0, 20.0), lead(10.0, None), lead(None, 40.0), lead(None, None)] == ["2.0", "≥ 8.0", "≤ 0.5", ""]


def test_a_control_that_ends_better_in_every_seed_is_a_miss_whichever_way_the_metric_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from dataclasses import replace

    from evidence_cases import Case, read_task
    from evidence_checks import importance_checks
    from evidence_rows import Bench
    from federations import Results

    kept = json.loads((BENCHMARKS / "results" / "evidence-clinc150.json").read_text(encoding="utf-8"))
    run = kept[Case("heterogeneous", "domain", "fedlora", 0.004).name]
    monkeypatch.setattr(Bench, "run", lambda _, case: run)
    accuracy, loss = read_task("clinc150"), read_task("e2e")
    row = Bench(accuracy, Results(None)).row("here", Case("heterogeneous", "domain", "fedpipe", 0.002), 1, None)

    def held(task: Any, ours: tuple[float, float], control: tuple[float, float]) -> bool:
        """Each as (worst, best)."""
        rows = [replace(row, method=m, worst=w, best=b) for m, (w, b) in {"fedpipe": ours, "control": control}.items()]
        verdict = importance_checks(task, rows)[-1]
        assert verdict["name"] == "our best end less that of control at worst"
        return bool(verdict["ok"])

    assert [held(accuracy, (0.90, 0.92), control) for control in ((0.93, 0.95), (0.91, 0.95))] == [False, True]
    assert [held(loss, (1.50, 1.40), control) for control in ((1.39, 1.30), (1.45, 1.30))] == [False, True]


def test_the_page_shows_what_the_kept_runs_come_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence_page import PAGE, made_anew

    page = PAGE.read_text(encoding="utf-8")
    assert made_anew(page, tmp_path) == page
    drawn = {picture.name for picture in tmp_path.iterdir()}
    assert drawn
    assert all(f"images/{name}" in page and (PAGE.parent / "images" / name).is_file() for name in drawn)


def test_a_page_never_runs_what_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence import parse, sections

    with pytest.raises(LookupError, match="was not run with the config"):
        list(sections(parse(["--reduced", "--results", str(tmp_path)]), kept_only=True))
    assert not list(tmp_path.iterdir())
