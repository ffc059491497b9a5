"""Reading one variable of an environment, or failing with its name, its value and what to do.

Contract: the launchers beside this file call these functions. Each returns a value that is what its name says, or
raises `PlacementError`. `remedy` is the sentence that tells a person what to do about a wrong variable. Nothing is
defaulted silently: a launcher that wants a default asks first whether the variable is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn

from allstep.errors import PlacementError

# 18 digits: int() of a variable of any length would take as long as whoever set it likes.
_DIGITS = re.compile(r"[0-9]{1,18}\Z")


def fail(environ: Mapping[str, str], variable: str, problem: str, remedy: str) -> NoReturn:
    """Raise PlacementError: what `variable` holds, the `problem` with that, and the `remedy`."""
    value = environ.get(variable)
    said = f"{variable} is not set" if value is None else f"{variable} is {value!r}"
    raise PlacementError(f"{said}; {problem}. {remedy}", variable=variable, value=value)


def text(environ: Mapping[str, str], variable: str, remedy: str) -> str:
    """The variable's value, which must be there, not empty, and without white space."""
    value = environ.get(variable)
    if value is None:
        fail(environ, variable, "it is needed to place this process", remedy)
    # White space comes from scripts that quote wrongly, and names of hosts or jobs have none.
    if not value or re.search(r"\s", value):
        fail(environ, variable, "it must not be empty or hold white space", remedy)
    return value


def integer(environ: Mapping[str, str], variable: str, remedy: str, *, least: int = 0) -> int:
    """The variable's value as a decimal integer of at least `least`."""
    value = text(environ, variable, remedy)
    if not _DIGITS.match(value) or int(value) < least:
        fail(environ, variable, f"it must be an integer, {least} or more, in decimal digits", remedy)
    return int(value)


def index(environ: Mapping[str, str], variable: str, count: int, counted: str, remedy: str) -> int:
    """The variable's value as an integer in [0, count); `counted` is the variable that says the count."""
    value = integer(environ, variable, remedy)
    if value >= count:
        fail(environ, variable, f"it must be less than {counted}, which is {count}", remedy)
    return value


def port(environ: Mapping[str, str], variable: str, remedy: str) -> int:
    """The variable's value as a TCP port, 1 to 65535."""
    value = integer(environ, variable, remedy, least=1)
    if value > 65535:
        fail(environ, variable, "a port is at most 65535", remedy)
    return value


def agree(environ: Mapping[str, str], variable: str, expected: int, said_by: str) -> None:
    """Raise PlacementError where the variable is set and is not `expected`, which `said_by` says."""
    if variable in environ:
        remedy = f"Unset {variable}: it was probably exported before the processes were started"
        if integer(environ, variable, remedy) != expected:
            fail(environ, variable, f"{said_by} says {expected}", remedy)
