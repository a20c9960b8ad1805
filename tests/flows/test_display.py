import io
import sys

import pytest
from rich.console import Console

from flows.display import LiveBars, PlainLines
from tasks import progress


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def shown(console: Console) -> str:
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_plain_lines_tell_finished_steps_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.listening(PlainLines()):
        with progress.working("east", "train round 1", 40) as advance:
            advance()
        progress.note("round 1/3: accuracy 0.5000")
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.endswith("] east: train round 1 done in 0.0 s")
    assert second.endswith("] round 1/3: accuracy 0.5000")


def test_plain_lines_are_written_whole_so_that_threads_do_not_mix_them(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    PlainLines().noted("plan")
    assert len(written) == 1
    assert written[0].endswith("] plan\n")


def test_plain_lines_do_not_tell_interrupted_steps_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), progress.listening(PlainLines()), progress.working("east", "train"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


def test_bars_show_steps_and_the_time_left() -> None:
    console = terminal()
    with LiveBars(console) as bars, progress.listening(bars), progress.working("east", "train round 1", 40) as advance:
        for _ in range(10):
            advance()
        bars.refresh()
        assert "east: train round 1" in shown(console)
        assert "10/40, 0:00:00 left" in shown(console)


def test_bar_of_unknown_length_shows_no_steps() -> None:
    console = terminal()
    with LiveBars(console) as bars, progress.listening(bars), progress.working("coordinator", "plan"):
        bars.refresh()
        assert "coordinator: plan" in shown(console)
        assert "left" not in shown(console)


def test_notes_scroll_above_the_bars_and_brackets_stay() -> None:
    console = terminal()
    with LiveBars(console) as bars, progress.listening(bars):
        progress.note("edges ['east', 'west'] [/done]")
    assert "edges ['east', 'west'] [/done]" in shown(console)


@pytest.mark.parametrize("error", [None, ValueError])
def test_bar_goes_when_its_step_ends_or_fails(error: type[Exception] | None) -> None:
    console = terminal()
    with LiveBars(console) as bars, progress.listening(bars):
        try:
            with progress.working("east", "train", 2):
                if error:
                    raise error
        except ValueError:
            pass
        console.file.truncate(0)
        bars.refresh()
        assert "east" not in shown(console)
