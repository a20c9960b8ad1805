"""An interrupt that arrives while an object is finalized ends the process, a moment later."""

import signal
import subprocess
import sys

from commands import hear_interrupts

START = """
import os, signal, time
from flows.interrupts import keep_interrupts

class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)

class Broken:
    def __del__(self):
        raise ValueError("told as before")

keep_interrupts()
Broken()
Interrupted()
print("dropped", flush=True)
time.sleep(10)
"""


def test_interrupt_dropped_by_a_finalizer_comes_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START], capture_output=True, text=True, check=False, preexec_fn=hear_interrupts
    )
    assert done.stdout == "dropped\n"
    assert done.returncode == -signal.SIGINT
    assert "told as before" in done.stderr
