"""Checkpoints of one mesh, loaded on another: all that was saved comes back, by hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.testing import run_ranks
from tests.checkpoint.meshes import MESHES, loaded, trained_and_saved

pytestmark = pytest.mark.slow


def check_all_pairs(names: list[str], folder: Path) -> None:
    saved = {}
    for seed, name in enumerate(names):
        ranks, mesh = MESHES[name]
        found = run_ranks(trained_and_saved, ranks, str(folder / name), seed, env={"ALLSTEP_MESH": mesh})
        assert found == [found[0]] * ranks
        saved[name] = found[0]
    for name in names:
        ranks, mesh = MESHES[name]
        everyone = run_ranks(loaded, ranks, [str(folder / each) for each in names], env={"ALLSTEP_MESH": mesh})
        for rank, each in enumerate(everyone):
            wrong = {
                of: {key: (value, had.get(key)) for key, value in saved[of].items() if had.get(key) != value}
                for of, had in zip(names, each, strict=True)
                if had != saved[of]
            }
            assert not wrong, f"loaded on {name}, rank {rank}"


@pytest.mark.nightly
def test_any_mesh_loads_what_any_other_saved(tmp_path: Path) -> None:
    check_all_pairs(list(MESHES), tmp_path)


def test_sharded_tensor_parallel_and_replicated_load_each_other(tmp_path: Path) -> None:
    check_all_pairs(["ddp1", "fsdp2", "tp2"], tmp_path)
