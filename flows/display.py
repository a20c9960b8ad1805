"""A run's progress on stderr: live bars on a terminal, one plain line per finished step elsewhere."""

import sys
import threading
import time
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text


class PlainLines:
    """One line per finished step, with the time since the start."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def started(self, who: str, what: str, steps: int | None) -> None:
        """Say nothing: the line comes when the step is done."""

    def advanced(self, who: str) -> None:
        """Say nothing."""

    def finished(self, who: str, what: str, seconds: float) -> None:
        """Print who did what, and how long it took."""
        self.noted(f"{who}: {what} done in {seconds:.1f} s")

    def stopped(self, who: str) -> None:
        """Say nothing: a note or the command's last line tells why."""

    def noted(self, text: str) -> None:
        """Print one line."""
        # In one piece: `print` would write its end by itself, and another thread's line come between.
        sys.stderr.write(f"[{time.perf_counter() - self._started:7.1f} s] {text}\n")
        sys.stderr.flush()


class LiveBars:
    """A bar per edge while it works, with the time left; notes scroll above."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn(), _StepsAndTimeLeft())
        self._progress = Progress(*columns, console=console, transient=True)
        self._bars: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "LiveBars":
        self._progress.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._progress.stop()

    def started(self, who: str, what: str, steps: int | None) -> None:
        """Show a bar."""
        with self._lock:
            self._remove(who)
            self._bars[who] = self._progress.add_task(escape(f"{who}: {what}"), total=steps)

    def advanced(self, who: str) -> None:
        """Move its bar by one step."""
        with self._lock:
            if who in self._bars:
                self._progress.advance(self._bars[who])

    def finished(self, who: str, what: str, seconds: float) -> None:
        """Take the bar away."""
        with self._lock:
            self._remove(who)

    def stopped(self, who: str) -> None:
        """Take the bar away."""
        with self._lock:
            self._remove(who)

    def noted(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False, markup=False)

    def refresh(self) -> None:
        """Draw the bars now rather than with the next tick."""
        self._progress.refresh()

    def _remove(self, who: str) -> None:
        bar = self._bars.pop(who, None)
        if bar is not None:
            self._progress.remove_task(bar)


class _StepsAndTimeLeft(ProgressColumn):
    """Steps done of all, and the time left if the rest goes as fast; nothing where the steps are not known.

    Rich's own estimate needs two steps, which of two rounds is one too many.
    """

    def render(self, task: Task) -> Text:
        """Render one bar's cell."""
        if task.total is None:
            return Text("")
        steps = f"{task.completed:.0f}/{task.total:.0f}"
        if not task.completed or task.elapsed is None:
            return Text(steps)
        left = task.elapsed / task.completed * (task.total - task.completed)
        return Text(f"{steps}, {timedelta(seconds=round(left))} left")
