"""Issue 13 C: what somebody wrote on purpose costs little, ends nothing, and moves no terminal's cursor."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allstep.checkpoint import Store, entries, export, find_entry, rng
from allstep.checkpoint.encoding import decode, read_state_file
from allstep.checkpoint.safetensors_file import read_header
from allstep.checkpoint.sharding import Box, covers
from allstep.checkpoint.storage import HASH_ALGORITHM, hash_bytes
from allstep.cli.main import main
from allstep.errors import CheckpointError, DamagedCheckpointError
from tests.checkpoint.storages import some_state
from tests.checkpoint.test_reading import rewrite

SOON_S = 2.0
"""Far longer than the check of a hostile file takes on a busy machine, and far shorter than it once did."""


def header(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "shape",
    [[2**62] * 20_000, [10**4000] * 100, [1] * 65, [2**63, 0], [3, 10**4000]],
    ids=["dimensions", "digits", "one too many", "beyond 64 bits", "long number"],
)
def test_numbers_and_dimensions_of_a_header_are_bounded(shape: list[int]) -> None:
    content = header({"t": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    began = time.monotonic()
    with pytest.raises(DamagedCheckpointError, match="not a safetensors file"):
        read_header(io.BytesIO(content), len(content))
    assert time.monotonic() - began < SOON_S


@pytest.mark.parametrize("where", ["shape", "offsets", "sizes", "strides"])
@pytest.mark.parametrize("numbers", [[2**63], [1] * 65], ids=["large", "many"])
def test_numbers_and_dimensions_of_a_state_file_are_bounded(where: str, numbers: list[int]) -> None:
    chunk = {"file": "rank_00000.safetensors", "offsets": [0], "sizes": [1]}
    record: dict[str, Any] = {"dtype": "float32", "shape": [1], "strides": [1], "chunks": [chunk]}
    (record if where in record else chunk)[where] = numbers
    text = json.dumps({"tensors": {"t": record}, "value": None}).encode()
    with pytest.raises(DamagedCheckpointError):
        read_state_file(io.BytesIO(text))


def test_the_check_of_many_pieces_takes_time_in_their_number() -> None:
    count = 10_000
    columns = [Box((0, at), (7, 1)) for at in range(count)]
    began = time.monotonic()
    assert covers((7, count), columns)
    assert not covers((7, count), [*columns[:-1], columns[0]])
    # Long boxes that overlap all others, side by side in the second dimension.
    assert not covers((count, count), [Box((at, 0), (count - at, 1)) for at in range(count)])
    assert time.monotonic() - began < 5 * SOON_S


def test_pieces_that_are_cut_along_many_dimensions_are_refused_at_once() -> None:
    shape = (2,) * 60
    began = time.monotonic()
    assert not covers(shape, [Box((0,) * 60, (1,) * 60)])
    assert time.monotonic() - began < SOON_S


class Endless(io.RawIOBase):
    """A file that goes on, and says how much was read of it."""

    given = 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "everything was asked for"
        self.given += size
        return bytes(min(size, 1 << 28 | 1))


def test_a_state_file_is_never_read_beyond_what_one_may_have() -> None:
    file = Endless()
    with pytest.raises(DamagedCheckpointError, match="more than"):
        read_state_file(file)  # type: ignore[arg-type]
    assert file.given <= (256 << 20) + 1


NUMPY_STATE = """
import numpy as np, sys
from allstep.checkpoint import rng
from allstep.errors import CheckpointError
state = rng.capture()
kind, key, _, has_gauss, cached = state["numpy"]
for position in (-(2**40), -1, 625, 10**9):
    try:
        rng.restore({**state, "numpy": (kind, key, position, has_gauss, cached)})
    except CheckpointError as error:
        print(error)
    np.random.rand(2000)
"""


def test_a_hostile_position_of_numpys_generator_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", NUMPY_STATE], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the random generators' state cannot be restored") == 4


@pytest.mark.parametrize(
    "broken",
    [
        {"numpy": ("PCG64", np.zeros(624, np.uint32), 0, 0, 0.0)},
        {"numpy": ("MT19937", np.zeros(3, np.uint32), 0, 0, 0.0)},
        {"numpy": ("MT19937", np.zeros(624, np.int64), 0, 0, 0.0)},
        {"numpy": ("MT19937", [0] * 624, 0, 0, 0.0)},
        {"numpy": None},
        {"python": (3, (0,) * 624 + (10**6,), None)},
        {"torch": torch.zeros(3, dtype=torch.uint8)},
        {"torch": torch.full((5056,), 255, dtype=torch.uint8)},
        {"torch": torch.zeros(5056)},
    ],
)
def test_what_is_no_state_of_a_generator_is_refused(broken: dict[str, Any]) -> None:
    before = rng.capture()
    with pytest.raises(CheckpointError, match="cannot be restored"):
        rng.restore({**before, **broken})
    rng.restore(before)


def forge(folder: Path, **changes: Any) -> None:
    body = json.loads((folder / "manifest.json").read_text())["manifest"] | changes
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    (folder / "manifest.json").write_text(json.dumps({"manifest": body, HASH_ALGORITHM: hash_bytes(text)}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = Store(str(tmp_path / "c"))
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    return tmp_path / "c"


@pytest.mark.parametrize("changes", [{"created": 1e300}, {"created": -1}, {"step": 10**30}, {"world_size": 10**4000}])
def test_one_hostile_manifest_does_not_end_the_listing(
    changes: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge(folder / "save-000001-step-1", **changes)
    assert main(["checkpoints", "ls", str(folder)]) == 1
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.endswith("damaged")
    assert second.endswith("whole")


ESCAPES = "\x1b[2J\x1b]0;owned\x07\nsave-000009-step-9: whole"


def test_verify_prints_no_escapes_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forge(folder / "save-000001-step-1", metrics={ESCAPES: "high"})
    assert main(["checkpoints", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert len(out.splitlines()) == 3


def test_an_error_about_a_file_has_one_printable_line(folder: Path, tmp_path: Path) -> None:
    saved = json.loads((folder / "save-000002-step-2" / "state.json").read_text())
    record = next(iter(saved["tensors"].values()))
    saved["tensors"] = {ESCAPES * 1000: record | {"dtype": ESCAPES}}
    rewrite(folder / "save-000002-step-2", "state.json", json.dumps(saved).encode())
    with pytest.raises(CheckpointError) as raised:
        export(find_entry(str(folder), "save-000002-step-2"), str(tmp_path / "x.pt"))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 30_000


@pytest.mark.parametrize(
    "node",
    [
        {"$device": "nonsense"},
        {"$size": [2**70]},
        {"$size": [-1, "a"]},
        {"$array": {"dtype": "f8", "shape": [1], "data": "AAAAAAAAAAA=", "axes": [5]}},
        {"$array": {"dtype": "f8", "shape": [2**62, 2**62], "data": ""}},
        {"$complex": ["1", "2", "3"]},
        {"$counter": [[1]]},
    ],
)
def test_a_value_of_no_meaning_is_damage(node: dict[str, Any]) -> None:
    with pytest.raises(DamagedCheckpointError):
        decode({"a": node}, {}.__getitem__)


@pytest.mark.parametrize("tag", ["$set", "$frozenset", "$dict", "$counter", "$ordered"])
def test_keys_that_were_chosen_for_their_hashes_are_refused_at_once(tag: str) -> None:
    keys = [at * (2**61 - 1) for at in range(100_000)]
    content = keys if "set" in tag else [[key, 0] for key in keys]
    began = time.monotonic()
    with pytest.raises(DamagedCheckpointError, match="chosen for their hashes"):
        decode({"a": {tag: content}}, {}.__getitem__)
    assert time.monotonic() - began < 5 * SOON_S


def test_a_device_of_no_meaning_ends_export_with_an_error_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = json.loads((folder / "save-000002-step-2" / "state.json").read_text())
    state["value"]["trainer"]["iteration"] = {"$device": "nonsense"}
    rewrite(folder / "save-000002-step-2", "state.json", json.dumps(state).encode())
    assert main(["checkpoints", "export", str(folder), str(tmp_path / "x.pt")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("allstep: error: the saved state cannot be read: RuntimeError")
    assert "Traceback" not in error


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_follows_no_planted_link(suffix: str, folder: Path, tmp_path: Path) -> None:
    path, target = tmp_path / f"x{suffix}", tmp_path / "of another"
    target.write_text("mine")
    for name in (f"{path}.tmp-{os.getpid()}", str(path)):
        os.symlink(target, name)
    export(find_entry(str(folder), None), str(path))
    assert target.read_text() == "mine"
    assert path.stat().st_size > 100
    assert not path.is_symlink()


def test_listing_survives_any_bytes_in_place_of_a_manifest(folder: Path) -> None:
    for content in (b"[" * 10**6, b'{"manifest": ' + b"9" * 10_000, b"\xff" * 100, b'{"a": 1e999999}'):
        (folder / "save-000001-step-1" / "manifest.json").write_bytes(content)
        assert [entry.state for entry in entries(str(folder))] == ["damaged", "whole"]
