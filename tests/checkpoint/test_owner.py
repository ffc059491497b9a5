"""Issue 13 A4: who owns a folder, decided between claims of several jobs; processes are played by their claims."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from allstep.checkpoint import FsspecStorage, LocalStorage, Storage, Store
from allstep.checkpoint.owner import Claim, Ownership, claim_folder, claim_of_this_process
from allstep.errors import FolderInUseError, FolderLostError
from tests.checkpoint.storages import listed, some_state

ELSEWHERE: dict[str, Any] = {"host": "node7", "process": 4711, "launches": {"slurm-12": 0}}


def job(name: str, **changes: Any) -> Claim:
    """The claim of a job on another machine."""
    return Claim(**{**ELSEWHERE, "machine": f"of {name}", "token": name, "time": time.time(), **changes})


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield LocalStorage(str(tmp_path / "c"))
        return
    yield FsspecStorage(f"memory://{tmp_path.name}/c")
    fsspec.filesystem("memory").store.clear()


def claims(storage: Storage) -> list[str]:
    return sorted(name for name in storage.files("owner") if not name.startswith("."))


def content(storage: Storage) -> Any:
    with storage.open("owner", claims(storage)[-1]) as file:
        return json.loads(file.read())


def test_a_folder_that_nobody_has_is_claimed_and_given_back(storage: Storage) -> None:
    owned = claim_folder(storage, job("first"))
    assert claims(storage) == ["claim-000001.json"]
    assert not content(storage)["released"]
    owned.check()
    owned.release()
    assert content(storage)["released"]
    second = claim_folder(storage, job("second"))
    assert claims(storage) == ["claim-000002.json"]
    second.release()


def test_an_owner_that_beats_is_refused_with_its_name(storage: Storage) -> None:
    owned = claim_folder(storage, job("first"), beat=0.05)
    with pytest.raises(FolderInUseError, match=r"process 4711 on node7, slurm-12.*--take-over"):
        claim_folder(storage, job("second", launches={}), silent=30.0)
    owned.check()
    owned.release()


def test_an_owner_elsewhere_that_is_silent_is_followed(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    before = claim_folder(storage, job("first"), beat=1000)
    owned = claim_folder(storage, job("second", launches={}), silent=0.3)
    assert "waiting up to" in caplog.text
    with pytest.raises(FolderLostError, match=r"taken over by process 4711 on node7"):
        before.check()
    owned.check()
    before.release()  # which changes nothing for its successor
    owned.check()
    assert not content(storage)["released"]
    owned.release()


@pytest.mark.parametrize("launch", ["slurm-12", "allstep-ab", "torchrun-x"])
def test_the_later_attempt_of_a_launch_follows_at_once_and_not_the_other_way(launch: str, storage: Storage) -> None:
    before = claim_folder(storage, job("before", launches={launch: 3}), beat=0.05)
    owned = claim_folder(storage, job("after", launches={launch: 4}), silent=10_000, beat=0.05)
    with pytest.raises(FolderLostError):
        before.check()
    for attempt in (3, 4):
        with pytest.raises(FolderInUseError):
            claim_folder(storage, job("again", launches={launch: attempt}), silent=30)
    owned.release()


def test_a_job_of_this_machine_is_known_by_its_process(storage: Storage) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    mine = claim_of_this_process({})
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    other = mine.model_copy(update={"process": process.pid, "started": fields[19], "token": "other"})
    alive = claim_folder(storage, other, beat=1000)
    with pytest.raises(FolderInUseError, match=f"process {process.pid} on"):
        claim_folder(storage, mine, silent=0)  # silent or not: it lives
    process.kill()
    # Killed and not waited for: a zombie has ended too.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    claim_folder(storage, mine, silent=1000).release()
    process.communicate()
    alive.release()


def test_a_later_process_with_the_number_of_a_dead_one_is_not_it(storage: Storage) -> None:
    mine = claim_of_this_process({})
    dead = claim_folder(storage, mine.model_copy(update={"started": "1", "token": "other"}), beat=1000)
    claim_folder(storage, mine, silent=1000).release()
    dead.release()


def test_a_live_owner_is_taken_over_by_hand_and_does_not_take_it_back(storage: Storage) -> None:
    before = claim_folder(storage, job("first"), beat=1000)
    owned = claim_folder(storage, job("second", launches={"x": 0}), take_over=True, silent=0.0, beat=0.05)
    with pytest.raises(FolderLostError):
        before.check()
    with pytest.raises(FolderInUseError):
        claim_folder(storage, job("first again"), take_over=True, silent=30)
    third = claim_folder(storage, job("third", launches={"y": 0}), take_over=True, silent=30)
    with pytest.raises(FolderLostError):
        owned.check()
    third.release()


def test_one_of_many_that_come_at_once_gets_the_folder(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    dead = claim_folder(storage, job("dead"), beat=1000)
    owners: list[Ownership] = []
    refused: list[str] = []

    def come(name: str) -> None:
        try:
            # Much longer than a beat: a busy machine may hold the owner's thread up.
            owners.append(claim_folder(storage, job(name, launches={name: 0}), silent=5, beat=0.05))
        except FolderInUseError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come, args=(f"job{at}",)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(owners), len(refused)) == (1, 5)
    owners[0].check()
    owners[0].release()
    with pytest.raises(FolderLostError):
        dead.check()


class Unconditional(FsspecStorage):
    """An object store that writes whatever it is asked to."""

    def _create(self, path: str, data: bytes) -> bool:
        self._fs.pipe_file(path, data)
        return True


def test_where_nobody_can_tell_who_was_first_the_newest_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Unconditional(f"memory://{tmp_path.name}/c")
    first = claim_folder(storage, job("first"), beat=1000)
    assert "cannot tell which of two jobs comes first" in caplog.text
    # As if both had looked before either had written.
    second = job("second")
    storage.replace_file("owner", "claim-000001.json", json.dumps(second.model_dump(mode="json")).encode())
    with pytest.raises(FolderLostError, match="taken over by"):
        first.check()
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(
    "hostile", [b"", b"{", b"[" * 100_000, b'{"host": 5}', b'{"process": 1e999}', b"\xff" * 200_000]
)
def test_a_claim_that_cannot_be_read_is_watched_like_any_other(hostile: bytes, storage: Storage) -> None:
    storage.create_file("owner", "claim-000007.json", hostile)
    owned = claim_folder(storage, job("mine"), silent=0.2)
    assert claims(storage) == ["claim-000008.json"]
    owned.release()


def test_names_in_a_hostile_claim_move_no_cursor(storage: Storage) -> None:
    evil = claim_folder(storage, job("evil", host="\x1b[2Jn", launches={"\x1b]0;x\x07": 0}), beat=0.05)
    with pytest.raises(FolderInUseError) as raised:
        claim_folder(storage, job("mine", launches={}), silent=10)
    assert str(raised.value).isprintable()
    evil.release()


def test_a_folder_that_is_removed_meanwhile_is_claimed_anew(storage: Storage) -> None:
    owned = claim_folder(storage, job("first"), beat=1000)
    storage.remove_folder("owner")
    owned.check()
    assert claims(storage) == ["claim-000001.json"]
    owned.release()


def test_two_stores_of_one_process_share_the_folder(tmp_path: Path) -> None:
    one, other = Store(str(tmp_path)), Store(str(tmp_path))
    assert one.save(1, some_state(1)).wait()
    assert other.save(2, some_state(2)).wait()
    one.close()
    other._ownership.check()  # type: ignore[union-attr]
    other.close()
    assert content(LocalStorage(str(tmp_path)))["released"]


def test_a_store_that_is_gone_has_given_its_folder_back(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).save(1, some_state(1)).wait()
    assert content(LocalStorage(str(tmp_path)))["released"]


def test_a_job_that_lost_the_folder_saves_no_more_and_removes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(tmp_path), keep_last=1)
    assert store.save(1, some_state(1)).wait()
    storage = LocalStorage(str(tmp_path))
    other = claim_folder(storage, job("other"), take_over=True)
    with caplog.at_level(logging.ERROR), pytest.raises(FolderLostError, match="taken over by process 4711 on node7"):
        store.save(2, some_state(2)).wait()
    assert listed(tmp_path) == ["save-000001-step-1"]
    with pytest.raises(FolderLostError):
        store.save(3, some_state(3)).wait()
    other.release()
