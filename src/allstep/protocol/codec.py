"""Frozen dataclasses as lines of JSON with a version: one line, one message.

Contract: a `Codec` knows the message types of one protocol. `encode` writes a message, its line's end included;
`decode` checks that a line has the fields of its type and that each has its type, so its reader need not. Numbers are
finite and fit into 64 bits. Texts have only characters that can be written out again: half a surrogate pair, which JSON
and Python's file names may have, becomes its escape. Fields that a newer side adds are passed over. What can go wrong:
`ChannelError` for a line that is not a message of this version, and nothing else.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any

from allstep.errors import ChannelError, OtherVersionError

_LEAST, _MOST = -(1 << 63), (1 << 63) - 1  # of the numbers in a message


@dataclass(frozen=True, slots=True)
class _Field:
    """What a field of a message may be: these JSON types, a dataclass to build, or a collection of such items."""

    name: str
    accepted: tuple[type, ...]
    required: bool
    nested: type[Any] | None = None
    items: tuple[type, ...] = ()


class Codec:
    """The messages of one protocol.

    Args:
        protocol: its name, for errors.
        version: which both sides have to speak.
        kinds: the types of its messages, with fields of the types that JSON has, tuples and mappings of them, or
            dataclasses of the same kind.
    """

    def __init__(self, protocol: str, version: int, kinds: Iterable[type[Any]]) -> None:
        self._protocol = protocol
        self._version = version
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._fields: dict[type[Any], list[_Field]] = {}
        for kind in self._kinds.values():
            self._learn(kind)

    def encode(self, message: Any) -> bytes:
        """A message as one line, its end included."""
        body = {"v": self._version, "type": type(message).__name__, **asdict(message)}
        return json.dumps(body, separators=(",", ":")).encode() + b"\n"

    def decode(self, line: bytes) -> Any:
        """A message from a line.

        Raises:
            ChannelError: it is not JSON, not a message, or a field is missing or of another type.
            OtherVersionError: it is of another version.
        """
        try:
            body = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ChannelError(f"not a message of {self._protocol}: {line[:80]!r}") from error
        if not isinstance(body, dict) or "v" not in body:
            raise ChannelError(f"not a message of {self._protocol}: {line[:80]!r}")
        # The version is looked at before the type: another version may have types that this one does not know.
        if body["v"] != self._version:
            raise OtherVersionError(
                f"a message of version {_shown(body['v'])} of {self._protocol}, and this is version "
                f"{self._version}; install the same allstep on all nodes"
            )
        name = body.get("type")
        kind = self._kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            raise ChannelError(f"not a message of {self._protocol}: it is of type {_shown(name)}")
        return self._build(kind, body)

    def _learn(self, kind: type[Any]) -> None:
        if kind in self._fields:
            return
        # Once per type and process: resolving annotations takes longer than reading a message does.
        hints = typing.get_type_hints(kind)
        self._fields[kind] = [_field(each.name, hints[each.name], _is_required(each)) for each in fields(kind)]
        for each in self._fields[kind]:
            if each.nested is not None:
                self._learn(each.nested)

    def _build(self, kind: type[Any], body: Mapping[str, Any]) -> Any:
        values: dict[str, Any] = {}
        for each in self._fields[kind]:
            if each.name not in body:
                if each.required:
                    raise ChannelError(f"a {kind.__name__} without {each.name}")
                continue  # its default holds
            value: Any = body[each.name]
            if not _is(value, each.accepted) or not _are(value, each.items):
                raise ChannelError(f"a {kind.__name__} whose {each.name} is {_shown(value)}")
            values[each.name] = self._build(each.nested, value) if each.nested is not None else _taken(value)
        return kind(**values)


def _is_required(each: Any) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _field(name: str, hint: Any, required: bool) -> _Field:
    origin = typing.get_origin(hint)
    if hint is float:
        return _Field(name, (float, int), required)
    if origin is tuple:
        return _Field(name, (list,), required, items=_item(typing.get_args(hint)[0]))
    if origin in (Mapping, dict):
        return _Field(name, (dict,), required, items=_item(typing.get_args(hint)[1]))
    if origin in (typing.Union, types.UnionType):
        return _Field(name, typing.get_args(hint), required)
    if isinstance(hint, type) and is_dataclass(hint):
        return _Field(name, (dict,), required, nested=hint)
    return _Field(name, (hint,), required)


def _item(hint: type) -> tuple[type, ...]:
    return (float, int) if hint is float else (hint,)


def _is(value: Any, accepted: tuple[type, ...]) -> bool:
    # In Python a bool is an int; in a message it is none.
    if not isinstance(value, accepted) or (value.__class__ is bool and bool not in accepted):
        return False
    return _LEAST <= value <= _MOST if isinstance(value, int | float) else True  # refuses an overflow to infinity too


def _are(value: Any, accepted: tuple[type, ...]) -> bool:
    if not accepted:
        return True
    return all(_is(item, accepted) for item in (value.values() if isinstance(value, dict) else value))


def _taken(value: Any) -> Any:
    """A value that has its type, as a message holds it."""
    if isinstance(value, str):
        return _writable(value)
    if isinstance(value, list):
        return tuple(map(_taken, value))
    if isinstance(value, dict):
        return {_writable(key): _taken(each) for key, each in value.items()}
    return value


def _writable(text: str) -> str:
    """The text, with what no encoding has spelled out: it would raise wherever it is written or hashed."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(value: Any) -> str:
    """The beginning of a value that was refused, for an error."""
    # The text of a mapping or list could be as long as the line.
    if isinstance(value, str):
        return ascii(value[:40])
    return str(value)[:40] if isinstance(value, int | float | None) else "a collection"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
