"""Whether ranks will find and reach each other: names, interfaces and ports of this machine.

What needs a second machine is not looked at here.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping

import psutil

from allstep.errors import PlacementError
from allstep.host_checks.finding import Host, HostFinding, graded
from allstep.placement.variables import port as port_variable
from allstep.protocol.foreign_text import one_line
from allstep.protocol.name_lookup import resolve

TORCHRUN_PORT = 29500
"""Where torchrun and scripts that are started by hand meet, where nothing else was said."""

FEW_PORTS = 2000


def check_host_name(host: Host) -> Iterator[HostFinding]:
    """What this machine's own name resolves to; other machines are told that name."""
    name = socket.gethostname()
    try:
        found = addresses_of(name)
    except OSError as error:
        text = f"the name of this machine, {name!r}, does not resolve: {error.strerror or error}"
        yield HostFinding(
            "host name", "warning", text, f"Add a line `ADDRESS {name}` to /etc/hosts, or mend the name server"
        )
        return
    own = {each.address.partition("%")[0] for has in psutil.net_if_addrs().values() for each in has}
    yield judge_host_name(name, found, host.nodes, own)


def judge_host_name(name: str, found: list[str], nodes: int, own: set[str]) -> HostFinding:
    """A name of another machine is a fault, and so is one that only this machine can use where there are others.

    Args:
        name: of this machine.
        found: the addresses that it resolves to.
        nodes: machines of the run.
        own: the addresses of this machine's interfaces.
    """
    shown = ", ".join(found[:3])
    if not any(each in own or _is_loopback(each) for each in found):
        text = f"{name} resolves to {shown}, which is no address of this machine"
        verdict = graded(bad=nodes > 1)
        return HostFinding("host name", verdict, text, f"Correct the line for {name} in /etc/hosts or the name server")
    if nodes > 1 and all(_is_loopback(address) for address in found):
        text = f"{name} resolves to {shown}, which other machines cannot reach"
        return HostFinding(
            "host name", "warning", text, f"Put {name}'s own address into /etc/hosts in place of {found[0]}"
        )
    return HostFinding("host name", "good", f"{name} resolves to {shown}")


def check_interfaces(host: Host) -> Iterator[HostFinding]:
    """The interfaces that are up, and what variables say of them."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    known = psutil.net_if_addrs()
    addresses = {
        name: [each.address for each in known[name] if each.family in (socket.AF_INET, socket.AF_INET6)]
        for name in known
    }
    yield from judge_interfaces(host, up, addresses)
    yield from _judge_infiniband(host)


def judge_interfaces(host: Host, up: set[str], addresses: dict[str, list[str]]) -> Iterator[HostFinding]:
    """Compare the variables that name interfaces with what there is.

    Args:
        host: whose variables are read.
        up: the names of interfaces that are up.
        addresses: the addresses of each interface.
    """
    usable = {name for name, has in addresses.items() if has and name in up}
    ill = False
    for variable in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = host.environ.get(variable, "")
        if not value:
            continue
        chosen = _chosen(value, set(addresses)) if variable.startswith("NCCL") else set(value.split(","))
        missing, down = sorted(chosen - set(addresses)), sorted(chosen & set(addresses) - usable)
        named = f"{variable} is {one_line(value)!r}"
        remedy = f"Unset {variable}, or name one of {', '.join(sorted(usable)) or 'those that `ip address` shows'}"
        if missing or not chosen:
            ill = True
            yield HostFinding("interfaces", "bad", f"{named}, and this machine has no such interface", remedy)
        elif down and (not variable.startswith("NCCL") or not chosen & usable):
            ill = True
            text = f"{named}, and {', '.join(down)} is down or has no address"
            yield HostFinding("interfaces", "bad", text, remedy)
    outward = {name: [each for each in addresses[name] if not _is_loopback(each)] for name in sorted(usable)}
    shown = ", ".join(f"{name} {has[0]}" for name, has in outward.items() if has)
    if not shown and host.nodes > 1:
        text = "only the loopback interface has an address, so no other machine can be reached"
        yield HostFinding("interfaces", "bad", text, "Connect this machine; in a container use the host's network")
    elif not ill:
        yield HostFinding("interfaces", "good", shown or "only loopback, which does for one machine")


def check_ports(host: Host) -> Iterator[HostFinding]:
    """The address and port at which ranks would meet, and the range from which the kernel gives ports."""
    environ = host.environ
    local = {each.address for name in psutil.net_if_addrs().values() for each in name}
    ill = False
    address = environ.get("MASTER_ADDR", "")
    here = True
    if address:
        try:
            found = addresses_of(address)
        except OSError as error:
            ill = True
            text = f"MASTER_ADDR is {one_line(address)!r}, which does not resolve: {error.strerror or error}"
            yield HostFinding("ports", "bad", text, "Unset it (allstep run sets it itself), or correct the name")
        else:
            here = any(each in local or _is_loopback(each) for each in found)
    if here and (finding := _judge_port(environ)):
        ill = True
        yield finding
    first, last = (int(each) for each in (host.read("proc/sys/net/ipv4/ip_local_port_range") or "32768 60999").split())
    if last - first < FEW_PORTS:
        ill = True
        text = f"the kernel has ports {first} to {last} to give, and every connection between ranks takes one"
        yield HostFinding("ports", "warning", text, "sysctl -w net.ipv4.ip_local_port_range='32768 60999'")
    if not ill:
        yield HostFinding("ports", "good", f"{last - first + 1} ports to give, from {first} to {last}")


def addresses_of(name: str) -> list[str]:
    """The addresses that a name resolves to, without zones; raises OSError where it has none."""
    try:
        return list(dict.fromkeys(str(address[0]).partition("%")[0] for _, address in resolve(name, 0)))
    except UnicodeError as error:
        raise OSError(f"it is no name of a host ({error})") from None


def _judge_port(environ: Mapping[str, str]) -> HostFinding | None:
    if "MASTER_PORT" not in environ:
        if _is_free(TORCHRUN_PORT):
            return None
        text = f"port {TORCHRUN_PORT}, which torchrun takes where none is given, is taken by {_owner(TORCHRUN_PORT)}"
        remedy = "Give torchrun --master-port (allstep run takes a free port by itself)"
        return HostFinding("ports", "warning", text, remedy)
    try:
        number = port_variable(environ, "MASTER_PORT", "Unset it: allstep run sets it itself")
    except PlacementError as error:
        return HostFinding("ports", "bad", str(error), "Unset MASTER_PORT")
    if _is_free(number):
        return None
    text = f"MASTER_PORT is {number}, and that port is taken by {_owner(number)}"
    return HostFinding("ports", "bad", text, "Unset it, choose another, or end that program")


def _is_free(number: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers of torch do
        try:
            probe.bind(("", number))
            probe.listen(1)
        except OSError:
            return False
    return True


def _owner(number: int) -> str:
    """Who listens at a port, as far as this user may know."""
    try:
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == number and each.pid:
                return f"process {each.pid} ({psutil.Process(each.pid).name()})"
    except psutil.Error:
        pass
    return "another user's program"


def _chosen(value: str, names: set[str]) -> set[str]:
    """The interfaces that NCCL would take: a list of prefixes, `=` before it for whole names, `^` for all but these."""
    inverted = value.startswith("^")
    exact = value.removeprefix("^").startswith("=")
    wanted = [each for each in value.removeprefix("^").removeprefix("=").split(",") if each]
    matching = {name for name in names if any(name == each if exact else name.startswith(each) for each in wanted)}
    return names - matching if inverted else matching


def _judge_infiniband(host: Host) -> Iterator[HostFinding]:
    adapters = host.names("sys/class/infiniband")
    active = [
        adapter
        for adapter in adapters
        for port in host.names(f"sys/class/infiniband/{adapter}/ports")
        if "ACTIVE" in host.read(f"sys/class/infiniband/{adapter}/ports/{port}/state")
    ]
    wanted = host.environ.get("NCCL_IB_HCA", "")
    if wanted and not _chosen(wanted.partition(":")[0], set(adapters)):
        text = f"NCCL_IB_HCA is {one_line(wanted)!r}, and this machine has {', '.join(adapters) or 'no InfiniBand'}"
        yield HostFinding("interfaces", "bad", text, "Unset it, or name an adapter that is there")
    elif adapters and not active:
        text = f"no port of {', '.join(adapters)} is active, so NCCL would use the slower network"
        yield HostFinding("interfaces", "warning", text, "Look at ibstat: cable, switch, subnet manager")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
