"""A process that was told to stop ends, whatever hangs in it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT

HANGS = """
import sys, threading
from espalier.processes.signals import stop_on_signals
asked = []
stop_on_signals(lambda: asked.append(1), 1.0)
print("ready", flush=True)
lock = threading.Lock()
lock.acquire()
while not asked:
    threading.Event().wait(0.1)
print("asked", flush=True)
if sys.argv[1] == "hangs":
    lock.acquire()
"""


@pytest.mark.parametrize("how", ["hangs", "ends"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_was_told_to_stop_ends(how: str, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, how], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert said == "asked\n"
    assert process.returncode == (-signal.SIGALRM if how == "hangs" else 0)
    assert (time.monotonic() - began >= 1.0) is (how == "hangs")
