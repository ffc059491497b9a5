"""What a rank says about an exception: a pure function of the exception.

Contract: `describe` is called with an exception that is about to leave a run, a World or the script. It says whether
the exception is *derived*: about another rank's end, such as a connection that broke or a collective whose time is up,
so that it is never taken for the first cause while a better one exists. An exception is judged with the ones that led
to it: clean-up in a `finally:` that fails because the peers are gone does not hide the error before it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from allstep.errors import AgreementError

# gloo, nccl and the store raise plain RuntimeErrors for some of what a peer's end does to them.
_PEER_GONE = re.compile(
    r"gloo/|connection (was )?(closed|reset|refused) by|closed by (remote )?peer|broken pipe|pair closure"
    r"|timed out .*(operation|\bclients?\b|\bpeers?\b|\branks?\b|\brecv\b|\bsend\b|\d+ ?ms)|socket timeout"
    r"|ncclremoteerror|ncclsystemerror|nccl communicator was aborted|watchdog caught collective|monitoredbarrier"
    r"|the store was lost|aborted .*process group",
    re.DOTALL | re.IGNORECASE,
)


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
    """The exception as text; a derived one that came in the wake of an ordinary one is named after that."""
    others = list(_led_to(error))
    named, derived = error, any(is_derived(each) for each in others)
    if is_derived(error):
        ordinary = next((each for each in others if not is_derived(each)), None)
        named, derived = ordinary or error, ordinary is None
    return Description(_name(type(named)), _message(named), "".join(traceback.format_exception(error)), derived)


def is_derived(error: BaseException) -> bool:
    """Whether one exception, by itself, is about another rank's end."""
    if dist.is_available() and isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, AgreementError):  # agreement is about all ranks alike
        return False
    return _PEER_GONE.search(_message(error)) is not None


def _led_to(error: BaseException) -> Iterator[BaseException]:
    """What the exception was raised from or during, what that was, and so on."""
    seen = {id(error)}
    link = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _name(kind: type[BaseException]) -> str:
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a broken __str__ must not hide the error
        return f"<a {type(error).__name__} whose text cannot be made>"
