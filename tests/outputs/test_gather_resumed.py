"""An epoch that is resumed in its middle has the outputs from before as well, at any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from allstep import Checkpoint, Engine, Events, Gather
from allstep.testing import run_ranks

SAMPLES = 22


def run(world, folder, stop_at=None):
    """One start of a script; what was gathered when its epoch ended."""
    loader = world.loader(TensorDataset(torch.arange(SAMPLES)), global_batch_size=4, shuffle=True)
    engine = Engine(lambda engine, batch: {"double": 2 * batch[0], "name": [f"n{int(each)}" for each in batch[0]]})
    Gather("double", "name").attach(engine)
    checkpoint = Checkpoint(folder, every=None).attach(engine)
    if stop_at is not None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda: engine.terminate(agreed=True))
    resumed = checkpoint.resume()
    engine.run(loader, max_epochs=1)
    found = getattr(engine.state, "gathered", None)
    return resumed is not None, None if found is None else (found["double"].tolist(), found["name"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (2, 1), (1, 2)], ids=lambda ranks: f"{ranks[0]} to {ranks[1]}")
def test_outputs_from_before_a_resume_are_gathered(ranks, tmp_path):
    before, after = ranks
    run_ranks(run, before, str(tmp_path), 3, timeout=60)
    for resumed, found in run_ranks(run, after, str(tmp_path), timeout=60):
        assert resumed
        assert found == ([2 * each for each in range(SAMPLES)], [f"n{each}" for each in range(SAMPLES)])
