"""Suggestions for names that are nearly right: options, keywords, events, choices.

Contract: pure functions of names. `did_you_mean` is put behind the sentence of an error that says what is wrong.
`hint_for` reads Python's own message about a keyword that a function does not take, where the function is one that a
package of allstep shows; Python itself suggests one from 3.13 on. Standard library only, since the launching parent
imports this.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_UNEXPECTED = re.compile(r"^([\w.]+)\(\) got an unexpected keyword argument '(\w+)'$")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, whatever the case and underscores; None where none is."""
    plain = {each.lower().replace("_", "").replace("-", ""): each for each in known}
    found = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), plain, n=1)
    return plain[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to put behind an error, such as "; did you mean nproc?"; empty where no known name is near."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near}?"


def unknown_option(
    caller: str, given: Mapping[str, object], own: Iterable[str], passed_on: Iterable[str], to: str
) -> str | None:
    """What to say where a keyword that is passed on belongs neither to the caller nor to `to`; None where all do.

    Args:
        caller: the function's name.
        given: the keywords that would be passed on.
        own: further keywords of the caller, to suggest.
        passed_on: keywords of what they are passed on to.
        to: the name of that.
    """
    known = frozenset(passed_on)
    for name, value in given.items():
        if name not in known:
            near = did_you_mean(name, [*own, *known])
            return f"{caller} got {name}={value!r}, which is no option of it or of {to}{near}"
    return None


def hint_for(error: BaseException) -> str | None:
    """What to add to a TypeError about an unknown keyword of a public function or class of allstep."""
    found = _UNEXPECTED.match(str(error)) if isinstance(error, TypeError) else None
    if found is None:
        return None
    called, keyword = found.groups()
    for function in _shown_as(called.split(".")):
        known = [name for name in inspect.signature(function).parameters if name != "self"]
        near = None if keyword in known else nearest(keyword, known)
        if near is not None:
            return f"Did you mean {near}?"
    return None


def suggests_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """A public function whose wrong keywords are to get a suggestion where nobody else catches the error."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            # Not from inside of the function, which calls others.
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                hint = hint_for(error)
                if hint is not None:
                    error.add_note(hint)
            raise

    return called


def _shown_as(names: list[str]) -> Iterable[Callable[..., object]]:
    """What packages of allstep that have been imported show under a dotted name."""
    packages = [each for name, each in sorted(sys.modules.items()) if re.fullmatch(r"allstep(\.\w+)?", name)]
    for package in packages:
        # `names[0]` only where the package says so: a name that it uses itself may be anything.
        target: object = package if names[0] in getattr(package, "__all__", ()) else None
        for name in names:
            target = getattr(target, name, None)
        if callable(target):
            yield target
