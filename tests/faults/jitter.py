"""A proxy that holds back what passes through it, each piece for a time of its own, in order: a slow, uneven link."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def jitter(port: int, most: float) -> Iterator[str]:
    """Pass connections on to a port of 127.0.0.1, up to `most` seconds later; gives the address to connect to.

    It has the same port, since what a service proves to those who connect is bound to its port.
    """
    with socket.create_server(("127.0.0.2", port)) as listener:
        threading.Thread(target=_accept, args=(listener, port, most), daemon=True).start()
        yield f"127.0.0.2:{port}"
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, port: int, most: float) -> None:
    with contextlib.suppress(OSError):  # the listener was closed
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", port))
            for number, (source, sink) in enumerate(((near, far), (far, near))):
                seed = 2 * source.fileno() + number
                threading.Thread(target=_pass_on, args=(source, sink, most, seed), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket, most: float, seed: int) -> None:
    delays = random.Random(seed)
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            time.sleep(delays.uniform(0.0, most))  # the lateness of the link
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
