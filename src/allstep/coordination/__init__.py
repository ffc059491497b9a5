"""How ranks agree: the `Coordinator` protocol with its implementations, and the pure logic of votes and ledgers.

What lives here: who carries a question to the other ranks (`coordinator`, `group_coordinator`), what one rank says in a
vote and what all said (`votes`), what follows for a window of iterations (`ledger`), and how descriptions that must be
the same on all ranks are compared (`compare`). What does not: when an engine votes (`engine.agreed_batches`), what is
compared (`engine.handshake`, `metrics`), and the process groups themselves (`world`).
"""

from allstep.coordination.compare import ComparedLine, by_ranks, check_same, fingerprint
from allstep.coordination.coordinator import (
    OUTCOMES,
    Alone,
    Coordinator,
    Outcome,
    PendingSum,
    ReduceOp,
    Request,
    RequestKind,
)
from allstep.coordination.group_coordinator import GroupCoordinator
from allstep.coordination.ledger import (
    LONGEST_WINDOW,
    POLICIES,
    Ledger,
    Uneven,
    agree_length,
    agree_window,
    next_window,
)
from allstep.coordination.votes import MOST_DOUBLINGS, Occasion, Vote, VoteResult, read_result, vector_length

__all__ = [
    "LONGEST_WINDOW",
    "MOST_DOUBLINGS",
    "OUTCOMES",
    "POLICIES",
    "Alone",
    "ComparedLine",
    "Coordinator",
    "GroupCoordinator",
    "Ledger",
    "Occasion",
    "Outcome",
    "PendingSum",
    "ReduceOp",
    "Request",
    "RequestKind",
    "Uneven",
    "Vote",
    "VoteResult",
    "agree_length",
    "agree_window",
    "by_ranks",
    "check_same",
    "fingerprint",
    "next_window",
    "read_result",
    "vector_length",
]
