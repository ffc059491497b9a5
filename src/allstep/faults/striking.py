"""Where faults meet a running rank: it asks at a few places whether anything strikes.

Contract: `allstep.init`, `World.close` and an engine's run ask, the last of them only if `active()`. The plan is read
from ALLSTEP_FAULT each time, so that nothing is kept but which faults have struck in this process. A fault says on
standard error that it strikes, for whoever reads the log later. `forget` lets them strike again.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from allstep.faults.acts import carry_out
from allstep.faults.fault import Fault, Here
from allstep.faults.kinds import KINDS
from allstep.faults.plan import VARIABLE, FaultPlan
from allstep.faults.text import write_fault

_struck: set[Fault] = set()


def active() -> bool:
    """Whether there is a plan."""
    return bool(os.environ.get(VARIABLE))


def strike(here: Here, batch: Any = None) -> Any:
    """Carry out what the plan has for this place; gives back the batch to go on with.

    Raises:
        ConfigurationError: the plan cannot be read or carried out.
        BaseException: what the plan says.
    """
    if not active():
        return batch
    for fault in FaultPlan.from_environ(os.environ).faults:
        if fault not in _struck and fault.strikes(here):
            if not KINDS[fault.kind].repeats:
                _struck.add(fault)
                _announce(fault, here)
            batch = carry_out(fault, batch)
    return batch


def forget() -> None:
    """Let every fault strike again."""
    _struck.clear()


def _announce(fault: Fault, here: Here) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"allstep: a rehearsed fault strikes {here}: {write_fault(fault)}\n".encode())
