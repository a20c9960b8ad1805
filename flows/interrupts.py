"""An interrupt that arrives while an object is finalized: Python drops it there, and the command would run on."""

import os
import signal
import sys
import threading

AGAIN_SECONDS = 0.1


def keep_interrupts() -> None:
    """Interrupt this process again whenever Python had to ignore a KeyboardInterrupt, as in `__del__`."""
    usual = sys.unraisablehook

    def again(ignored: "sys.UnraisableHookArgs") -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            usual(ignored)
            return
        # Later, as it would be dropped here too; to the process, as only that wakes a main thread that waits.
        timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again
