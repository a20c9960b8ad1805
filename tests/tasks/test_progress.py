from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks import progress


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def started(self, who: str, what: str, steps: int | None) -> None:
        self.told.append(("started", who, what, steps))

    def advanced(self, who: str) -> None:
        self.told.append(("advanced", who))

    def finished(self, who: str, what: str, seconds: float) -> None:
        assert seconds >= 0
        self.told.append(("finished", who, what))

    def stopped(self, who: str) -> None:
        self.told.append(("stopped", who))

    def noted(self, text: str) -> None:
        self.told.append(("noted", text))


def test_listener_is_told_beginning_steps_and_end() -> None:
    heard = Heard()
    with progress.listening(heard), progress.working("east", "train", 2) as advance:
        advance()
        advance()
    assert heard.told == [
        ("started", "east", "train", 2),
        ("advanced", "east"),
        ("advanced", "east"),
        ("finished", "east", "train"),
    ]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_or_interrupted_work_is_not_told_as_finished(error: type[BaseException]) -> None:
    heard = Heard()
    with pytest.raises(error), progress.listening(heard), progress.working("east", "train"):
        raise error
    assert heard.told == [("started", "east", "train", None), ("stopped", "east")]


def test_nobody_is_told_after_the_block() -> None:
    heard = Heard()
    with progress.listening(heard):
        progress.note("inside")
    progress.note("outside")
    assert heard.told == [("noted", "inside")]


def test_work_in_several_threads_reaches_the_listener() -> None:
    heard = Heard()

    def work(who: str) -> None:
        with progress.working(who, "train", 50) as advance:
            for _ in range(50):
                advance()

    with progress.listening(heard), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, ["a", "b", "c", "d"]))
    assert len(heard.told) == 4 * 52
