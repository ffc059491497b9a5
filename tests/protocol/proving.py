"""Both sides of the handshake, for tests that speak for one of them over plain sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from allstep.protocol.authentication import ConnectingHandshake, ListeningHandshake
from allstep.protocol.connection import Connection

KEY = "5ec4e7"
HOST = "127.0.0.1"
BOUND = 30.0  # seconds that anything here may take on a loaded machine


def prove(connection: Connection, port: int, turn: Callable[[], object], key: str = KEY) -> None:
    """Prove to the service at `port` that this side has the key, while `turn` drives the service."""
    handshake = ConnectingHandshake(key, port)
    connection.send(handshake.first)
    deadline = time.monotonic() + BOUND
    while (line := next(connection.receive(), None)) is None:
        assert time.monotonic() < deadline, f"no answer within {BOUND} s"
        assert not connection.ended, connection.ended
        turn()
    connection.send(handshake.prove(line))


def answer(sock: socket.socket, key: str = KEY) -> None:
    """Be the listening side on a socket that was accepted, until the other side has proved itself."""
    handshake = ListeningHandshake(key, sock.getsockname()[1])
    while reply := handshake.receive(read_line(sock)):
        sock.sendall(reply)


def read_line(sock: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        assert byte, "closed"
        line += byte
    return line[:-1]


@contextlib.contextmanager
def answering(key: str = KEY) -> Iterator[tuple[list[socket.socket], tuple[str, int]]]:
    """A port where each connection is answered by a thread; those that proved themselves, and the port's address."""
    proven: list[socket.socket] = []
    accepted: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                accepted.append(sock)
                with contextlib.suppress(AssertionError, OSError):
                    answer(sock, key)
                    proven.append(sock)

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield proven, (HOST, listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for sock in accepted:
                sock.close()
            thread.join(BOUND)
