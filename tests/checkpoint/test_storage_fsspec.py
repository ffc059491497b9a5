"""Checkpoints in places without a rename: in memory, and in an S3 server of this machine."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec
import pytest

from allstep.checkpoint import Store, entries, find_entry, remove, verify
from allstep.checkpoint.manifest import MANIFEST, QUARANTINE
from allstep.checkpoint.owner import claim_folder, claim_of_this_process
from allstep.checkpoint.storage import Buffer, FsspecStorage
from allstep.errors import FolderInUseError
from tests.checkpoint.storages import some_state
from tests.regression import same

_numbers = itertools.count()


@pytest.fixture
def memory() -> Iterator[str]:
    address = f"memory://run{next(_numbers)}/checkpoints"
    yield address
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    pytest.importorskip("s3fs")
    servers = pytest.importorskip("moto.server")
    server = servers.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    bucket = f"bucket{next(_numbers)}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/run/checkpoints"


@pytest.fixture(params=["memory", "s3"])
def address(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_what_was_saved_comes_back(address: str) -> None:
    store = Store(address)
    assert store.choose() is None
    pending = store.save(5, some_state(5), {"rank": 0}, {"loss": 0.5})
    assert pending.wait(), pending.error
    found = Store(address).choose()
    assert found is not None
    loaded = store.load(found)
    assert same(loaded.state["model"], some_state(5)["model"])
    assert loaded.per_rank == [{"rank": 0}]
    again = store.choose(f"{address}/save-000001-step-5")
    assert again == found


def test_old_ones_are_removed_and_new_ones_chosen(address: str) -> None:
    store = Store(address, keep_last=2)
    for step in (1, 2, 3):
        assert store.save(step, some_state(step)).wait()
    assert [entry.name for entry in entries(address)] == ["save-000002-step-2", "save-000003-step-3"]
    found = store.choose()
    assert found is not None
    assert found.manifest.step == 3


def test_a_damaged_one_is_quarantined(address: str) -> None:
    store = Store(address)
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    filesystem, path = fsspec.core.url_to_fs(f"{address}/save-000002-step-2/rank_00000.safetensors")
    content = bytearray(filesystem.cat_file(path))
    content[-1] ^= 1
    filesystem.pipe_file(path, bytes(content))
    found = store.choose()
    assert found is not None
    assert found.manifest.step == 1
    assert [entry.state for entry in entries(address)] == ["whole", "quarantined"]
    assert verify(find_entry(address, "save-000002-step-2"))
    remove(find_entry(address, "save-000002-step-2"))
    assert [entry.state for entry in entries(address)] == ["whole"]


def test_a_second_job_is_refused_by_a_conditional_write(address: str) -> None:
    storage = FsspecStorage(address)
    mine = claim_of_this_process({})
    owned = claim_folder(storage, mine.model_copy(update={"token": "first", "machine": "a"}), beat=0.2)
    assert storage.creates_exclusively
    with pytest.raises(FileExistsError):
        storage.create_file("owner", "claim-000001.json", b"{}")
    other = mine.model_copy(update={"token": "second", "machine": "b"})
    with pytest.raises(FolderInUseError, match="belong to a job that is alive"):
        claim_folder(storage, other, silent=30)
    owned.check()
    owned.release()
    claim_folder(storage, other).release()


class Interrupted(Exception):
    pass


class Dying(FsspecStorage):
    """Stops for good before the n-th file, as a killed process would: nothing is cleaned up."""

    def __init__(self, root: str, files: int) -> None:
        super().__init__(root)
        self.files_left = files

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        if self.files_left == 0:
            raise Interrupted
        self.files_left -= 1
        super().write(folder, name, blocks)

    def remove_file(self, folder: str, name: str) -> None:
        raise Interrupted

    def remove_folder(self, folder: str) -> None:
        raise Interrupted


@pytest.mark.parametrize("files", range(4))
def test_a_save_without_its_manifest_is_removed_by_the_next_start(files: int, memory: str) -> None:
    assert Store(memory).save(1, some_state(1)).wait()
    assert not Store("", storage=Dying(memory, files)).save(2, some_state(2)).wait()
    if files:
        assert [entry.state for entry in entries(memory)] == ["whole", "unfinished"]
    store = Store(memory)
    store.claim()
    found = store.choose()
    assert found is not None
    assert found.manifest.step == 1
    assert len(entries(memory)) == 1


def test_a_save_that_another_run_has_under_way_is_not_quarantined(memory: str) -> None:
    reader = Store(f"{memory}-of-another")
    assert Store(memory).save(1, some_state(1)).wait()
    filesystem = fsspec.filesystem("memory")
    under_way = f"{memory.removeprefix('memory:/')}/save-000002-step-2"
    filesystem.pipe_file(f"{under_way}/rank_00000.json", b"half")
    found = reader.choose(memory)
    assert found is not None
    assert found.manifest.step == 1
    assert not filesystem.exists(f"{under_way}/{QUARANTINE}")


def test_the_manifest_arrives_last(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = FsspecStorage.write

    def noted(self: FsspecStorage, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        write(self, folder, name, blocks)
        written.append(name)

    monkeypatch.setattr(FsspecStorage, "write", noted)
    assert Store(memory).save(1, some_state()).wait()
    assert written[-1] == MANIFEST
    assert len(written) == 4
