"""How long before its end a job is told to stop: long enough for what its saves were seen to take.

Contract: pure. A stop takes up to two of the iterations that come after the notice, then one save. Both times are read
from the record of the job's committed saves, over all its starts: the longest save twice, since the one at the end is
waited for while the file system may be busy, and the slowest iterations between two saves of one process. `margin` is
added for what is not measured: ranks that leave, and SLURM's own time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from allstep.protocol.save_record import CommittedSave

UNKNOWN_S = 120.0
"""The lead where no save was measured yet."""

MARGIN_S = 30.0
"""The margin, unless a person gives another."""


def lead_seconds(saves: Sequence[CommittedSave], margin: float) -> float:
    """Seconds between the notice and the end of the job's time.

    Args:
        saves: what was measured, oldest first; empty gives `UNKNOWN_S` and the margin.
        margin: seconds to add.
    """
    if not saves:
        return UNKNOWN_S + margin
    longest = max(each.seconds for each in saves)
    paces = [
        (later.time - earlier.time) / (later.step - earlier.step)
        for earlier, later in pairwise(saves)
        if later.run == earlier.run and later.step > earlier.step
    ]
    return 2 * longest + 2 * max(0.0, *paces, 0.0) + margin
