"""Secrets that a program is given in its arguments and variables, kept out of what is written about it: pure functions.

A secret is known by its name: one of its words is `token`, `key`, `secret`, `password` or the like: `--api-token`,
`HF_TOKEN`, `db.password` or `awsSecretAccessKey`. `masked_arguments` and `masked_value` leave the names and hide the
values. `secret_values` are those values themselves, for `mask`: an error message may repeat one without its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HIDDEN = "***"
"""What stands for a secret."""

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_WORDS = {"key", "pwd", "passphrase", "credential", "credentials"}
_ABOUT = {"file", "path", "dir", "folder", "name", "type", "length", "size", "count", "limit", "dim"}
_SECRET_ENDS = ("token", "secret", "password", "passwd", "apikey", "accesskey", "secretkey", "privatekey")
_IN_URL = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]+(?=@)")  # https://user:password@host
_SHORTEST = 6  # characters of a value that is looked for in a text; a shorter one is in many words


def is_secret(name: str) -> bool:
    """Whether a thing of this name is a secret."""
    words = [word.lower() for word in _WORDS.findall(name)]
    # A shell's PWD is where it is, and the file of a password is none.
    if words == ["pwd"] or (words and words[-1] in _ABOUT):
        return False
    return any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) for word in words)


def masked_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of a program without the secrets among them."""
    return [hidden for hidden, _ in map(_split, _paired(arguments))]


def masked_value(name: str, value: str) -> str:
    """A value for people: a secret's is only a short sum, so that two that differ can be told apart."""
    if not is_secret(name):
        return _IN_URL.sub(rf"\1:{HIDDEN}", value)
    return f"{HIDDEN} ({short_sum(value)})"


def short_sum(text: str) -> str:
    """Four digits that are seldom the same for different texts, and tell too little to find a text by."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:4]


def secret_values(arguments: Sequence[str], environ: Mapping[str, str]) -> frozenset[str]:
    """The secrets among a program's arguments and variables."""
    found = {value for _, value in map(_split, _paired(arguments))}
    found |= {value for name, value in environ.items() if is_secret(name)}
    return frozenset(value for value in found if len(value) >= _SHORTEST)


def mask(text: str, values: Iterable[str]) -> str:
    """The text without these secrets, and without passwords in addresses."""
    for value in sorted(values, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, HIDDEN)
    return _IN_URL.sub(rf"\1:{HIDDEN}", text)


def mask_all(content: Any, values: Iterable[str]) -> Any:
    """The same for every text in lists and mappings, such as are written as JSON."""
    if isinstance(content, str):
        return mask(content, values)
    if isinstance(content, Mapping):
        return {key: mask_all(each, values) for key, each in content.items()}
    if isinstance(content, list | tuple):
        return [mask_all(each, values) for each in content]
    return content


def _paired(arguments: Sequence[str]) -> list[tuple[str, bool]]:
    """Each argument, and whether it is the value of a secret option before it."""
    paired = []
    follows = False
    for argument in arguments:
        paired.append((argument, follows and not argument.startswith("-")))
        follows = argument.startswith("-") and "=" not in argument and is_secret(argument)
    return paired


def _split(argument: tuple[str, bool]) -> tuple[str, str]:
    """An argument without its secret, and the secret or ""."""
    text, is_value = argument
    if is_value:
        return HIDDEN, text
    name, equals, value = text.partition("=")
    if equals and is_secret(name):
        return f"{name}={HIDDEN}", value
    return _IN_URL.sub(rf"\1:{HIDDEN}", text), ""
