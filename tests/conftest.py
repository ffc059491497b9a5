"""Hypothesis draws the same examples in every default run, so that a red run is about the change; the nightly mark, and
HYPOTHESIS_PROFILE=explore, draw new ones each time.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in a shell's background: what tests start would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "ALLSTEP_", "TORCHELASTIC_", "SLURM_")


@pytest.fixture(autouse=True, scope="session")
def own_configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the home of who runs them alone, where a run of several machines keeps its user's secret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("configuration")))
        yield


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Names the test that leaves what the next one of its process would meet: handlers, a World, who the process is."""
    before = _shared()
    yield
    after = _shared()
    left = [
        f"{name} was {before.get(name, 'not there')} and is {after.get(name, 'not there')}"
        for name in sorted({**before, **after})
        if before.get(name) != after.get(name)
    ]
    assert not left, f"the test left behind: {'; '.join(left)}"


def _shared() -> dict[str, object]:
    """What tests of one process share and would mislead the next: by name."""
    shared: dict[str, object] = {number.name: signal.getsignal(number) for number in _SIGNALS}
    shared |= {name: value for name, value in os.environ.items() if name.startswith(_PLACE)}
    world = sys.modules.get("allstep.world.current")  # not imported for this: torch would be as well
    return shared | {"World.current()": None if world is None else world.current()}
