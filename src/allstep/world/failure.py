"""What a rank says about an exception: a pure function of the exception.

Contract: `describe` is called with an exception that is about to leave a run, a World or the script. It says whether
the exception is *derived*: about another rank's end, such as a connection that broke or a collective whose time is up,
so that it is never taken for the first cause while a better one exists. An exception is judged with the ones that led
to it: clean-up in a `finally:` that fails because the peers are gone does not hide the error before it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from allstep.channel.ending import about_another_rank


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
    named, derived = error, any(about_another_rank(each) for each in others)
    if about_another_rank(error):
        ordinary = next((each for each in others if not about_another_rank(each)), None)
        named, derived = ordinary or error, ordinary is None
    return Description(_name(type(named)), _message(named), "".join(traceback.format_exception(error)), derived)


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
