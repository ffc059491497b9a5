"""How ranks agree: the `Coordinator` protocol with its implementations, and the pure logic of votes and ledgers."""

from allstep.coordination.compare import Schema, StateLine, check_schemas, fingerprint
from allstep.coordination.coordinator import OUTCOMES, Alone, Asked, Coordinator, Outcome, Pending, ReduceOp, Request
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
from allstep.coordination.votes import Occasion, Vote, VoteResult, read_result, vector_length

__all__ = [
    "LONGEST_WINDOW",
    "OUTCOMES",
    "POLICIES",
    "Alone",
    "Asked",
    "Coordinator",
    "GroupCoordinator",
    "Ledger",
    "Occasion",
    "Outcome",
    "Pending",
    "ReduceOp",
    "Request",
    "Schema",
    "StateLine",
    "Uneven",
    "Vote",
    "VoteResult",
    "agree_length",
    "agree_window",
    "check_schemas",
    "fingerprint",
    "next_window",
    "read_result",
    "vector_length",
]
