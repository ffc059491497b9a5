"""B3 and B5: whose store the ranks meet in, and who can take its port."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from allstep.errors import WorldError
from allstep.launch.environment import ReservedPort
from allstep.protocol.authentication import derived_key
from allstep.protocol.connection import connect
from allstep.store_socket import VARIABLE, on_given_socket
from allstep.world.rendezvous import rendezvous
from allstep.world.torch_private import TCPStore
from tests.jobs.launchers import script
from tests.jobs.running import run
from tests.protocol.proving import BOUND, HOST, KEY, answering
from tests.world.test_rendezvous import assert_one_store, placement, rendezvous_all

NAME = "allstep/job-1.0/0"


@pytest.fixture
def ports() -> Iterator[tuple[int, ...]]:
    with contextlib.ExitStack() as stack:
        yield tuple(stack.enter_context(ReservedPort(shared=True)).port for _ in range(2))


def store_at(port: int) -> TCPStore:
    return TCPStore(HOST, port, None, True, timedelta(seconds=5), wait_for_workers=False)


@pytest.mark.parametrize("value", ["served here", derived_key("guessed", "store", NAME, 0), ""])
def test_row_b3_a_store_of_this_runs_name_without_the_secret_ends_the_run(ports: tuple[int, ...], value: str) -> None:
    squatter = store_at(ports[0])
    squatter.set(NAME, value)
    with pytest.raises(WorldError, match="does not have the secret of this run's ranks"):
        rendezvous(placement(1, ports), "me", 10.0, starts_service=False)


def test_row_b3_a_proof_of_the_real_store_is_of_no_use_at_another_port(ports: tuple[int, ...]) -> None:
    infos = rendezvous_all([placement(rank, ports[1:]) for rank in range(2)])
    assert_one_store(infos)
    real = TCPStore(HOST, ports[1], None, False, timedelta(seconds=5), wait_for_workers=False)
    squatter = store_at(ports[0])
    squatter.set(NAME, real.get(NAME).decode())
    with pytest.raises(WorldError, match=f"port {ports[0]}, says it is that of run"):
        rendezvous(placement(1, ports), "me", 10.0, starts_service=False)


def test_row_b3_without_a_secret_a_taken_port_is_an_error(
    ports: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file" / "folder"))
    squatter = store_at(ports[0])
    with (
        pytest.warns(RuntimeWarning, match="no secret by which to know each other"),
        pytest.raises(WorldError, match=f"port {ports[0]} in use"),
    ):
        rendezvous(placement(0, ports), "me", 5.0, starts_service=False)
    assert squatter.num_keys() >= 0


def test_row_b3_a_squatter_on_the_heads_first_port_is_told_nothing() -> None:
    with (
        answering(key="squatter's") as (proven, first),
        answering() as (_, second),
        contextlib.closing(connect([first, second], key=KEY, within=BOUND, answer=BOUND)) as ours,
    ):
        assert ours.sock.getpeername() == second
        assert not proven


# B5


@pytest.mark.parametrize("host", [HOST, ""])
def test_row_b5_a_reserved_port_cannot_be_taken_by_another_socket(host: str) -> None:
    with ReservedPort(host) as reserved, socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for address in (HOST, ""):
            with pytest.raises(OSError, match="in use"):
                thief.bind((address, reserved.port))


def test_until_rank_0_serves_who_connects_is_refused() -> None:
    with ReservedPort(HOST) as reserved, pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, reserved.port))


def test_a_store_serves_on_the_socket_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with ReservedPort(HOST) as reserved:
        monkeypatch.setenv(VARIABLE, f"{os.getpid()}:{reserved.fileno()}")
        make = on_given_socket(TCPStore)
        for value in ("first", "second"):  # a World may be opened again
            options = {"timeout": timedelta(seconds=5), "wait_for_workers": False}
            server = make("127.0.0.1", port=reserved.port, is_master=True, **options)
            client = make("127.0.0.1", port=reserved.port, is_master=False, **options)
            assert not client.check(["key"])
            client.set("key", value)
            assert server.get("key") == value.encode()
            del server, client


def test_the_socket_is_this_process_alone_and_this_port_s(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, object]] = []
    with ReservedPort(HOST) as reserved:
        make = on_given_socket(lambda **options: made.append(options))
        for pid, port in ((os.getppid(), reserved.port), (os.getpid(), reserved.port + 1)):
            monkeypatch.setenv(VARIABLE, f"{pid}:{reserved.fileno()}")
            make(port=port, is_master=True)
        for text in ("", "x", f"{os.getpid()}:999999", f"{os.getpid()}:x"):
            monkeypatch.setenv(VARIABLE, text)
            make(port=reserved.port, is_master=True)
    assert not any("master_listen_fd" in options for options in made)


def test_a_torch_whose_store_takes_no_socket_binds_the_port_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*, port: int, is_master: bool) -> socket.socket:
        return socket.create_server((HOST, port))

    with ReservedPort(HOST) as reserved:
        monkeypatch.setenv(VARIABLE, f"{os.getpid()}:{reserved.fileno()}")
        with on_given_socket(make)(port=reserved.port, is_master=True) as server:
            socket.create_connection((HOST, reserved.port)).close()
            assert server.getsockname()[1] == reserved.port


LISTENS = """
import psutil
{meet}
if rank == 0:
    listening = [each.laddr for each in psutil.net_connections() if each.status == "LISTEN"]
    print(sorted(at.ip for at in listening if at.port == int(os.environ["MASTER_PORT"])))
"""
MEETS = [
    "import allstep\nworld = allstep.init(timeout=60)",
    "import torch.distributed as dist\ndist.init_process_group('gloo')",
]


@pytest.mark.slow
@pytest.mark.parametrize("meet", MEETS, ids=["allstep", "torch"])
def test_row_b5_ranks_of_one_machine_meet_on_loopback_alone(meet: str, tmp_path: Path) -> None:
    job = run(tmp_path, "--nproc", "2", script(tmp_path, LISTENS.format(meet=meet)))
    assert job.code == 0, job.text
    assert job.out.splitlines()[0] == "[0] ['127.0.0.1']"
