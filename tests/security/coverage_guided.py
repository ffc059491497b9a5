"""What atheris runs: `coverage_guided.py RUNS SEEDS` feeds lines that coverage leads it to to what reads foreign bytes.

The one error that may be raised is ChannelError. Anything else ends the process with atheris' report and status.
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports():
    from allstep.errors import ChannelError
    from allstep.protocol.authentication import ConnectingHandshake, ListeningHandshake
    from allstep.protocol.foreign_text import printable
    from allstep.protocol.messages import decode, encode


def try_one(data: bytes) -> None:
    listens, connects = ListeningHandshake("key", 1), ConnectingHandshake("key", 1)
    for line in data.split(b"\n"):
        for take in (listens.receive, connects.prove):
            with contextlib.suppress(ChannelError):
                take(line)
        with contextlib.suppress(ChannelError):
            message = decode(line)
            assert decode(encode(message)) == message
            assert printable(str(message)).isprintable()


if __name__ == "__main__":
    seeds = sys.argv[2:]
    atheris.Setup([sys.argv[0], f"-runs={sys.argv[1]}", "-max_len=2048", "-timeout=20", *seeds], try_one)
    atheris.Fuzz()
