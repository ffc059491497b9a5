"""The network interface by which this host is reached, where its own name does not tell.

Contract: gloo listens at the address that this host's name resolves to. On many hosts that is 127.0.1.1, or nothing at
all, and then ranks of other hosts wait for this one until their time is over. `name_interface` is called before a group
over several nodes is opened: where the name is of no use it finds the interface by the address with which this host
reaches the meeting point, and tells gloo by GLOO_SOCKET_IFNAME, unless that is set. What can go wrong: no interface, or
several, could be meant; then nothing is set, and what it returns says what to do if the ranks do not connect.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct

from allstep.placement import Rendezvous

VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # of ioctl(2): the IPv4 address of an interface
_ANYWHERE = "192.0.2.1"  # of no host (RFC 5737): only the way there is asked for


def name_interface(meeting: Rendezvous) -> str:
    """Have gloo use the interface by which this host is reached; returns a remedy where it is not known, else ""."""
    if VARIABLE in os.environ or not (problem := _problem_of_own_name()):
        return ""
    interfaces = {address: name for name, address in _addresses()}
    for host in (meeting.host, _ANYWHERE):  # node 0 reaches itself by loopback
        if (name := interfaces.get(_source_towards(host))) is not None:
            os.environ[VARIABLE] = name
            return ""
    if len(set(interfaces.values())) == 1:
        os.environ[VARIABLE] = next(iter(interfaces.values()))
        return ""
    known = ", ".join(f"{name} ({address})" for address, name in interfaces.items()) or "none"
    return (
        f"{problem}, so gloo may listen where other hosts do not reach it. Set {VARIABLE} to the interface that "
        f"they reach; this host has {known}"
    )


def _problem_of_own_name() -> str:
    """Why other hosts cannot reach this one by what its name resolves to; empty where they can."""
    name = socket.gethostname()
    try:
        found = [each[4][0] for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return f"the name of this host, {name!r}, does not resolve here"
    if all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found):
        return f"the name of this host, {name!r}, resolves to {found[0]} here"
    return ""


def _source_towards(host: str) -> str:
    """The address that this host has towards another; empty where there is no way, or it is this host by loopback."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # of a datagram: nothing is sent
                return str(probe.getsockname()[0]).partition("%")[0]
    return ""


def _addresses() -> list[tuple[str, str]]:
    """The interfaces of this host and their addresses, without loopback."""
    found: list[tuple[str, str]] = []
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # it has none
                    answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    found.append((name, socket.inet_ntoa(answer[20:24])))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as table:
        for line in table:
            digits, *_, name = line.split()
            found.append((name, str(ipaddress.IPv6Address(bytes.fromhex(digits)))))
    return [(name, address) for name, address in found if not ipaddress.ip_address(address).is_loopback]
