"""A port that stays ours until rank 0 serves the store on it.

Contract: the launching parent holds a `ReservedPort` while its workers start and hands its number out. The socket is
bound and never listens, so the kernel gives the number to nobody who asks for a free port, while rank 0's store, which
sets SO_REUSEADDR as torch's always does, may bind and listen on it. Choosing a port, closing the socket and hoping
would leave a gap in which another job takes it.
"""

from __future__ import annotations

import socket


class ReservedPort:
    """A bound TCP port, held until `close` or the end of the `with` block.

    `port` 0 takes any free one. Raises OSError when a given port is in use.
    """

    def __init__(self, host: str = "", port: int = 0) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
