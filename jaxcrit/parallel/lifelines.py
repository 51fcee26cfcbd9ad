"""Who is gone: connections between process 0 and the others, which the system closes when a process is killed.

A process that fails says so through the coordinator (`jaxcrit.core.processes.end_with_others`); one that is killed says
nothing, but its connections end at once, while those of one that stands still (a machine that is paused, a slow disk)
stay. So a kill is known within a second, and silence alone, which jax watches for, may be borne for minutes.
"""

from __future__ import annotations

import atexit
import contextlib
import secrets
import socket
import threading

from jaxcrit.core import processes

_PATIENCE = 20.0  # seconds for all to connect; where a network does not let them, silence alone tells
_HELD = b"+"  # said by process 0 of a connection that it holds; one that ends before says nothing of a kill
_WELL = b"."  # said before an end that is none of a kill
_over = threading.Event()  # this process ends


def hold(coordinator: str) -> None:
    """Connects the processes of the run, and ends this one soon after another has been killed; a collective.

    Args:
        coordinator: ``HOST:PORT`` of the coordinator, on whose machine process 0 is.
    """
    held: list[socket.socket] = []
    # Asked here and not in a thread: while process 0 looks at something for all (`share`), it counts itself alone.
    count = processes.place()[1]
    if processes.first():
        listening = socket.create_server(("", 0), backlog=count)
        port, word = processes.share(lambda: [listening.getsockname()[1], secrets.token_hex(16)])
        threading.Thread(target=_accept, args=(listening, word, held, count - 1), daemon=True).start()
    else:
        port, word = processes.share(lambda: None)
        host = coordinator.rpartition(":")[0].strip("[]")
        with contextlib.suppress(OSError):
            held.append(socket.create_connection((host, port), timeout=_PATIENCE))
            held[0].sendall(f"{word}{processes.place()[0]:8d}".encode())
            threading.Thread(target=_watch_first, args=(held[0],), daemon=True).start()

    def leave() -> None:
        _over.set()
        for one in held:
            with contextlib.suppress(OSError):
                one.sendall(_WELL)
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    atexit.register(leave)


def _accept(listening: socket.socket, word: str, held: list[socket.socket], others: int) -> None:
    listening.settimeout(_PATIENCE)
    with listening, contextlib.suppress(OSError):
        while len(held) < others:
            one, _ = listening.accept()
            one.settimeout(_PATIENCE)
            said = b""
            with contextlib.suppress(OSError):
                while len(said) < len(word) + 8 and (more := one.recv(len(word) + 8 - len(said))):
                    said += more
            if said[: len(word)] != word.encode():
                one.close()  # some scanner of ports
                continue
            one.sendall(_HELD)
            one.settimeout(None)
            held.append(one)
            threading.Thread(target=_watch, args=(one, int(said[len(word) :])), daemon=True).start()


def _watch_first(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        if one.recv(1) == _HELD:  # else nobody took it: process 0 had waited long enough
            one.settimeout(None)
            _watch(one, 0)


def _watch(one: socket.socket, other: int) -> None:
    try:
        said = one.recv(1)
    except OSError:
        said = b""
    if said != _WELL and not _over.is_set():
        processes.gone(other)
