"""Where a service can be reached."""

from __future__ import annotations

import contextlib
import errno
import socket

import pytest

from allstep.protocol.address import EVERYWHERE, HERE, listen


def reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the machine has no IPv6")
def test_every_interface_means_both_families():
    with contextlib.closing(listen(EVERYWHERE)) as listener:
        port = listener.getsockname()[1]
        assert reaches("127.0.0.1", port)
        assert reaches("::1", port)


def test_here_means_this_machine_alone():
    with contextlib.closing(listen(HERE)) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_machine_without_ipv6_is_reached_by_the_other(monkeypatch):
    made = socket.create_server

    def without_ipv6(address, *, family=socket.AF_INET, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return made(address, family=family, **options)

    monkeypatch.setattr(socket, "create_server", without_ipv6)
    with contextlib.closing(listen(EVERYWHERE)) as listener:
        assert reaches("127.0.0.1", listener.getsockname()[1])


@pytest.mark.parametrize("taken", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_in_one_family_is_taken(taken):
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("the machine has no IPv6")
    with socket.create_server((taken, 0), family=family) as holder, pytest.raises(OSError, match="in use"):
        listen(EVERYWHERE, holder.getsockname()[1])
