"""The kinds of fault: the name of each, how its argument is written, and where it can strike; pure.

What each does is in `acts`.
"""

from __future__ import annotations

import builtins
import math
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from allstep.errors import ConfigurationError

_UNITS = {"": 1, "k": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception to raise: its type as `module.name`, or a name alone for a built-in one, and its message."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of fault is written.

    `read` turns the text after `=` into the argument, and is None where there is none; `write` turns it back.
    `example` is shown where a text is wrong. `repeats`: it strikes from its place on, in every iteration. `whens`:
    where it can strike; empty for anywhere.
    """

    example: str
    read: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    repeats: bool = False
    whens: tuple[str, ...] = ()


def _exception(text: str) -> Raised:
    name, _, message = text.partition(":")
    known = getattr(builtins, name, None)
    if "." not in name and not (isinstance(known, type) and issubclass(known, BaseException)):
        raise ConfigurationError("it must be an exception such as ValueError:message or my_module.MyError:message")
    return Raised(name, unquote(message))


def _write_exception(raised: Raised) -> str:
    return raised.type + (f":{_quoted(raised.message)}" if raised.message else "")


def _signal(text: str) -> int:
    try:
        return int(signal.Signals[text] if text.startswith("SIG") else signal.Signals(int(text)))
    except (KeyError, ValueError):
        raise ConfigurationError("it must be a signal such as 9 or SIGKILL") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigurationError("it must be a number of seconds")
    return value


def _code(text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text) or int(text) > 255:
        raise ConfigurationError("it must be an exit code from 0 to 255")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([kMG]?)", text)
    if match is None:
        raise ConfigurationError("it must be a number of bytes such as 500000, 800k, 64M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def _path(text: str) -> str:
    if not text:
        raise ConfigurationError("it must be a folder")
    return unquote(text)


def _quoted(text: str) -> str:
    """The text without what separates faults and their parts, nor spaces at its ends, which are not read."""
    body = text.strip(" ")
    before, _, after = text.partition(body) if body else (text, "", "")
    return quote(before) + quote(body, safe=" !\"#$&'()*+/:<>?@[\\]^_`{|}~.-") + quote(after)


_RUN = ("data", "step", "handler")

KINDS = {
    "raise": Kind("raise=ValueError:message", _exception, _write_exception),
    "kill": Kind("kill=9", _signal),
    "freeze": Kind("freeze"),
    "hold_gil": Kind("hold_gil=60", _seconds),
    "sleep": Kind("sleep=60", _seconds),
    "slow": Kind("slow=0.1", _seconds, repeats=True, whens=_RUN),
    "exit": Kind("exit=0", _code),
    "leave": Kind("leave", whens=_RUN),
    "segfault": Kind("segfault"),
    "abort": Kind("abort"),
    "fill_disk": Kind("fill_disk=/folder", _path, _quoted),
    "allocate": Kind("allocate=64G", _bytes),
    "ignore": Kind("ignore=SIGTERM", _signal, lambda number: signal.Signals(number).name),
    "nan": Kind("nan", whens=("step",)),
}
