"""Ctrl-C and SIGTERM: the first lets a run save and leave, a second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxcrit.parallel.preemption import Preempted, leaving_at_once, notice


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts the tests in the background has them ignore interrupts, and what they start too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "by_hand"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_notice_ends_nothing_and_says_who_gave_it(number, by_hand, capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with notice() as leave:
        assert not leave(1)
        os.kill(os.getpid(), number)
        assert leave(2)
        assert Preempted("saved").by_hand is by_hand
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert ("again leaves at once" in capfd.readouterr().err) is by_hand
    with notice() as leave:
        assert not leave(1) and not Preempted("saved").by_hand


def test_a_second_interrupt_is_one_for_a_notebook(capfd):
    with pytest.raises(KeyboardInterrupt), notice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert "interrupted" in capfd.readouterr().err


def test_interrupts_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with notice() as leave:
            os.kill(os.getpid(), signal.SIGINT)
            assert not leave(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_watching_leaves_no_trace():
    with leaving_at_once():
        pass
    assert signal.set_wakeup_fd(-1) == -1


# A call that gives the lock of Python away and comes back late, as jax does when it compiles or computes.
BUSY = """
import hashlib
from jaxcrit.parallel.preemption import leaving_at_once, notice
with leaving_at_once(), notice():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_second_interrupt_ends_the_command_also_in_the_middle_of_a_call():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert "Traceback" not in err and "interrupted" in err
