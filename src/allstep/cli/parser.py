"""The argument parser of all commands: no abbreviations, secrets left out of errors, and suggestions in them."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from allstep.protocol.foreign_text import printable
from allstep.protocol.masking import mask
from allstep.suggestions import did_you_mean


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line, and what may have been meant, without repeating the `secrets` in it.

    Attributes:
        options: names of options to suggest; those of subcommands, of which this parser reports mistakes too, are added
            by whoever makes these.
        words: what may stand at the place of a command.
    """

    def __init__(self, *, secrets: frozenset[str] = frozenset(), **settings: Any) -> None:
        self.options: list[str] = []
        self.words: list[str] = []
        self.secrets = secrets
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an argument, as argparse does."""
        action = super().add_argument(*names, **settings)
        self.options += action.option_strings
        self.words += map(str, action.choices or ())
        return action

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and end with status 2."""
        super().error(printable(mask(message + self._suggestion(message), self.secrets)))

    def _suggestion(self, message: str) -> str:
        if found := re.match(r"unrecognized arguments: (-[^\s=]*)", message):
            return did_you_mean(found[1], self.options)
        if found := re.search(r"invalid choice: '([^']*)'", message):
            return did_you_mean(found[1], self.words)
        return ""
