"""The argument parser of all commands: no abbreviations, secrets left out of errors, and suggestions in them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from allstep.protocol.foreign_text import printable
from allstep.protocol.masking import mask
from allstep.suggestions import did_you_mean


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line, and what may have been meant, without repeating the `secrets` in it."""

    def __init__(self, *, secrets: frozenset[str] = frozenset(), **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.secrets = secrets

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and end with status 2."""
        super().error(printable(mask(message + self._suggestion(message), self.secrets)))

    def _suggestion(self, message: str) -> str:
        if found := re.match(r"unrecognized arguments: (-[^\s=]*)", message):
            return did_you_mean(found[1], self._option_strings())
        if found := re.search(r"invalid choice: '([^']*)'", message):
            return did_you_mean(found[1], self._choices())
        return ""

    def _option_strings(self) -> Iterable[str]:
        parsers: list[argparse.ArgumentParser] = [self]
        for each in parsers:
            for action in each._actions:
                yield from action.option_strings
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()

    def _choices(self) -> Iterable[str]:
        for action in self._actions:
            yield from map(str, action.choices or ())
