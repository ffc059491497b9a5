"""How ranks agree: the `Coordinator` protocol with its implementations, and the pure logic of votes and ledgers."""

from allstep.coordination.alone import Alone
from allstep.coordination.coordinator import OUTCOMES, Asked, Coordinator, Outcome, Pending, ReduceOp, Request
from allstep.coordination.ledger import (
    LONGEST_WINDOW,
    POLICIES,
    Ledger,
    Uneven,
    agree_length,
    agree_window,
    next_window,
)
from allstep.coordination.ranked import Ranked
from allstep.coordination.schema import Schema, StateLine, check_schemas, fingerprint
from allstep.coordination.votes import Ballot, Occasion, Tally, read_tally, vector_length

__all__ = [
    "LONGEST_WINDOW",
    "OUTCOMES",
    "POLICIES",
    "Alone",
    "Asked",
    "Ballot",
    "Coordinator",
    "Ledger",
    "Occasion",
    "Outcome",
    "Pending",
    "Ranked",
    "ReduceOp",
    "Request",
    "Schema",
    "StateLine",
    "Tally",
    "Uneven",
    "agree_length",
    "agree_window",
    "check_schemas",
    "fingerprint",
    "next_window",
    "read_tally",
    "vector_length",
]
