"""What a rank tells the others' service about an exception: a pure function of the exception.

Contract: `describe` is called with the exception that is about to leave a run, a World or the script. It says whether
the exception is *derived*: about another rank's end, such as a connection that broke or a collective whose time is up,
so that it is never taken for the first cause while a better one exists. An exception that came in the wake of another
is judged with it: clean-up in a `finally:` that fails because the peers are gone does not hide the error before it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from allstep.errors import AgreementError

# What gloo, nccl and torch's store say when a peer is gone or silent; all of them raise plain RuntimeErrors for some.
_PEER_GONE = re.compile(
    r"gloo/|"
    r"[Cc]onnection (was )?(closed|reset|refused)( by)?( remote)?( peer)?|"
    r"Broken pipe|"
    r"[Tt]imed out (waiting|after) .*(operation|clients?|peers?|ranks?|recv|send|ms)|"
    r"Application timeout caused pair closure|"
    r"NCCL (communicator was aborted|error|timeout|watchdog)|ncclRemoteError|ncclSystemError|"
    r"[Ww]atchdog caught collective operation timeout|"
    r"(collective|the store) (was )?(timed out|lost)|"
    r"Process group .*(aborted|shut ?down)",
    re.DOTALL,
)
_BROKEN_CONNECTION = (dist.DistError, ConnectionError) if dist.is_available() else (ConnectionError,)


@dataclass(frozen=True, slots=True)
class Description:
    """An exception as text.

    Attributes:
        kind: qualified name of its type.
        message: what it says.
        traceback: as Python prints it, with the exceptions that led to it.
        derived: whether it is about another rank's end.
    """

    kind: str
    message: str
    traceback: str
    derived: bool


def describe(error: BaseException) -> Description:
    """The exception as text; where a derived one came in the wake of an ordinary one, named after that."""
    chain = list(_wake(error))
    ordinary = [each for each in chain if not is_derived(each)]
    derived = error not in ordinary and not ordinary or len(ordinary) < len(chain) and error in ordinary
    first = ordinary[-1] if ordinary and not derived else error
    return Description(_name(type(first)), _message(first), "".join(traceback.format_exception(error)), derived)


def is_derived(error: BaseException) -> bool:
    """Whether one exception, by itself, is about another rank's end."""
    if isinstance(error, _BROKEN_CONNECTION):
        return True
    if isinstance(error, AgreementError):
        return False
    return isinstance(error, RuntimeError) and _PEER_GONE.search(str(error)) is not None


def _wake(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it came from, what that came from, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _name(kind: type[BaseException]) -> str:
    return kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a broken __str__ must not hide the error
        return f"<{type(error).__name__} whose text cannot be made>"
