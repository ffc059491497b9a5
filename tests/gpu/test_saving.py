"""Checkpoints on a GPU: while training goes on, and to the last bit with all that a GPU adds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import allstep
from allstep.checkpoint import Checkpoint
from allstep.checkpoint.snapshot import SnapshotBuffer
from allstep.engine import Engine, Events
from allstep.trainers import create_supervised_trainer
from tests.gpu.training import plain, trained
from tests.memory import Peak

pytestmark = pytest.mark.slow

Figure = Callable[[str, float, str], None]
ELEMENTS = 24_000_001  # 96 MB; the next power of two is 134 MB


def test_a_run_that_goes_on_equals_an_unbroken_one(device, tmp_path: Path):
    """Fused AdamW, weights channels last, dropout drawn on the device, and a loss scaler under CUDA."""
    torch.backends.cudnn.deterministic = True
    with allstep.init(device=str(device)) as world:
        unbroken, _ = trained(world, tmp_path / "unbroken", epochs=3)
    with allstep.init(device=str(device)) as world:
        trained(world, tmp_path / "broken", epochs=1)
    with allstep.init(device=str(device)) as world:
        gone_on, trainer = trained(world, tmp_path / "broken", epochs=3)
    assert trainer.state.iteration == 12
    assert all(torch.equal(unbroken[name], gone_on[name]) for name in unbroken)
    assert gone_on["0.weight"].stride() == unbroken["0.weight"].stride()


def test_saves_while_training_have_the_bits_and_hold_up_little(device, tmp_path: Path, figure: Figure):
    width, every = (2048 if device.type == "cuda" else 32), 10
    at, seen = [time.perf_counter()], {}
    with allstep.init(device=str(device)) as world:
        model = world.wrap(plain(device, width, 8))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        trainer = create_supervised_trainer(model, optimizer, nn.functional.mse_loss)

        def note(engine: Engine) -> None:
            if engine.state.iteration % every == 0:
                seen[engine.state.iteration] = {name: each.cpu().clone() for name, each in model.state_dict().items()}

        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda engine: at.append(time.perf_counter()))
        checkpoint = Checkpoint(tmp_path, every=every, keep_last=None).attach(trainer)
        trainer.run([(torch.randn(16, width), torch.randn(16, width))] * 40)
        checkpoint.store.wait()
        saved = {}
        for path in sorted(each.parent for each in tmp_path.glob("*/manifest.json")):
            found = checkpoint.store.choose(str(path))
            assert found is not None
            saved[found.manifest.facts["iteration"]] = checkpoint.store.load(found).state
    assert set(saved) == {10, 20, 30, 40}
    for iteration, state in saved.items():
        (weights,) = [value for value in state.values() if isinstance(value, dict) and "0.weight" in value]
        assert all(torch.equal(weights[name], each) for name, each in seen[iteration].items())
    took = [after - before for before, after in pairwise(at[2:])]
    saving = [took[iteration - 1] for iteration in (20, 30)]
    figure("iteration", 1e3 * statistics.median(took), "ms")
    figure("iteration that saves", 1e3 * statistics.mean(saving), "ms")
    figure("a save", 3 * sum(each.nbytes for each in model.parameters()) / 2**20, "MiB")
    assert max(saving) < 5.0


def test_the_copy_of_a_save_takes_the_memory_of_its_file(device, figure: Figure):
    SnapshotBuffer().copy([("weight", torch.ones(8, device=device))])  # CUDA takes some memory at the first copy
    weight, buffer = torch.ones(ELEMENTS, device=device), SnapshotBuffer()
    with Peak() as peak:
        file = buffer.copy([("weight", weight)])
    figure("the host's memory for a copy", peak.bytes / file.size, "of its file")
    assert buffer.reserved == file.data.nbytes == 4 * ELEMENTS
    assert peak.bytes < 1.2 * file.size
