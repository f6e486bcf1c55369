"""Signals end the program wherever they find it."""

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of another kind")

# Each raises a signal where Python ignores what its handler raises.
PLACES = {
    "as an object ends": """
        class Ends:
            def __del__(self):
                signal.raise_signal(number)
        Ends()
    """,
    "as a generator is closed": """
        def generator():
            try:
                yield
            finally:
                signal.raise_signal(number)
        next(generator())
    """,
    "in a callback from C": """
        import ctypes
        callback = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(number))
        callback()
    """,
}

PROGRAM = """
import signal, time
from turboquant_gguf.core.signals import unwind

number = signal.Signals({number})
unwind()
try:
    if True:{place}
    time.sleep(30)
    print("it went on")
finally:
    print("unwound")
"""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_not_lost(place, number):
    program = PROGRAM.format(number=int(number), place=PLACES[place])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "unwound\n" and "ignored" not in done.stderr
    # Python itself ends by SIGINT where nobody catches KeyboardInterrupt.
    assert done.returncode == (-number if number == signal.SIGINT else 128 + number)


def test_other_exceptions_that_python_drops_are_reported():
    place = PLACES["as an object ends"].replace("signal.raise_signal(number)", "1 / 0")
    program = PROGRAM.format(number=1, place=place)
    done = subprocess.run(
        [sys.executable, "-c", program.replace("30", "0")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "ZeroDivisionError" in done.stderr


def test_what_is_ignored_is_ignored_by_children_too():
    """A hangup could end a child that is being started, while its group is still ours."""
    program = """
import signal, subprocess, sys
from turboquant_gguf.core.signals import deferred

for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
ask = "import signal; print(*(signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGINT, signal.SIGHUP)))"
with deferred() as waits:
    signal.raise_signal(signal.SIGHUP)
    assert not waits()
    subprocess.run([sys.executable, "-c", ask], check=True)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.stdout == "True True\n", found.stderr
