"""What travels between the process that calls `run_ranks` and a warm process: a call one way, what became of it back.

Contract: the caller sends a `Call`. The warm process answers with an `Outcome` and then, when it has put itself back in
order, with a text: empty, or why it cannot be used again. All pickled; `Outcome.error` only where it survives that.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Call:
    """One rank's part of a call: its whole environment, folder and import path, and the pickled function."""

    environment: Mapping[str, str]
    folder: str
    path: tuple[str, ...]
    function: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call. `value` is what the function returned, `text` the traceback of what it raised.

    "unloadable": the function could not be unpickled, and nothing was called.
    """

    end: Literal["returned", "raised", "unloadable"]
    value: Any = None
    text: str = ""
    error: BaseException | None = None

    def to_bytes(self) -> bytes:
        """Pickled, as far as it can be."""
        try:
            message = pickle.dumps(self)
            pickle.loads(message)
        except BaseException as problem:
            if self.end == "returned":
                return failure("raised", problem).to_bytes()
            return pickle.dumps(Outcome(self.end, text=self.text))
        return message


def failure(end: Literal["raised", "unloadable"], error: BaseException) -> Outcome:
    """The outcome of a call that raised."""
    return Outcome(end, text="".join(traceback.format_exception(error)), error=error)
