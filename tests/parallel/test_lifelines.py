"""Connections that tell a kill: what is no kill ends nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from jaxcrit.core import processes
from jaxcrit.parallel import lifelines

WORD = "a word"


@pytest.fixture
def gone(monkeypatch):
    """Numbers of the processes that are taken for killed."""
    found = []
    monkeypatch.setattr(processes, "gone", found.append)
    monkeypatch.setattr(lifelines, "_PATIENCE", 1.0)
    return found


@contextlib.contextmanager
def held(word=WORD):
    """A connection from process 1 to process 0, and what process 0 holds and has been told."""
    listening, ours = socket.create_server(("localhost", 0)), []
    accepting = threading.Thread(target=lifelines._accept, args=(listening, WORD, ours, 1))
    one = socket.create_connection(listening.getsockname(), timeout=10)
    one.sendall(f"{word}{1:8d}".encode())
    accepting.start()
    try:
        yield one, ours
    finally:
        accepting.join(10)
        for other in (one, *ours):
            other.close()


def watched(one):
    """Watches as process 1 does; the thread."""
    watching = threading.Thread(target=lifelines._watch_first, args=(one,))
    watching.start()
    return watching


def test_process_0_takes_connections_while_it_looks_at_something_for_all(monkeypatch, gone):
    monkeypatch.setattr(processes, "_count", 2)
    with processes._by_itself(), held() as (one, _):  # a busy machine gets there before the thread runs
        assert one.recv(1) == lifelines._HELD
        one.sendall(lifelines._WELL)
    assert gone == []


@pytest.mark.parametrize("word", [b"", lifelines._WELL])
def test_an_end_is_a_kill_unless_a_word_comes_before_it(gone, word):
    """Each side sees the other's end."""
    with held() as (one, ours):
        watching = watched(one)
        while not ours:
            time.sleep(0.01)
        for end in (ours[0], one):
            end.sendall(word)
            end.shutdown(socket.SHUT_WR)  # what the other has said is still read
        watching.join(10)
        deadline = time.monotonic() + 10
        while any(thread.name.endswith("(_watch)") for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert sorted(gone) == ([] if word else [0, 1])


def test_a_connection_that_process_0_never_took_tells_nothing(gone):
    with socket.create_server(("localhost", 0)) as listening:
        never = socket.create_connection(listening.getsockname(), timeout=10)
    watched(never).join(10)
    never.close()
    assert gone == []
    with held("another word") as (one, _):  # as of some scanner of ports
        watched(one).join(10)
    assert gone == []
